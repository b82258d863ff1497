"""Checks between the sections of a run file.

Each function raises ValueError with one sentence that names the settings and the remedy. The class
`Config` calls all of them, in the order of this file.

Not covered: checks inside one section (`sections.py`); whether data, networks and processes fit
together (`data`, `models`, `runtime`).
"""

from __future__ import annotations

from collections.abc import Mapping

from switokd.config.placement_setting import PlacementSetting
from switokd.config.sections import (
    Auto,
    Compute,
    Coordinator,
    Distillation,
    Network,
    PairSettings,
    Schedule,
)
from switokd.distillation.semantics import problem_of_semantics, problem_of_strategy
from switokd.distillation.strategies.base import Strategy
from switokd.distillation.topology import Topology
from switokd.errors import UsageError, nearest
from switokd.plugins import is_object
from switokd.services.coordinator.addresses import host_of, is_loopback

Networks = Mapping[str, Network]
"""A run's networks by name."""
Pairs = Mapping[str, Mapping[str, PairSettings]]
"""Settings of single pairs, by teacher and student."""


def check_names(networks: Networks) -> None:
    """ValueError if the names of two networks differ only in the case of letters."""
    known: dict[str, str] = {}
    for name in networks:
        other = known.setdefault(name.lower(), name)
        if other != name:
            raise ValueError(
                f"networks: {other} and {name} differ only in the case of letters, which some file "
                "systems ignore: their weights would be one file; rename one"
            )


def check_resume(resume: str, run_dir: str | None) -> None:
    """ValueError if a run is to be continued whose folder is not known."""
    if resume == "auto" and run_dir is None:
        raise ValueError("resume: auto needs run_dir, the folder of the run to continue")


def check_placement(placement: PlacementSetting, networks: Networks) -> None:
    """ValueError unless a table names every network once and `ranks` is used with dedicated."""
    spread = [name for name, network in networks.items() if network.ranks > 1]
    if spread and placement != "dedicated":
        raise ValueError(
            f"networks.{spread[0]}.ranks is for placement: dedicated; leave it out: "
            + (
                "the table names the ranks of every network"
                if isinstance(placement, dict)
                else f"{placement} chooses the ranks of every network"
            )
        )
    if not isinstance(placement, dict):
        return
    words = "placement: the table must name each network once"
    for name in placement:
        if name not in networks:
            hint = nearest(name, networks)
            raise ValueError(
                f"{words}: no network {name!r}{hint} (networks: {', '.join(networks)})"
            )
    for name in networks:
        if name not in placement:
            raise ValueError(f"{words}: {name} is missing")


def check_pairs(pairs: Pairs, networks: Networks) -> None:
    """ValueError unless every pair is a teacher and a student of the run."""
    for teacher, students in pairs.items():
        for student in students:
            for name, role in ((teacher, "teacher"), (student, "student")):
                allowed = [n for n, network in networks.items() if network.role == role]
                if name not in allowed:
                    raise ValueError(
                        f"pairs.{teacher}.{student}: no {role} {name!r}{nearest(name, allowed)} "
                        f"({role}s: {', '.join(allowed)}); a pair is {{TEACHER: {{STUDENT: ...}}}}"
                    )


def check_method(distillation: Distillation, topology: Topology, networks: Networks) -> None:
    """ValueError unless topology, semantics and strategy fit together.

    A strategy of the user's own is checked later, by `Config.method`: its module may not be
    importable yet.
    """
    problem = topology.problem() or problem_of_semantics(distillation.semantics, topology)
    if problem:
        raise ValueError(problem)
    if ":" not in distillation.strategy:
        try:
            check_strategy(distillation.make_strategy(), distillation, topology, networks)
        except UsageError as error:
            raise ValueError(str(error)) from None


def check_strategy(
    strategy: Strategy, distillation: Distillation, topology: Topology, networks: Networks
) -> None:
    """UsageError unless a strategy fits the semantics and, if it freezes them, the teachers.

    A frozen teacher needs trained weights: a file, or an object of the caller's program
    (`switokd.distil`), which may be trained.
    """
    if problem := problem_of_strategy(distillation.semantics, strategy):
        raise UsageError(f"distillation.semantics: {problem}")
    if not strategy.frozen_teachers:
        return
    for name in topology.teachers:
        network = networks[name]
        if network.weights is None and not is_object(network.model):
            raise UsageError(
                f"networks.{name}.weights: strategy {distillation.strategy} does not train its "
                "teachers; name the weights of a trained network (weights/NAME.pt of a run)"
            )
        if network.fresh_classifier:
            raise UsageError(
                f"networks.{name}.fresh_classifier: strategy {distillation.strategy} does not "
                "train its teachers, so that a fresh classifier would stay untrained; name weights "
                "for the classes of the data"
            )


def check_auto(auto: Auto, placement: PlacementSetting, topology: Topology) -> None:
    """ValueError if the section `auto` has no effect, contradicts itself or names no teacher."""
    changed = [key for key, value in auto if value != getattr(Auto(), key)]
    if changed and placement != "auto":
        raise ValueError(
            f"auto.{changed[0]} is for placement: auto; set placement=auto, or leave it out with "
            "auto={}"
        )
    if auto.run is not None and auto.paused is not None:
        raise ValueError("auto.run and auto.paused both give the teachers' pauses; set only one")
    teachers = topology.teachers
    for name in auto.paused if isinstance(auto.paused, dict) else ():
        if name not in teachers:
            raise ValueError(
                f"auto.paused: no teacher {name!r}{nearest(name, teachers)} (teachers: "
                f"{', '.join(teachers)})"
            )


def check_pairs_have_an_effect(pairs: Pairs, strategy: str) -> None:
    """ValueError if pairs are set for a KDCL strategy, which has one combined teacher."""
    if pairs and strategy.startswith("kdcl-"):
        raise ValueError(
            f"pairs: strategy {strategy} combines the logits of all networks into one teacher, so "
            "that settings of single pairs have no effect; leave pairs out"
        )


def check_coordinator(
    coordinator: Coordinator, placement: PlacementSetting, ranks: int | None
) -> None:
    """ValueError if a run of several ranks is to have no coordinator, or one without TLS.

    A coordinator on this machine needs no TLS, nor does one that `allow_plaintext` allows. ranks:
    number that the placement needs; None if any number fits.
    """
    if coordinator.address == "off" and ranks not in (None, 1):
        raise ValueError(
            f"coordinator: off is for a run of one process, and placement {placement} "
            f"needs {ranks}; leave it on auto, or set placement=replicated"
        )
    if coordinator.address in ("auto", "off") or coordinator.tls.ca:
        return
    addresses = coordinator.address.split(",")
    address = next((a.strip() for a in addresses if not is_loopback(host_of(a.strip()))), None)
    if address is None:
        return
    if coordinator.token_file:
        raise ValueError(
            f"coordinator.token_file: the token would go to {address} in plain text; set "
            "coordinator.tls.ca to the file with the coordinator's CA"
        )
    if not coordinator.allow_plaintext:
        raise ValueError(
            f"coordinator.address: {address} is another machine, and there is no TLS; set "
            "coordinator.tls.ca to the file with the coordinator's CA, or "
            "coordinator.allow_plaintext=true on a network where everyone is trusted"
        )


def check_compute(compute: Compute, device: str, accumulate: int) -> None:
    """ValueError if `compute` contradicts itself, the device or gradient accumulation."""
    if compute.batch_norm == "sync" and device == "cpu":
        raise ValueError(
            "compute.batch_norm: sync is for GPUs, and device is cpu; use batch_norm=rank"
        )
    if compute.cuda_graphs and accumulate > 1:
        raise ValueError(
            "compute.cuda_graphs: a captured backward pass cannot accumulate gradients; "
            "use schedule.accumulate=1 or compute.cuda_graphs=false"
        )
    if compute.cuda_graphs and compute.batch_norm == "sync":
        raise ValueError(
            "compute.batch_norm: sync cannot be captured; use batch_norm=rank or "
            "compute.cuda_graphs=false"
        )
    if compute.batch_norm == "sync" and compute.compile:
        # Ranks compile for the sizes of their own shards by real passes. With sync, such a pass
        # would wait for the network's other ranks, which may compile for other sizes.
        raise ValueError(
            "compute.batch_norm: sync cannot be compiled; use batch_norm=rank or compile=false"
        )


def check_micro_batches(compute: Compute, placement: PlacementSetting) -> None:
    """ValueError if another setting prevents the same bits on any number of ranks."""
    if compute.micro_batches == 1:
        return
    if placement == "auto":
        raise ValueError(
            "compute.micro_batches is for a placement that you choose; auto would measure, and may "
            "divide a batch unevenly; use dedicated, replicated or a table"
        )
    if compute.batch_norm == "sync":
        raise ValueError(
            "compute.micro_batches: BatchNorm computes its statistics from each micro-batch; use "
            "batch_norm=rank"
        )
    if compute.cuda_graphs:
        raise ValueError(
            "compute.cuda_graphs: a captured network cannot compute several micro-batches; use "
            "compute.micro_batches=1 or compute.cuda_graphs=false"
        )


def check_learning_rates(schedule: Schedule, networks: Networks) -> None:
    """ValueError if a network's learning rate starts below `schedule.min_lr`."""
    least = schedule.min_lr
    for name, network in networks.items():
        if network.optimizer.lr < least:
            raise ValueError(
                f"schedule.min_lr: {least:g} is more than the learning rate that {name} starts "
                f"with (networks.{name}.optimizer.lr: {network.optimizer.lr:g})"
            )
