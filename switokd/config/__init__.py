"""The run file: its sections, checks and reader. Imports no torch."""
