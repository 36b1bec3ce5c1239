"""Rows out of files, one module a kind of file: each yields them one after the other, as they are read."""
