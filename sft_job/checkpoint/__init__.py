"""Saving, finding, verifying and exporting a run's state."""
