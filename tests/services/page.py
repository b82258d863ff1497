"""A reader of the status page over real sockets, and a run for it to show.

Not covered: a browser (`browser.py`).
"""

from __future__ import annotations

import http.client
import json
from typing import Any

from switokd.v1 import coordinator_pb2 as pb
from tests.services.live import Coordinator, Stream, sums

LEARNS, PAUSES = (0.1, 1.0, 0.9), (2.0, 1.0, 0.1)
TOKEN = "a-token-of-24-characters"


class Response:
    """An answer with its body, which is JSON or not."""

    def __init__(self, raw: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.body = raw.status, raw.headers, raw.read()

    @property
    def document(self) -> Any:
        return json.loads(self.body)


def ask(under_test: Coordinator, path: str, method: str = "GET", **headers: str) -> Response:
    host, _, port = under_test.http.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, headers=named)
    try:
        return Response(connection.getresponse())
    finally:
        connection.close()


class Events:
    """A reader of server-sent events."""

    def __init__(self, under_test: Coordinator, path: str, **headers: str) -> None:
        host, _, port = under_test.http.rpartition(":")
        self.connection = http.client.HTTPConnection(host, int(port), timeout=20)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.connection.request("GET", path, headers=named)
        self.response = self.connection.getresponse()
        self.last_id = ""
        self.comments = 0

    def next(self) -> tuple[str, Any]:
        """The next event and its data; ("", None) at the end."""
        event = data = ""
        while line := self.response.readline().decode():
            name, _, value = line.rstrip("\n").partition(": ")
            if name == "event":
                event = value
            elif name == "id":
                self.last_id = value
            elif name == "data":
                data = value
            elif line.startswith(":"):
                self.comments += 1
            elif line == "\n" and data:
                return event, json.loads(data)
        return "", None

    def until(self, wanted: str) -> Any:
        """The data of the next event of this name."""
        while True:
            event, data = self.next()
            assert event, f"the stream has ended before {wanted}"
            if event == wanted:
                return data

    def close(self) -> None:
        self.response.close()
        self.connection.close()


class Run:
    """A run of a teacher and a student, step by step."""

    def __init__(self, under_test: Coordinator, run_id: str = "") -> None:
        self.run_id = run_id or under_test.new_run()
        if run_id:
            for rank in (0, 1):
                under_test.join(run_id, rank)
        self.streams = [Stream(under_test.address).attach(self.run_id, r) for r in (0, 1)]
        self.step = 0

    def train(self, *distances: tuple[float, float, float]) -> None:
        teacher, student = self.streams
        for found in distances:
            self.step += 1
            received = self.step - 1
            student.send(report=pb.Report(step=self.step, received_step=received))
            pairs = [sums(*found)]
            teacher.send(report=pb.Report(step=self.step, pairs=pairs, received_step=received))
            for stream in self.streams:
                assert next(stream.call).decision.step == self.step

    def measure(self, accuracy: float) -> None:
        progress = pb.Progress(step=self.step, test_accuracy=accuracy, network="s")
        self.streams[1].send(progress=progress)

    def end(self, failure: str = "", stopped: bool = False) -> None:
        for stream in self.streams[: 1 if failure else 2]:
            stream.send(leave=pb.Leave(failure=failure, stopped=stopped))
            stream.end()
        self.close()

    def close(self) -> None:
        for stream in self.streams:
            stream.close()
