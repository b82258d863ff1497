"""Counts of durations by bucket, for the metrics.

Not covered: quantiles; Prometheus computes them.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from itertools import accumulate

from prometheus_client.utils import floatToGoString

# The first bucket ends at 50 microseconds: a round trip on one machine takes a few hundred.
SECONDS_BUCKETS = (
    *(50e-6, 100e-6, 200e-6, 350e-6, 500e-6, 750e-6),
    *(1e-3, 2e-3, 5e-3, 10e-3, 20e-3, 50e-3, 100e-3, 200e-3, 500e-3, 1.0, 5.0, 20.0),
)


class Histogram:
    """Counts of durations by bucket; much faster than the class of prometheus_client."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS_BUCKETS) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        """Count one duration; ignore a negative, NaN or infinite one."""
        if 0 <= seconds < math.inf:
            self.counts[bisect_left(SECONDS_BUCKETS, seconds)] += 1
            self.total += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Return (upper bound, cumulative count) of every bucket, as Prometheus expects."""
        bounds = map(floatToGoString, (*SECONDS_BUCKETS, math.inf))
        return list(zip(bounds, accumulate(list(self.counts)), strict=True))
