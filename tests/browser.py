"""Control a headless Chromium over a pipe, to test what a page does."""

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
_NEEDED = (
    *("--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu"),
    *("--no-first-run", "--disable-background-networking", "--hide-scrollbars"),
)
# Chromium reads commands from descriptor 3 and answers on 4.
_LAUNCH = """
import os, sys
from fcntl import F_DUPFD, fcntl
read, write = (fcntl(int(number), F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
_LISTEN = """
window.violations = [];
addEventListener("securitypolicyviolation", (e) => violations.push(e.violatedDirective));
"""


class Page:
    """One page. `problems` holds console messages, exceptions and log entries of the browser."""

    def __init__(self, send: Any, receive: Any, numbers: Iterator[int]) -> None:
        self._send, self._receive, self._numbers = send, receive, numbers
        self._session: dict[str, str] = {}
        self.problems: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")
        self._call("Page.addScriptToEvaluateOnNewDocument", source=_LISTEN)

    def open(self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Show a file in a window of this size, and wait until the page is loaded."""
        mobile = width < 600
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[feature])
        self._call("Page.navigate", url=path.resolve().as_uri())
        while self.run("document.readyState") != "complete":
            pass

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press a key in the element that has the focus."""
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def picture(self, path: Path) -> None:
        """Save a screenshot of the window."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters, **self._session}
        self._send(message)
        while (answer := self._receive()).get("id") != number:
            self._note(answer)
        if "error" in answer:
            raise AssertionError(f"{method}: {answer['error']}")
        return answer["result"]

    def _note(self, event: dict[str, Any]) -> None:
        noted = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        if event.get("method") in noted:
            self.problems.append(json.dumps(event["params"]))


@contextmanager
def browsing(folder: Path) -> Iterator[Callable[[], Page]]:
    """Start a browser that keeps its files in `folder`, and return a function that opens pages."""
    assert CHROMIUM
    (child_reads, we_write), (we_read, child_writes) = os.pipe(), os.pipe()
    command = [CHROMIUM, *_NEEDED, f"--user-data-dir={folder}", "about:blank"]
    process = subprocess.Popen(
        [sys.executable, "-c", _LAUNCH, str(child_reads), str(child_writes), *command],
        pass_fds=(child_reads, child_writes),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(child_reads)
    os.close(child_writes)
    with open(we_write, "wb", buffering=0) as out, open(we_read, "rb") as back, process:

        def receive() -> dict[str, Any]:
            answer = bytearray()
            while (byte := back.read(1)) != b"\0":
                assert byte, "the browser has ended"
                answer += byte
            return json.loads(answer)

        def send(message: dict[str, Any]) -> None:
            out.write(json.dumps(message).encode() + b"\0")

        numbers = count()
        try:
            yield lambda: Page(send, receive, numbers)
        finally:
            process.kill()
