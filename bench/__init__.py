"""Benchmarks, started by hand with `python -m bench`. They measure; they are not tests."""
