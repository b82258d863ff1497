"""A response goes to many streams in pieces, and each stream gets all of them in order.

Not covered: a rank that does not read (`test_attacks.py`).
"""

from __future__ import annotations

import asyncio

from switokd.services.coordinator.outbox import STREAMS_AT_ONCE, Outbox, RunStreams

MANY = 5 * STREAMS_AT_ONCE + 3


def run_with(count: int) -> tuple[RunStreams, list[Outbox]]:
    """The streams of a run with so many ranks."""
    streams, outboxes = RunStreams(), [Outbox() for _ in range(count)]
    for rank, outbox in enumerate(outboxes):
        streams.add(rank, outbox)
    return streams, outboxes


def waiting(outboxes: list[Outbox]) -> list[list[object]]:
    return [list(outbox._items) for outbox in outboxes]


def test_a_small_run_has_a_response_at_once_without_an_event_loop() -> None:
    streams, outboxes = run_with(STREAMS_AT_ONCE)
    streams.send(b"1")
    streams.send(b"2")
    assert waiting(outboxes) == [[b"1", b"2"]] * STREAMS_AT_ONCE


def test_a_large_run_has_it_in_pieces_and_the_loop_turns_in_between() -> None:
    async def send() -> list[int]:
        streams, outboxes = run_with(MANY)
        streams.send(b"1")
        counts = []
        while not all(waiting(outboxes)):
            counts.append(sum(map(bool, waiting(outboxes))))
            await asyncio.sleep(0)
        return counts

    assert asyncio.run(send()) == [n * STREAMS_AT_ONCE for n in range(1, 6)]


def test_every_stream_has_all_responses_in_order() -> None:
    async def send() -> list[list[object]]:
        streams, outboxes = run_with(MANY)
        for step in range(20):
            streams.send(b"%d" % step)
            if step % 3 == 0:
                await asyncio.sleep(0)
        for _ in range(50):
            await asyncio.sleep(0)
        return waiting(outboxes)

    assert asyncio.run(send()) == [[b"%d" % step for step in range(20)]] * MANY


def test_responses_do_not_pile_up() -> None:
    async def send() -> int:
        streams, _ = run_with(MANY)
        most = 0
        for step in range(500):
            streams.send(b"%d" % step)
            await asyncio.sleep(0)
            most = max(most, len(streams._unsent))
        return most

    assert asyncio.run(send()) < 10


def test_a_stream_that_opens_meanwhile_gets_only_what_is_sent_later() -> None:
    async def send() -> list[list[object]]:
        streams, outboxes = run_with(MANY)
        streams.send(b"1")
        late = Outbox()
        streams.add(MANY - 1, late)  # it has got decision 1 from its attach
        streams.send(b"2")
        for _ in range(20):
            await asyncio.sleep(0)
        return waiting([outboxes[0], late])

    assert asyncio.run(send()) == [[b"1", b"2"], [b"2"]]
