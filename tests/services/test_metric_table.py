"""The table of docs/metrics.md against a real coordinator with a real run.

Not covered: the values (`test_metrics.py`, `tests/deploy`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.support import REPOSITORY, process, require, switokd_train, wait_until

PAGE = REPOSITORY / "docs" / "metrics.md"
NEEDS_A_GPU = "only with a GPU"


class Row(NamedTuple):
    """A row of the table, without the meaning."""

    kind: str
    labels: frozenset[str]


def cells() -> list[list[str]]:
    """The cells of all rows that describe a metric."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| `switokd_")]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def table() -> dict[str, Row]:
    """The table, by name."""
    rows = [(name.strip("`"), kind, labels) for name, kind, labels, *_ in cells()]
    assert len({name for name, *_ in rows}) == len(rows)
    return {
        name: Row(kind, frozenset(labels.split(", ")) - {"none"}) for name, kind, labels in rows
    }


def scraped(http: str) -> dict[str, Row]:
    """The same of a coordinator; the labels are those of the samples, if there are any."""
    with urllib.request.urlopen(f"http://{http}/metrics", timeout=10) as response:
        text = response.read().decode()
    found: dict[str, Row] = {}
    for family in text_string_to_metric_families(text):
        if family.name.startswith("switokd_"):
            labels = {frozenset(sample.labels) - {"le"} for sample in family.samples}
            assert len(labels) <= 1, family.name
            name = family.name + ("_total" if family.type == "counter" else "")
            has_samples = bool(family.samples)
            found[name] = Row(family.type if has_samples else "", *labels or {frozenset()})
    return found


# With method "signal", the context managers stop all processes after a timeout.
@pytest.mark.timeout(240, method="signal")
def test_a_real_run_has_exactly_the_metrics_of_the_table(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "switokd", "coordinator", "--port=0", "--http-port=0"]
    log, output = tmp_path / "coordinator.log", tmp_path / "training.log"
    expected = table()
    gpu = {cell[0].strip("`") for cell in cells() if NEEDS_A_GPU in cell[3]}
    assert gpu == {"switokd_rank_gpu_memory_bytes"}
    with process([*command, "--journal=journal.db"], tmp_path, log) as coordinator:
        wait_until(lambda: "\n" in log.read_text() or coordinator.poll(), 60, "the coordinator")
        address = json.loads(log.read_text().splitlines()[0])
        train = switokd_train(
            *(2, "digits-2t1s", "run_dir=run", f"coordinator.address={address['grpc']}"),
            *("placement=replicated", "schedule.epochs=100000", "data.train_samples=64"),
            *("data.batch_size=32", "data.workers=0", "device=cpu"),
        )
        with process(train, tmp_path, output) as training:

            def seen() -> dict[str, Row]:
                assert training.poll() is None, output.read_text()
                return {name: row for name, row in scraped(address["http"]).items() if row.kind}

            waited_for = expected.keys() - gpu
            try:
                wait_until(lambda: waited_for <= seen().keys(), 180, "a sample of each metric")
            except BaseException:
                print("without a sample:", sorted(waited_for - seen().keys()))
                raise
            found = seen()
    assert found == {name: row for name, row in expected.items() if name not in gpu}


def test_example_queries_are_valid(tmp_path: Path) -> None:
    queries = {name.strip("`"): query.strip("`") for name, *_, query in cells()}
    for name, query in queries.items():
        assert name in query, query
    rules = [{"record": name.replace("_", ":"), "expr": query} for name, query in queries.items()]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "examples", "rules": rules}]}))
    command = [require("promtool", "prometheus"), "check", "rules", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(rules)} rules found" in done.stdout
