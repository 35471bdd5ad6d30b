"""Faults of the file system."""
