"""The bench runs and counts right; its figures are for people."""

from __future__ import annotations

import json
import sys

import pytest

from tests.support import REPOSITORY, run

PROGRAM = """
import json
from dataclasses import asdict
from bench.coordinator import Case, measure_case
print(json.dumps(asdict(measure_case(Case({case}), 0.2))))
"""


@pytest.mark.parametrize("case", ["1, 1", "6, 2", "6, 1, apart=True", "6, 1, paced=True"])
def test_the_coordinators_bench_measures_every_kind_of_case(case: str) -> None:
    code, out, err = run([sys.executable, "-c", PROGRAM.format(case=case)], REPOSITORY, 60)
    assert code == 0, err
    result = json.loads(out)
    assert 10 < result["reports_per_second"] < 1e6
    assert 0 < result["p50_ms"] <= result["p99_ms"] < 10_000
    assert result["cpu_us_per_report"] > 0
    assert result["resident_mib"] > 10
