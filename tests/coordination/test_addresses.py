"""One of several coordinators for each run: the same for everyone, and spread over all."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from switokd.config.run_file import load
from switokd.coordination.addresses import choose_address, split_addresses
from switokd.coordination.join import next_start

THREE = "one:50051,two:50051,three:50051"
RUNS = [f"digits-2t1s-{number:06x}" for number in range(600)]


def test_a_list_of_addresses_is_read() -> None:
    assert split_addresses("a:1, [::1]:65535") == ["a:1", "[::1]:65535"]
    for wrong in ("", "a", "a:", "a:1,", "a:0", "a:65536", "a b:1"):
        with pytest.raises(ValueError, match="HOST:PORT"):
            split_addresses(wrong)


def test_the_order_of_the_list_does_not_matter() -> None:
    reordered = "two:50051, three:50051,one:50051"
    assert [choose_address(THREE, run) for run in RUNS] == [
        choose_address(reordered, run) for run in RUNS
    ]
    assert choose_address("one:50051", "r") == "one:50051"


def test_the_runs_are_spread_over_all() -> None:
    counts = Counter(choose_address(THREE, run) for run in RUNS)
    assert all(150 < counts[address] < 250 for address in THREE.split(",")), counts


def test_another_coordinator_moves_only_the_runs_that_it_gets() -> None:
    for run in RUNS:
        chosen = choose_address(f"{THREE},four:50051", run)
        assert chosen in ("four:50051", choose_address(THREE, run))


def test_a_run_file_may_list_several_coordinators() -> None:
    config = load(
        "digits-2t1s", [f"coordinator.address={THREE}", "coordinator.allow_plaintext=true"]
    )
    assert config.coordinator.address == THREE


def test_a_run_notes_its_coordinator_and_keeps_it_when_it_starts_again(tmp_path: Path) -> None:
    run_id, epoch, address, secret = next_start(tmp_path, "mine", THREE)
    assert (epoch, address) == (1, choose_address(THREE, run_id))
    noted = json.loads((tmp_path / "run.json").read_text())
    assert noted.pop("secret") == secret.hex()
    assert noted == {"run_id": run_id, "epoch": 1, "coordinator": address}
    assert next_start(tmp_path, "mine", THREE) == (run_id, 2, address, secret)
    assert next_start(tmp_path, "mine", "four:1") == (run_id, 3, "four:1", secret)
