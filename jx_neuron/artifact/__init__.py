"""A model ready to run, as a folder on disk."""
