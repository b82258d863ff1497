"""Run files that ship with switokd, by name."""
