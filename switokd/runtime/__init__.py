"""Processes, devices and process groups."""
