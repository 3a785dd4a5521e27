"""The live page: same view as the report, over server-sent events, to many who look and to nobody without the token."""

import http.client
import json
import shutil
import socket
import struct
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from stageflow import Engine, PipelineBuilder
from stageflow.events.event import Event
from stageflow.report.html import render_body
from stageflow.report.live import LivePage


@pytest.fixture
def live() -> Iterator[LivePage]:
    with LivePage(interval=0.02) as made:
        yield made


def get(url: str) -> tuple[int, str, str]:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return answer.status, answer.headers["Content-Type"], answer.read().decode()


class Follower:
    """Reads server-sent events."""

    def __init__(self, live: LivePage) -> None:
        parts = urlsplit(live.url)
        self.connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=20)
        self.connection.request("GET", f"{parts.path}events")
        self.answer = self.connection.getresponse()
        assert self.answer.status == 200
        assert self.answer.headers["Content-Type"].startswith("text/event-stream")

    def next(self) -> tuple[str, dict[str, str]]:
        kind = data = ""
        while True:
            line = self.answer.readline().decode().rstrip("\n")
            if line.startswith("event: "):
                kind = line[7:]
            elif line.startswith("data: "):
                data = line[6:]
            elif not line and kind:
                read: dict[str, str] = json.loads(data)
                return kind, read

    def close(self) -> None:
        self.answer.close()
        self.connection.close()


def test_the_page_is_the_report_and_may_connect_only_to_itself(live: LivePage, docs_run: list[Event]) -> None:
    for event in docs_run:
        live.emit(event)
    status, kind, text = get(live.url)
    assert (status, kind) == (200, "text/html; charset=utf-8")
    assert render_body(live._fold) in text
    assert "connect-src 'self'" in text
    assert live.url.startswith("http://127.0.0.1:")
    assert len(live.token) >= 24


def test_without_the_token_there_is_nothing_and_nothing_can_be_changed(live: LivePage) -> None:
    parts = urlsplit(live.url)
    for path in ("/", "/x/", "/x/events", f"/{live.token}/other", f"/{live.token[:-1]}/"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(f"http://{parts.netloc}{path}")
    request = urllib.request.Request(live.url, data=b"x", method="POST")
    with pytest.raises(urllib.error.HTTPError, match="501"):
        urllib.request.urlopen(request, timeout=20)


def test_followers_get_each_state_and_the_end(docs_run: list[Event]) -> None:
    live = LivePage(interval=0.02)
    follower = Follower(live)
    live.emit(docs_run[0])
    kind, data = follower.next()
    while "running" not in data["title"]:
        kind, data = follower.next()
    assert (kind, data["title"]) == ("body", "docs: running")
    for event in docs_run[1:]:
        live.emit(event)
    live.close()
    kinds: list[str] = []
    last = data
    while not kinds or kinds[-1] != "end":
        kind, data = follower.next()
        kinds.append(kind)
        if kind == "body":
            last = data
    assert last["title"] == "docs: completed"
    assert "&lt;script&gt;" in last["html"]
    follower.close()


def test_a_hundred_clients_and_a_silent_one_do_not_disturb_the_run(live: LivePage, docs_run: list[Event]) -> None:
    live.emit(docs_run[0])
    followers = [Follower(live) for _ in range(100)]
    assert {f.next()[0] for f in followers} == {"body"}
    started = time.thread_time()  # a hundred threads that draw and send take the cores in turn
    for event in docs_run[1:]:
        live.emit(event)
    assert (time.thread_time() - started) / len(docs_run) < 0.02
    for follower in followers[:50]:
        follower.close()  # browsers are closed without a word
    for follower in followers[50:]:
        while "completed" not in follower.next()[1]["title"]:
            pass
        follower.close()


def test_nothing_is_drawn_while_nobody_looks(live: LivePage, docs_run: list[Event]) -> None:
    for event in docs_run:
        live.emit(event)
    assert live._number == 0
    assert live.clients == 0


def test_the_next_run_replaces_one_that_ended(live: LivePage, docs_run: list[Event]) -> None:
    for event in docs_run:
        live.emit(event)
    live.emit(Event("run.started", 1, 0, "run-2", data={"pipeline": "second", "stages": ["a"]}))
    assert "second" in get(live.url)[2]


def test_closing_twice_frees_the_port_and_the_threads() -> None:
    live = LivePage()
    url = live.url
    live.close()
    live.close()
    with pytest.raises(OSError):
        get(url)
    assert not [t for t in threading.enumerate() if t.name.startswith("stageflow-live")]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_follows_the_run(live: LivePage, docs_run: list[Event], tmp_path: Path) -> None:
    for event in docs_run[:40]:
        live.emit(event)

    def rest() -> None:
        while not live.clients:
            time.sleep(0.01)
        for event in docs_run[40:]:
            live.emit(event)
        live.close()  # the browser's virtual time stands still while it waits for a stream to end

    thread = threading.Thread(target=rest)
    thread.start()
    done = subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--no-first-run",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr",
            "--v=0",
            "--virtual-time-budget=2000",
            "--dump-dom",
            live.url,
        ],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    thread.join(20)
    assert "CONSOLE" not in done.stderr
    assert "<title>docs: completed</title>" in done.stdout
    assert "&lt;script&gt;alert(1)" in done.stdout


def test_a_browser_that_goes_away_in_the_middle_of_a_run_is_not_noticed_by_it(live: LivePage) -> None:
    """One client resets its connection, one closes it, one stays and sees the end of the same run."""
    gate = threading.Event()

    def numbers() -> Iterator[int]:
        yield from range(50)
        assert gate.wait(30)
        yield from range(50, 100)

    def double(numbers: int) -> int:
        return 2 * numbers

    graph = PipelineBuilder("followed").stage("numbers", numbers).map("double", double, over="numbers").build()
    seen: list[str] = []
    problems: list[BaseException] = []

    def browse() -> None:
        try:
            stays, closes = Follower(live), Follower(live)
            parts = urlsplit(live.url)
            resets = socket.create_connection((parts.hostname or "", parts.port or 0))
            resets.sendall(f"GET {parts.path}events HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode())
            assert resets.recv(100)
            while "running" not in stays.next()[1]["title"]:
                pass
            closes.next()
            closes.close()
            reset = struct.pack("ii", 1, 0)  # no farewell: what is on its way is thrown away
            resets.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            resets.close()
            gate.set()
            while not seen or "completed" not in seen[-1]:
                seen.append(stays.next()[1]["title"])
            stays.close()
        except BaseException as error:
            problems.append(error)
        finally:
            gate.set()

    browser = threading.Thread(target=browse)
    browser.start()
    with Engine(processes=1) as engine:
        result = engine.run(graph, event_sinks=[live])
    browser.join(30)
    assert (result.success, problems, browser.is_alive()) == (True, [], False)
    assert seen[-1] == "followed: completed"
    assert result.stats["double"].items_out == 100
