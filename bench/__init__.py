"""Measurements that a person starts by hand: figures, no tests."""
