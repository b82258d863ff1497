"""The status page of a real coordinator over real sockets: documents, streams, access, limits.

Not covered: what a browser shows (`test_status_page_in_browser.py`).
"""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from urllib.parse import quote

import pytest
from prometheus_client import CollectorRegistry

from switokd.services.coordinator import http_server
from switokd.services.coordinator.http_answer import TEXT, Answer, HttpRequest, Send
from switokd.services.coordinator.status_page.pages import STATIC
from switokd.v1 import coordinator_pb2 as pb
from tests.services.live import Coordinator, coordinator, plan
from tests.services.page import LEARNS, PAUSES, TOKEN, Events, Run, ask
from tests.support import wait_until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    with coordinator(tmp_path_factory.mktemp("page")) as started:
        yield started


@pytest.fixture(scope="module")
def run(server: Coordinator) -> Iterator[Run]:
    """A run of 20 steps that goes on."""
    made = Run(server)
    made.train(*[LEARNS] * 12, *[PAUSES] * 8)
    made.measure(0.75)
    path = f"/api/runs/{made.run_id}/history"
    wait_until(lambda: ask(server, path).document["marks"]["value"], 10, "the accuracy")
    yield made
    made.close()


def test_the_pages_hold_no_data_and_ask_nobody_else(server: Coordinator, run: Run) -> None:
    for path in ("/", f"/runs/{run.run_id}", "/runs/another"):
        answer = ask(server, path)
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
        assert run.run_id.encode() not in answer.body
        policy = answer.headers["Content-Security-Policy"]
        for rule in ("default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"):
            assert rule in policy
        assert "unsafe" not in policy
    for file in STATIC.iterdir():
        answer = ask(server, f"/static/{file.name}")
        assert (answer.status, answer.body) == (200, file.read_bytes())
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert "Access-Control-Allow-Origin" not in answer.headers
        urls = re.findall(rb"https?://[^\"' )]+", file.read_bytes())
        assert set(urls) <= {b"http://www.w3.org/2000/svg"}, "only the name of SVG is no request"
        assert b"innerHTML" not in file.read_bytes()


def test_the_documents_of_a_live_run_without_a_journal(server: Coordinator, run: Run) -> None:
    listed = {found["run_id"]: found for found in ask(server, "/api/runs").document["runs"]}
    assert listed[run.run_id]["state"] == "training"
    assert [n["name"] for n in listed[run.run_id]["networks"]] == ["t", "s"]

    status = ask(server, f"/api/runs/{run.run_id}").document
    assert (status["state"], status["last_step"], status["connected_ranks"]) == ("training", 20, 2)
    assert status["pairs"][0]["mode"] == "expert"
    assert [n["reason"] for n in status["networks"]] == ["gap_too_large", None]

    history = ask(server, f"/api/runs/{run.run_id}/history").document
    assert history["step"] == list(range(1, 21))
    (pair,) = history["pairs"]
    assert pair["gap"] == pytest.approx([0.1] * 12 + [2.0] * 8)
    assert sum(pair["learning"]) == 12
    (teacher,) = history["teachers"]
    assert {reason: sum(counts) for reason, counts in teacher["reasons"].items()} == {
        "gap_within_threshold": 12,
        "gap_too_large": 8,
    }
    assert history["marks"]["value"] == [0.75]
    assert [event["kind"] for event in history["events"]] == ["new", "connected"]
    cursor = history["cursor"]
    news = ask(server, f"/api/runs/{run.run_id}/history?since={cursor}").document
    assert (news["from"], news["step"], news["events"]) == (19, [20], [])


def test_head_has_no_body(server: Coordinator, run: Run) -> None:
    paths = ("/", "/static/page.css", "/api/runs", f"/api/runs/{run.run_id}/events")
    for path in paths * 10:  # a stream's place is given back
        answer = ask(server, path, "HEAD")
        assert (answer.status, answer.body) == (200, b"")


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/nothing", 404),
        ("/runs/", 404),
        ("/runs/a/b", 404),
        ("/static/../pages.py", 404),
        ("/static/%2e%2e/pages.py", 404),
        ("/static/", 404),
        ("/api", 404),
        ("/api/", 404),
        ("/api/runs/", 404),
        ("/api/runs/nobody", 404),
        ("/api/runs/nobody/history", 404),
        ("/api/runs/nobody/events", 404),
        ("/api/runs/nobody/other", 404),
        ("/api/runs/nobody/history/more", 404),
        (f"/api/runs/{'x' * 201}", 404),
        (f"/api/runs/{'x' * 5000}", 404),
        ("/api/runs/%ff%fe", 404),
        ("/api/runs/a%00b", 404),
        ("/api/runs/%", 404),
        ("//api/runs", 404),
        ("/api/runs?x=%zz", 200),
    ],
)
def test_what_is_not_there(server: Coordinator, path: str, status: int) -> None:
    assert ask(server, path).status == status


def test_only_reading_is_allowed(server: Coordinator) -> None:
    assert ask(server, "/api/runs", "POST").status == 405
    assert ask(server, "/api/runs", "OPTIONS", Origin="http://other.example").status == 405


def test_an_id_with_every_kind_of_character(server: Coordinator) -> None:
    run_id = "a b/c?d#e%f<script>alert(1)</script>é&\"'"
    made = Run(server, run_id)
    made.train(LEARNS)
    path = f"/api/runs/{quote(run_id, safe='')}"
    assert ask(server, path).document["run_id"] == run_id
    assert ask(server, f"{path}/history").document["step"] == [1]
    assert ask(server, f"/runs/{quote(run_id, safe='')}").status == 200
    made.end()


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "attacker.example"},
        {"Host": "attacker.example:9464"},
        {"Host": "127.0.0.1.attacker.example"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Origin": "http://attacker.example"},
        {"Origin": "null"},
    ],
)
def test_pages_of_other_sites_get_nothing(
    server: Coordinator, run: Run, headers: dict[str, str]
) -> None:
    for path in ("/", "/api/runs", f"/api/runs/{run.run_id}/events"):
        answer = ask(server, path, **headers)
        assert answer.status == 403
        assert run.run_id.encode() not in answer.body
        assert "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.parametrize(
    "host", ["localhost:1", "127.0.0.1", "[::1]:9", "10.1.2.3:9464", "coordinator:9464", "c.ns.svc"]
)
def test_names_of_this_machine_and_of_a_cluster_are_answered(
    server: Coordinator, host: str
) -> None:
    assert ask(server, "/api/runs", Host=host, Sec_Fetch_Site="same-origin").status == 200
    assert ask(server, "/api/runs", Host=host, Origin=f"http://{host}").status == 200


def test_a_stream_tells_what_happens_at_once_and_ends_with_the_run(server: Coordinator) -> None:
    made = Run(server)
    made.train(LEARNS)
    events = Events(server, f"/api/runs/{made.run_id}/events")
    assert events.response.headers["Content-Type"] == "text/event-stream"
    first = events.until("history")
    assert first["step"] == [1]
    assert events.until("status")["last_step"] == 1
    made.train(PAUSES)
    news = events.until("history")
    assert (news["from"], news["step"]) == (0, [1, 2])
    resumed_at = events.last_id
    made.train(LEARNS)
    saved = pb.Progress(step=3, run=pb.RunProgress(checkpoints=1))
    made.streams[0].send(progress=saved)
    made.end()
    assert events.until("status")["last_step"] >= 2
    kinds = []
    while (event := events.next())[0]:
        kinds.append(event[0])
        if event[0] == "status":
            assert event[1]["last_step"] == 3
            last_state = event[1]["state"]
    assert kinds[-1] == "end"
    assert last_state == "finished"
    again = Events(server, f"/api/runs/{made.run_id}/events", Last_Event_ID=resumed_at)
    missed = again.until("history")
    assert (missed["from"], missed["step"]) == (1, [2, 3])
    assert [event["kind"] for event in missed["events"]] == ["checkpoint", "finished"]
    assert again.until("status")["state"] == "finished"
    assert again.next()[0] == "end"
    for reader in (events, again):
        reader.close()


def test_a_stream_of_the_list_sends_a_new_run(server: Coordinator) -> None:
    events = Events(server, "/api/events")
    events.until("runs")
    made = Run(server)
    wait_until(
        lambda: made.run_id in {run["run_id"] for run in events.until("runs")["runs"]},
        10,
        "the new run",
    )
    made.end("out of memory <b>here</b>")
    found = wait_until(
        lambda: [r for r in events.until("runs")["runs"] if r["failure"]], 10, "the failure"
    )
    assert "out of memory <b>here</b>" in found[0]["failure"]
    events.close()


def test_a_quiet_run_is_shown_to_be_alive(server: Coordinator, run: Run) -> None:
    events = Events(server, f"/api/runs/{run.run_id}/events")
    events.until("status")
    for _ in range(2):  # what the ranks do is sent again, also if no step is decided
        assert events.until("status")["last_step"] == run.step
    events.close()


def test_readers_are_limited_and_their_places_come_back(tmp_path: Path) -> None:
    with coordinator(tmp_path, "--max-page-streams", "3") as under_test:
        made = Run(under_test)
        path = f"/api/runs/{made.run_id}/events"
        readers = [Events(under_test, path) for _ in range(3)]
        assert {reader.response.status for reader in readers} == {200}
        refused = ask(under_test, path)
        assert (refused.status, refused.headers["Retry-After"]) == (503, "5")
        assert "--max-page-streams" in refused.document["error"]
        assert ask(under_test, "/healthz").status == ask(under_test, "/api/runs").status == 200
        for reader in readers:
            reader.close()

        def is_free() -> bool:
            reader = Events(under_test, path)
            try:
                return reader.response.status == 200
            finally:
                reader.close()

        wait_until(is_free, 20, "a place is free again")
        made.end()


class Endless:
    """A page that sends without end."""

    def __init__(self) -> None:
        self.has_ended = threading.Event()

    def answer(self, request: HttpRequest) -> Answer:
        return Answer(HTTPStatus.OK, TEXT, b"", "", self._send, self.has_ended.set)

    def _send(self, send: Send) -> None:
        while True:
            send(b"x" * 65536)


def test_a_reader_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "SEND_SECONDS", 0.5)
    pages = Endless()
    port, serving = http_server.serve_http(CollectorRegistry(), "127.0.0.1", 0, pages=pages)
    lazy = socket.create_connection(("127.0.0.1", port))
    lazy.sendall(b"GET /endless HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert pages.has_ended.wait(20)
    lazy.close()
    serving.shutdown()
    serving.server_close()


def test_the_page_asks_for_a_token_where_the_metrics_do(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    with coordinator(tmp_path, "--metrics-token-file", "token") as under_test:
        made = Run(under_test)
        made.train(LEARNS)
        paths = ["/api/runs", "/api/events"]
        paths += [f"/api/runs/{made.run_id}{end}" for end in ("", "/history", "/events")]
        wrong = [{}, {"Authorization": "Bearer wrong"}, {"Cookie": f"token={TOKEN}"}]
        for path in paths:
            for headers in wrong:
                answer = ask(under_test, path, **headers)
                assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
                assert made.run_id.encode() not in answer.body
            assert ask(under_test, f"{path}?token={TOKEN}").status == 401
        assert ask(under_test, "/api/runs/nobody").status == 401, "nor whether a run is there"
        for path in ("/", f"/runs/{made.run_id}", "/static/run.js"):
            assert ask(under_test, path).status == 200
        right = {"Authorization": f"Bearer {TOKEN}"}
        assert ask(under_test, "/api/runs", **right).status == 200
        assert ask(under_test, "/api/runs", Host="status.example.org", **right).status == 200
        events = Events(under_test, f"/api/runs/{made.run_id}/events", **right)
        assert events.until("status")["last_step"] == 1
        events.close()
        made.end()


def test_a_finished_run_comes_from_the_journal_also_of_another_coordinator(tmp_path: Path) -> None:
    options = ("--forget-after", "0")
    with coordinator(tmp_path, *options, journal=True) as under_test:
        made = Run(under_test)
        made.train(*[LEARNS] * 5, *[PAUSES] * 5)
        made.measure(0.5)
        path = f"/api/runs/{made.run_id}"
        events = Events(under_test, f"{path}/events")
        wait_until(lambda: events.until("history")["marks"]["value"] == [0.5], 10, "the accuracy")
        events.close()
        made.end("the disk is full")
        wait_until(lambda: _is_from_journal(under_test, path), 10, "the run is forgotten")
        check_finished(under_test, path)
    with coordinator(tmp_path, *options, journal=True) as under_test:
        listed = ask(under_test, "/api/runs").document["runs"]
        assert [(run["run_id"], run["state"]) for run in listed] == [(made.run_id, "failed")]
        check_finished(under_test, path)
        events = Events(under_test, f"{path}/events")
        assert len(events.until("history")["step"]) == 10
        assert "disk is full" in events.until("status")["failure"]
        assert events.next()[0] == "end"
        events.close()


def _is_from_journal(under_test: Coordinator, path: str) -> bool:
    """Whether the coordinator's memory has let go of a run that has ended."""
    metrics = ask(under_test, "/metrics").body.decode()
    answer = ask(under_test, path)
    return path.rpartition("/")[2] not in metrics and answer.status == 200


def check_finished(under_test: Coordinator, path: str) -> None:
    status = ask(under_test, path).document
    assert (status["state"], status["last_step"]) == ("failed", 10)
    history = ask(under_test, f"{path}/history").document
    assert history["step"] == list(range(1, 11))
    assert sum(history["pairs"][0]["learning"]) == 5
    assert history["marks"]["value"] == [0.5]
    assert [event["kind"] for event in history["events"]][-1] == "failed"


def test_a_live_run_keeps_its_history_over_a_new_coordinator(tmp_path: Path) -> None:
    with coordinator(tmp_path, journal=True, may_end=True) as under_test:
        made = Run(under_test)
        made.train(*[LEARNS] * 30)
        made.measure(0.25)
        path = f"/api/runs/{made.run_id}"
        wait_until(
            lambda: ask(under_test, f"{path}/history").document["marks"]["value"], 10, "accuracy"
        )
        wait_until(lambda: ask(under_test, path).document["recorded_step"] == 30, 10, "journal")
        _stop(under_test)
        made.close()
    with coordinator(tmp_path, journal=True) as under_test:
        history = ask(under_test, f"{path}/history").document
        assert history["step"] == list(range(1, 31))
        assert history["marks"]["value"] == [0.25]
        kinds = [event["kind"] for event in history["events"]]
        assert kinds[:2] == ["new", "connected"]
        assert kinds[-1] == "coordinator"


def _stop(under_test: Coordinator) -> None:
    """Stop a coordinator as an upgrade does; its readers are told."""
    events = Events(under_test, "/api/events")
    events.until("runs")
    os.kill(under_test.pid, signal.SIGTERM)
    assert events.until("stopping") == {}
    events.close()


def test_a_run_that_starts_again_is_shown_as_one(server: Coordinator) -> None:
    made = Run(server)
    made.train(*[LEARNS] * 6)
    request = pb.JoinRequest(run_id=made.run_id, rank=0, plan=plan(first_step=4), epoch=2)
    server.stub.Join(request, timeout=20)
    history = ask(server, f"/api/runs/{made.run_id}/history").document
    assert history["step"] == [1, 2, 3]
    assert [e["text"] for e in history["events"] if e["kind"] == "restart"] == [
        "start 2, from step 4 on"
    ]
    made.close()
