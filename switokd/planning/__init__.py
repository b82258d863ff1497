"""Finds the fastest placement: profiles, cost model and candidates. Also the dry run."""
