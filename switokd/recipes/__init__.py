"""Run files that ship with switokd, one per recipe."""
