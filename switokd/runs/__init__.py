"""The run folder: what a run records, and how it is read."""
