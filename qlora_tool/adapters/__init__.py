"""Small trained matrices on frozen linear modules: the methods, where they go, and PEFT's files."""
