"""Profile files: interpolation, reading and writing, errors for files that do not fit a run.

Not covered: predictions (`test_cost_model.py`); measuring (`test_profiler.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from switokd.config.optimizers import Adam
from switokd.config.sections import Network
from switokd.distillation.topology import Role
from switokd.errors import UsageError
from switokd.planning.cost_model import predict
from switokd.planning.pauses import Pauses
from switokd.planning.profile import Profile
from switokd.runtime.placement import Placement
from tests.planning.test_cost_model import BATCH, some_profile, ten_one_one, times


def test_times_between_and_beyond_the_measured_sizes() -> None:
    network = times(Role.STUDENT, 6).model_copy(
        update={"samples": (10, 20, 40), "forward_seconds": (2.0, 3.0, 7.0)}
    )
    assert [network.forward(n) for n in (0, 5, 10, 15, 30, 50)] == [0, 1.5, 2, 2.5, 5, 9]
    falling = network.model_copy(update={"forward_seconds": (9.0, 3.0, 2.0)})
    assert (
        falling.forward(80) == 2
    )  # measurement noise: more samples are never predicted to be faster
    single = network.model_copy(update={"samples": (10,), "forward_seconds": (2.0,)})
    assert single.forward(5) == 1


def test_errors_are_one_line(tmp_path: Path) -> None:
    profile = ten_one_one()
    networks = {"large": profile.networks["large"].model_copy(update={"frozen": True})}
    frozen = profile.model_copy(update={"networks": networks})
    (tmp_path / "text.json").write_text("no JSON")
    (tmp_path / "other.json").write_text('{"device": "cpu"}')
    torn = json.loads(profile.model_dump_json())
    torn["networks"]["large"]["forward_seconds"] = [1.0]
    (tmp_path / "torn.json").write_text(json.dumps(torn))
    for name, old, new in (
        ("misspelt", '"image"', '"images"'),
        ("endless", '"activation_bytes_per_sample": ', '"activation_bytes_per_sample": 1e300'),
        ("slow", '"bandwidth_bytes_per_second": ', '"bandwidth_bytes_per_second": 1e-300'),
        ("late", '"update_seconds": ', '"update_seconds": 1e100'),
    ):
        text = json.dumps(json.loads(profile.model_dump_json()), indent=1)
        line = next(line for line in text.splitlines() if old in line)
        comma = "," if line.endswith(",") else ""
        other = line.replace(old, new) if name == "misspelt" else f"{new}{comma}"
        (tmp_path / f"{name}.json").write_text(text.replace(line, other))
    cases: dict[str, Callable[[], object]] = {
        "images: Extra inputs are not permitted": lambda: Profile.load(tmp_path / "misspelt.json"),
        "activation_bytes_per_sample: Input should be less": (
            lambda: Profile.load(tmp_path / "endless.json")
        ),
        "bandwidth_bytes_per_second: Input should be gr": (
            lambda: Profile.load(tmp_path / "slow.json")
        ),
        "update_seconds: Input should be less": lambda: Profile.load(tmp_path / "late.json"),
        "the profile has no network huge": lambda: predict(
            profile, Placement.of({"huge": [0]}), BATCH, Pauses.none()
        ),
        "large is a teacher, mine:any, sgd in the profile, and a student, mine:any, sgd": (
            lambda: profile.check({"large": Network(role="student", model="mine:any")})
        ),
        "large is a teacher, mine:any, sgd, frozen in the profile, and a teacher, mine:any": (
            lambda: frozen.check({"large": Network(role="teacher", model="mine:any")})
        ),
        r'and a teacher, mine:any {"width": 4}, sgd in the run file; profile again': lambda: (
            profile.check(
                {"large": Network(role="teacher", model="mine:any", model_kwargs={"width": 4})}
            )
        ),
        "and a teacher, mine:any, adam in the run file; profile again": lambda: profile.check(
            {"large": Network(role="teacher", model="mine:any", optimizer=Adam(name="adam"))}
        ),
        "No such file": lambda: Profile.load(tmp_path / "none.json"),
        "text.json: not a profile": lambda: Profile.load(tmp_path / "text.json"),
        "device_memory_bytes|threads": lambda: Profile.load(tmp_path / "other.json"),
        "must be equally long": lambda: Profile.load(tmp_path / "torn.json"),
        "cannot be written": lambda: profile.save(tmp_path / "no" / "such.json"),
    }
    for words, call in cases.items():
        with pytest.raises(UsageError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_profile_of_a_gpu_must_use_cuda_graphs_for_the_same_networks_as_the_run() -> None:
    large, measured = Network(role="teacher", model="mine:any"), ten_one_one()
    eager = measured.model_copy(update={"device": "NVIDIA H200"})
    times = measured.networks["large"].model_copy(update={"cuda_graphs": True})
    graphed = eager.model_copy(update={"networks": {"large": times}})
    eager.check({"large": large})
    graphed.check({"large": large}, with_cuda_graphs=["large"])
    measured.check({"large": large}, with_cuda_graphs=["large"])  # a CPU has no CUDA graphs
    with pytest.raises(UsageError, match="large was profiled without CUDA graphs, and the run "):
        eager.check({"large": large}, with_cuda_graphs=["large"])
    with pytest.raises(
        UsageError, match=r"with CUDA graphs, and the run trains it without them \(comp"
    ):
        graphed.check({"large": large})


def test_profile_survives_its_file(tmp_path: Path) -> None:
    profile = some_profile(7)
    profile.save(tmp_path / "p.json")
    assert Profile.load(tmp_path / "p.json") == profile
    text = (tmp_path / "p.json").read_text()
    (tmp_path / "p.json").write_text("\ufeff" + text, encoding="utf-8")  # as some editors save it
    assert Profile.load(tmp_path / "p.json") == profile


def test_saved_profile_fits_the_networks_that_were_measured(tmp_path: Path) -> None:
    """Also with an infinite argument, and if a network that was trained is now frozen."""
    large = Network(role="teacher", model="mine:any", model_kwargs={"most": float("inf")})
    with_kwargs = (
        ten_one_one().networks["large"].model_copy(update={"model_kwargs": large.model_kwargs})
    )
    profile = ten_one_one().model_copy(update={"networks": {"large": with_kwargs}})
    profile.save(tmp_path / "p.json")
    Profile.load(tmp_path / "p.json").check({"large": large}, frozen_teachers=True)
