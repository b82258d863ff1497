"""Deciders: a rank gets decisions from the coordinator, or decides in its own process."""
