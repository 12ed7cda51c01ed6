"""What any room may need: arguments, parsing, host memory, files written whole or not at all, progress."""
