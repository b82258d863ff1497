"""Strategies compared over seeds: trials, statistics, table, plot."""
