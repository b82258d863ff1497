"""What a request must be before any run sees it: small, readable, and within the limits.

A large plan is converted and checked in a thread, so that no rank waits for it. Ranks of one run
bring the same plan; it is converted once.

Not covered: whether a plan fits the run that exists (`ranks.py`); messages of a stream
(`session.py`).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from switokd.services.coordinator.limits import Limits, exceeded
from switokd.services.coordinator.messages import plan_from_wire
from switokd.services.coordinator.plan import Plan
from switokd.services.coordinator.refusal import Refusal
from switokd.v1 import coordinator_pb2 as pb

SMALL = 256
"""A plan with fewer numbers than this is converted at once, in less time than a thread takes."""
MOST_PLANS = 256
"""Converted plans that are kept for the other ranks of their runs."""

BYTES_PER_PAIR, BYTES_PER_REPORT = 100, 200
"""What a report needs beside the names, in the worst case."""

M = TypeVar("M", bound=Message)
INVALID = Refusal.Kind.INVALID_ARGUMENT


def parsed(message_type: type[M], data: bytes) -> M:
    """Return the message in `data`; Refusal if there is none."""
    try:
        return message_type.FromString(data)
    except DecodeError:
        name = message_type.DESCRIPTOR.name
        raise Refusal(INVALID, f"{len(data)} bytes that are no {name} message") from None


class Plans:
    """Reads the plans of Join requests."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._known: OrderedDict[bytes, Plan] = OrderedDict()
        # One thread: two would take more of the processor from the event loop.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="plans")

    async def read(self, request: pb.JoinRequest) -> Plan:
        """Return the checked plan of a request. Refusal if it is wrong or over a limit."""
        check_request(request, self._limits)
        numbers = sum(len(n.ranks) for n in request.plan.networks)
        if numbers + len(request.plan.switched_off) + len(request.plan.networks) ** 2 < SMALL:
            return self.convert(request.plan)
        key = hashlib.sha256(request.plan.SerializeToString(deterministic=True)).digest()
        if plan := self._known.get(key):
            return plan
        loop = asyncio.get_running_loop()
        plan = await loop.run_in_executor(self._thread, self.convert, request.plan)
        self._known[key] = plan
        if len(self._known) > MOST_PLANS:
            self._known.popitem(last=False)
        return plan

    def convert(self, message: pb.RunPlan) -> Plan:
        """Return the checked plan of a message whose own size is within the limits."""
        plan = plan_from_wire(message)
        limits, pairs = self._limits, len(plan.topology.pairs)
        if pairs > limits.max_pairs:
            raise exceeded(f"the run has {pairs} pairs", "max_pairs", limits.max_pairs, INVALID)
        if plan.part_count > limits.max_parts:
            what = f"the run's ranks report {plan.part_count} pairs per step"
            raise exceeded(what, "max_parts", limits.max_parts, INVALID)
        if (size := _report_size(plan)) > limits.max_report_bytes:
            what = f"a report of all pairs would have up to {size} bytes"
            raise exceeded(what, "max_report_bytes", limits.max_report_bytes, INVALID)
        plan.prepare()
        if (ranks := len(plan.networks_of)) > limits.max_ranks:
            raise exceeded(f"the run has {ranks} ranks", "max_ranks", limits.max_ranks, INVALID)
        return plan


def _report_size(plan: Plan) -> int:
    """Return the most bytes that a report, or a settled decision, of all pairs may have."""
    names = (len(p.teacher.encode()) + len(p.student.encode()) for p in plan.topology.pairs)
    return sum(names) + BYTES_PER_PAIR * len(plan.topology.pairs) + BYTES_PER_REPORT


def check_request(request: pb.JoinRequest, limits: Limits) -> None:
    """Refusal if a Join request is over a limit that can be seen without converting its plan."""
    plan = request.plan
    limits.check_name("the run", request.run_id)
    if request.epoch < 0:
        raise Refusal(INVALID, f"the epoch must be 0 or more, got {request.epoch}")
    if (networks := len(plan.networks)) > limits.max_networks:
        what = f"the run has {networks} networks"
        raise exceeded(what, "max_networks", limits.max_networks, INVALID)
    if len(plan.switched_off) > limits.max_networks**2:
        what = f"the run switches {len(plan.switched_off)} pairs off"
        raise exceeded(what, "max_networks", limits.max_networks, INVALID)
    if plan.round_timeout_seconds > limits.max_round_timeout:
        what = f"the run's timeout is {plan.round_timeout_seconds:g} seconds"
        raise exceeded(what, "max_round_timeout", limits.max_round_timeout, INVALID)
    if (length := len(plan.strategy_kwargs)) > limits.max_kwargs_length:
        what = f"the strategy's arguments have {length} characters"
        raise exceeded(what, "max_kwargs_length", limits.max_kwargs_length, INVALID)
    for what, text in (
        ("the strategy", plan.strategy),
        ("the semantics", plan.semantics),
        ("the configuration's digest", plan.config_digest),
    ):
        limits.check_name(what, text)
    for network in plan.networks:
        limits.check_name("a network", network.name)
        if (ranks := len(network.ranks)) > limits.max_ranks:
            what = f"network {network.name} has {ranks} ranks"
            raise exceeded(what, "max_ranks", limits.max_ranks, INVALID)
