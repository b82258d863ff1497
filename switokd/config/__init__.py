"""The run file: its sections, checks and reader.

Torch-free. Not covered: the values' effect, which the packages that use the settings document.
"""
