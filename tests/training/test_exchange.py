"""The exchange between real processes: logits by network, and the errors that it raises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from switokd.runtime.placement import LocalPlacement, Placement
from switokd.training.exchange import Exchange
from tests.preloaded import call, run_script

# Runs on two ranks; `case` makes rank 1 differ. Prints each rank's logits or error.
SCRIPT = """
import json, os, sys, torch, torch.distributed as dist
from switokd.errors import SwitokdError
from switokd.training.exchange import Exchange
from switokd.runtime.placement import LocalPlacement, Placement

case = sys.argv[1]
dist.init_process_group("gloo")
rank = dist.get_rank()
differs = rank == 1
digest = "f" * 64 if differs and case == "digest" else "0" * 64
step = 8 if differs and case == "step" else 7
y = torch.tensor([1, 0, 2] if differs and case == "labels" else [0, 1, 2])
soft = case.startswith("soft")
if soft:
    y = torch.eye(4)[y] * 0.9 + 0.025
    y[2, 3] += 1e-7 if differs and case == "soft labels" else 0
z = torch.arange(12.0).view(3, 4) + 100 * rank
if differs and case == "nan":
    z[1, 1] = float("nan")
if differs and case == "gone":
    sys.exit(0)
z.requires_grad_()
try:
    placement = LocalPlacement(Placement.of({"t": [0], "s": [1]}), rank)
    exchange = Exchange(placement, digest, classes=4, soft_targets=soft)
    name = placement.networks[0]
    got = exchange(step, {name: z}, {name: y}, 3)
    exchange.check(got.health.tolist())
    outcome = {k: [v.tolist(), v.requires_grad] for k, v in got.logits.items()}
except SwitokdError as error:
    outcome = [type(error).__name__, str(error)]
os.write(1, (json.dumps({"rank": rank, "outcome": outcome}) + "\\n").encode())
"""


def outcomes(case: str, folder: Path) -> dict[int, Any]:
    (folder / "script.py").write_text(SCRIPT)
    _, out, err = call(folder, run_script, 2, "script.py", (case,))
    ranks = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert ranks, err
    return {rank["rank"]: rank["outcome"] for rank in ranks}


def test_every_rank_gets_every_networks_logits_detached(tmp_path: Path) -> None:
    base = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    shifted = [[v + 100 for v in row] for row in base]
    expected = {"t": [base, False], "s": [shifted, False]}
    assert outcomes("fine", tmp_path) == {0: expected, 1: expected}


@pytest.mark.parametrize(
    ("case", "kind", "words"),
    [
        ("step", "PeerError", "rank 1 (s) is at step 8, rank 0 at step 7"),
        ("digest", "PeerError", "rank 1 (s) was started with another configuration"),
        ("labels", "PeerError", "s (rank 1) has other labels than t (rank 0) at step 7"),
        ("soft labels", "PeerError", "s (rank 1) has other labels than t (rank 0) at step 7"),
        ("nan", "NonFiniteError", "network s (rank 1) has logits that are not finite at step 7"),
    ],
)
def test_both_ranks_name_the_rank_that_differs(
    case: str, kind: str, words: str, tmp_path: Path
) -> None:
    ranks = outcomes(case, tmp_path)
    assert ranks[0] == ranks[1]
    name, message = ranks[0]
    assert name == kind
    assert words in message


def test_a_rank_that_is_gone_is_noticed(tmp_path: Path) -> None:
    name, message = outcomes("gone", tmp_path)[0]
    assert name == "CollectiveError"
    assert "exchanging the logits of step 7" in message


# Three ranks; t is on two ranks with uneven shards, s on two ranks, u on one rank.
SHARDS = """
import json, os, sys, torch, torch.distributed as dist
from switokd.training.exchange import Exchange
from switokd.runtime.placement import LocalPlacement, Placement

dist.init_process_group("gloo")
rank = dist.get_rank()
table = Placement.of({"t": {0: 3, 1: 1}, "s": [1, 2], "u": [0]})
placement = LocalPlacement(table, rank)
soft = sys.argv[1] == "soft"
exchange = Exchange(placement, "0" * 64, classes=3, soft_targets=soft)
right = True
for step, n in enumerate((9, 4, 3, 2, 9), 1):
    y = torch.arange(3.0 * n).view(n, 3).softmax(1) if soft else torch.arange(n) % 3
    whole = {k: torch.arange(n * 3.0).view(n, 3) * (i + 1) for i, k in enumerate("tsu")}
    shards = {k: placement.shard(k, n) for k in placement.networks}
    z = {k: whole[k][s] for k, s in shards.items() if s.stop > s.start}
    got = exchange(step, z, {k: y[s] for k, s in shards.items()}, n)
    exchange.check(got.health.tolist())
    right &= torch.equal(got.y, y) and list(got.logits) == ["t", "s", "u"]
    right &= all(torch.equal(got.logits[k], whole[k]) for k in whole)
    labels = torch.arange(n) % 3
    got = exchange.for_labels()(step, z, {k: labels[s] for k, s in shards.items()}, n)
    right &= torch.equal(got.y, labels)
os.write(1, (json.dumps({"rank": rank, "right": right}) + "\\n").encode())
dist.destroy_process_group()
"""


@pytest.mark.parametrize("targets", ["labels", "soft"])
def test_shards_of_any_size_come_together(targets: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SHARDS)
    code, out, err = call(tmp_path, run_script, 3, "script.py", (targets,))
    assert code == 0, err
    ranks = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert sorted(rank["rank"] for rank in ranks) == [0, 1, 2]
    assert all(rank["right"] for rank in ranks)


@pytest.mark.parametrize("soft", [False, True])
def test_one_process_needs_no_process_group(soft: bool) -> None:
    """This includes rows of odd length: 3 networks, 3 classes, 3 samples."""
    names = ("t1", "t2", "s")
    placement = LocalPlacement(Placement.of({name: [0] for name in names}), 0)
    exchange = Exchange(placement, "0" * 64, classes=3, soft_targets=soft)
    for n in (3, 2, 1):
        y = torch.eye(3)[:n] if soft else torch.arange(n)
        z = {name: torch.full((n, 3), float(i)) for i, name in enumerate(names)}
        got = exchange(5, z, dict.fromkeys(names, y), n)
        exchange.check(got.health.tolist())
        assert torch.equal(got.y, y)
        for name in names:
            assert torch.equal(got.logits[name], z[name])
