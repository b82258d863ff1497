"""A real Chromium that a test drives over a pipe, by its own debugging protocol.

Not covered: other browsers.
"""

from __future__ import annotations

import base64
import json
import os
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.support import kill_family, require

OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-default-apps", "--disable-extensions", "--disable-dev-shm-usage"),
    "--remote-debugging-pipe",
)
SECONDS = 60.0


class Browser:
    """One tab of a browser."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._rest = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []
        """What the browser has told by itself."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = str(attached["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **values: object) -> dict[str, Any]:
        """Give a command, and return its result."""
        self._number += 1
        message: dict[str, object] = {"id": self._number, "method": method, "params": values}
        if session := getattr(self, "_session", ""):
            message["sessionId"] = session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + SECONDS
        while True:
            answer = self._read(deadline)
            if answer.get("id") != self._number:
                self.events.append(answer)
                continue
            assert "error" not in answer, f"{method}: {answer['error']}"
            result: dict[str, Any] = answer["result"]
            return result

    def _read(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            left = deadline - time.monotonic()
            readable, _, _ = select.select([self._answers], [], [], max(left, 0))
            assert readable, "the browser does not answer"
            received = os.read(self._answers, 1 << 20)
            assert received, "the browser has ended"
            self._rest += received
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message

    def open(self, address: str, width: int = 1200, height: int = 900) -> None:
        """Open a page in a window of this size."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.call("Page.navigate", url=address)

    def prefer(self, **features: str) -> None:
        """Set what the reader prefers, such as prefers_color_scheme="dark"."""
        found = [{"name": k.replace("_", "-"), "value": v} for k, v in features.items()]
        self.call("Emulation.setEmulatedMedia", features=found)

    def value(self, expression: str) -> Any:
        """Return the value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def text(self, selector: str) -> str:
        """Return the text of an element; empty if there is none."""
        found = self.value(f"document.querySelector({json.dumps(selector)})?.innerText")
        return str(found or "")

    def wait(self, expression: str, seconds: float = SECONDS) -> Any:
        """Wait until an expression is true, and return its value."""
        deadline = time.monotonic() + seconds
        found = f"const found = {expression}; return found instanceof Node || found;"
        # The page may not be there yet.
        guarded = f"(() => {{ try {{ {found} }} catch {{ return null; }} }})()"
        while not (value := self.value(guarded)):
            shown = self.value("document.body?.innerText")
            assert time.monotonic() < deadline, f"never true: {expression}\n{shown}"
            time.sleep(0.1)
        return value

    def picture(self, path: Path, whole: bool = False) -> None:
        """Save what is shown as a PNG file. whole: also what is below the window."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def problems(self) -> list[str]:
        """Return what the console has, of errors and warnings."""
        found = []
        for event in self.events:
            values = event.get("params", {})
            if event.get("method") == "Log.entryAdded":
                if values["entry"]["level"] in ("error", "warning"):
                    found.append(str(values["entry"]["text"]))
            elif event.get("method") == "Runtime.exceptionThrown":
                found.append(json.dumps(values["exceptionDetails"]))
            elif event.get("method") == "Runtime.consoleAPICalled":
                found.append(json.dumps(values["args"]))
        return found

    def requests(self) -> set[str]:
        """Return what the page has asked the network for."""
        sent = (e for e in self.events if e.get("method") == "Network.requestWillBeSent")
        return {event["params"]["request"]["url"] for event in sent}


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Start a browser with a profile of its own."""
    chromium = require("chromium", "chromium")
    commands_in, commands_out = os.pipe()
    answers_in, answers_out = os.pipe()
    # The browser reads commands from descriptor 3, and answers on 4.
    script = f'exec 3<&{commands_in} 4>&{answers_out}; exec "$@"'
    command = ["bash", "-c", script, "bash", chromium, *OPTIONS]
    child = subprocess.Popen(
        [*command, f"--user-data-dir={folder / 'profile'}", "about:blank"],
        pass_fds=(commands_in, answers_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(commands_in)
    os.close(answers_out)
    try:
        yield Browser(commands_out, answers_in)
    finally:
        kill_family(child.pid)
        child.wait(10)
        for descriptor in (commands_out, answers_in):
            with suppress(OSError):
                os.close(descriptor)
