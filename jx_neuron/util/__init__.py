"""Utilities of all packages: arguments, parsing, host memory, atomic writes, progress."""
