"""The breakdown as tables and plots."""
