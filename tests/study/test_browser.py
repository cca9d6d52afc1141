"""The report of a study in a real browser: it renders, complains of nothing, and asks nobody for anything."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.study.made_up import results
from trainer.study.page import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="neither chromium, chromium-browser nor google-chrome is installed"),
]

# Chromium reads its DevTools commands from descriptor 3 and answers on 4.
_START = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)
_WAIT_S = 60


class Browser:
    """A headless Chromium with one empty page, spoken to by the DevTools protocol over a pipe."""

    def __init__(self, folder: Path) -> None:
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # Out of the way of 3 and 4, which are about to be taken.
        ends = [os.dup(end) for end in (theirs_in, theirs_out, theirs_in, theirs_out)][2:]
        assert BROWSER is not None
        command = [
            BROWSER, "--headless", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu",
            "--disable-dev-shm-usage", f"--user-data-dir={folder}", "--window-size=1200,900",
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
        ]  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, *map(str, ends), *command],
            pass_fds=ends,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._session: str | None = None
        self._waiting, self._number = b"", 0
        self.events: list[dict[str, Any]] = []
        for end in {theirs_in, theirs_out, *ends}:
            os.close(end)
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """Gives a command, and its result. Events that come meanwhile are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return dict(answer["result"])

    def _next(self) -> dict[str, Any]:
        end_s = time.monotonic() + _WAIT_S
        while b"\0" not in self._waiting:
            ready, _, _ = select.select([self._in], [], [], max(0.0, end_s - time.monotonic()))
            data = os.read(self._in, 1 << 20) if ready else b""
            assert data, f"no answer from the browser (exit code {self._process.poll()})"
            self._waiting += data
        message, self._waiting = self._waiting.split(b"\0", 1)
        return dict(json.loads(message))

    def open(self, page: Path) -> None:
        """Loads a page, with all that belongs to it, and looks on for a moment longer."""
        self.events.clear()
        self.ask("Page.navigate", url=page.as_uri())
        while not self.of("Page.loadEventFired"):
            self.events.append(self._next())
        self.value("new Promise(done => setTimeout(done, 500))")

    def of(self, *methods: str) -> list[dict[str, Any]]:
        """What came of some events."""
        return [event["params"] for event in self.events if event.get("method") in methods]

    def value(self, expression: str) -> Any:
        """What JavaScript gives in the page."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def complaints(self) -> list[Any]:
        """What the console shows: messages, exceptions, and what the browser refused or missed."""
        return self.of("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")

    def requests(self) -> list[str]:
        """Addresses that were asked for, but those that are their own content."""
        urls = [event["request"]["url"] for event in self.of("Network.requestWillBeSent")]
        return [url for url in urls if not url.startswith("data:")]

    def photograph(self, file: Path) -> None:
        """The whole page as a PNG."""
        picture = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(picture["data"]))

    def close(self) -> None:
        """Ends it."""
        with contextlib.suppress(OSError):
            os.close(self._out)  # without its pipe it ends by itself
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._process.kill()
        self._process.wait()
        os.close(self._in)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """The report of a study whose names are hostile (see tests.study.made_up)."""
    return write_report(results(tmp_path))


# Of every picture: whether it is there, as an <img> or in the page itself.
_PICTURES = """[...document.querySelectorAll("img, figure > svg")].map(e => [
    e.tagName == "IMG" ? e.naturalWidth : e.getBBox().width, e.getBoundingClientRect().width, innerWidth])"""
_VISIBLE = """[...document.querySelectorAll(".verdict, h1, h2")]
    .filter(e => e.checkVisibility() && e.getClientRects().length).map(e => e.innerText)"""


def test_the_report_renders_and_asks_nobody(page: Path, browser: Browser, tmp_path: Path) -> None:
    browser.open(page)
    assert browser.complaints() == []
    assert browser.requests() == [page.as_uri()]
    assert browser.value("document.title").startswith("Scaling study: <script>alert")
    pictures = browser.value(_PICTURES)
    assert len(pictures) >= 2
    for natural, shown, window in pictures:
        assert natural > 0
        assert 200 < shown <= window
    # in view without opening anything
    visible = browser.value(_VISIBLE)
    assert "Verdicts" in visible
    assert {"material loss", "ruled out"} <= set(visible)
    browser.photograph(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000
    # a wide table scrolls by itself; the page does not, on a small screen either
    for width in (1200, 400):
        browser.ask("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
        assert browser.value("document.documentElement.scrollWidth") <= width


def test_the_browser_would_notice(tmp_path: Path, browser: Browser) -> None:
    """What the test above looks for, in a page that has all of it."""
    page = tmp_path / "bad.html"
    page.write_text('<img src="http://127.0.0.1:9/a.png"><img src="data:image/png;base64,AAAA"><script>no()</script>')
    browser.open(page)
    assert any("127.0.0.1:9" in url for url in browser.requests())
    assert any("no is not defined" in json.dumps(event) for event in browser.complaints())
    assert [natural for natural, _, _ in browser.value(_PICTURES)] == [0, 0]


def test_a_report_may_not_load_anything(page: Path, browser: Browser) -> None:
    """Its own policy stops what a mistake of ours would let through."""
    source = page.read_text()
    hostile = '<img src="http://127.0.0.1:9/a.png"><script>document.title = "mine"</script>'
    page.write_text(source.replace("</body>", f"{hostile}</body>"))
    browser.open(page)
    refused = {
        failed["requestId"] for failed in browser.of("Network.loadingFailed") if failed["blockedReason"] == "csp"
    }
    assert len(refused) == 1
    assert {r["requestId"] for r in browser.of("Network.responseReceived")}.isdisjoint(refused)
    assert "Content Security Policy" in json.dumps(browser.complaints())
    assert browser.value("document.title") != "mine"
