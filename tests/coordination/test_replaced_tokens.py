"""Tokens that are replaced in the middle of a run: its ranks wait for the new one, and go on.

Not covered: a coordinator that is lost for other reasons (`test_lost_coordinator.py`).
"""

from __future__ import annotations

from pathlib import Path

from tests.certificates import Certificates, serving
from tests.coordination.test_lost_coordinator import (
    assert_done,
    training,
    undisturbed,
    wait_for_step,
)
from tests.support import wait_until

__all__ = ["undisturbed"]  # a fixture

NEW = "the-token-of-the-next-month"


def test_a_token_that_is_replaced_while_a_run_goes_on(undisturbed: Path, tmp_path: Path) -> None:
    at_coordinator, at_ranks = Certificates(tmp_path / "a"), Certificates(tmp_path / "b")
    log = tmp_path / "log"
    options = at_coordinator.tokens("worker")
    with serving(tmp_path / "first", *options) as first:
        words = [f"coordinator.address={first.grpc}", *at_ranks.settings(ca="", token="worker")]
        port = first.grpc.rpartition(":")[2]
        with training(tmp_path, *words, "coordinator.on_loss=wait") as child:
            wait_for_step(tmp_path, child, 20)
            first.child.kill()
            first.child.wait(10)
            at_coordinator.write("worker.token", NEW.encode())
            with serving(tmp_path / "second", *options, f"--port={port}"):
                refused = "refuses this rank's token: the token is not one of this coordinator's"
                wait_until(
                    lambda: refused in log.read_text() or child.poll() is not None, 60, refused
                )
                at_ranks.write("worker.token", NEW.encode())
                assert_done(tmp_path, child, undisturbed)
    assert "is back after" in log.read_text()
    assert NEW not in log.read_text()
