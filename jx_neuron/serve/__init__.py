"""Serving a model to many callers at once."""
