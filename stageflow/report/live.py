"""The report while the run goes on: a page on loopback, kept up to date by server-sent events.

Read-only, behind a random token in its path. One thread draws the page a few times a second, and only while somebody
looks; every client gets the same bytes. The run's own thread does nothing but fold events.
"""

from __future__ import annotations

import hmac
import http.server
import json
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from stageflow.events import names
from stageflow.events.event import Event
from stageflow.report.fold import ReportFold
from stageflow.report.html import render_body, render_page

#: Seconds between two versions of the page.
INTERVAL: Final = 0.5
#: A version that took this long to draw is followed by at least four times as long a pause.
_PAUSE: Final = 4.0
#: Clients beyond this are turned away (503).
MAX_CLIENTS: Final = 256
_KEEP_ALIVE: Final = 15.0

LIVE_SCRIPT: Final = """
(function(){
 var seen=new EventSource("events"),body=document.getElementById("body"),gone=document.createElement("p");
 gone.className="why";gone.hidden=true;gone.textContent="The run's page is no longer served: this is its last state.";
 body.parentNode.insertBefore(gone,body);
 seen.addEventListener("body",function(e){
  gone.hidden=true;
  var d=JSON.parse(e.data),open=[].map.call(body.querySelectorAll("details"),function(x){return x.open}),
   left=[].map.call(body.querySelectorAll(".scroll"),function(x){return x.scrollLeft});
  body.innerHTML=d.html;document.title=d.title;
  [].forEach.call(body.querySelectorAll("details"),function(x,i){x.open=!!open[i]});
  [].forEach.call(body.querySelectorAll(".scroll"),function(x,i){x.scrollLeft=left[i]||0});
 });
 seen.addEventListener("end",function(){seen.close()});
 seen.onerror=function(){gone.hidden=false};
})();
"""


class LivePage:
    """A sink and a server: attach it to a run and open `url`.

    `port` 0 takes a free one. The server binds to loopback only. `close(linger=...)` keeps the last state up for that
    many seconds, so that an open page shows the end. A client that reads slowly holds up its own thread, never the run.
    """

    def __init__(
        self,
        *,
        port: int = 0,
        host: str = "127.0.0.1",
        interval: float = INTERVAL,
        graph: str | None = None,
        saved: Callable[[Event], Any] | None = None,
    ) -> None:
        self.token = secrets.token_urlsafe(24)
        self._fold = ReportFold(saved)
        self._graph = graph
        self._interval = interval
        self._lock = threading.Lock()
        self._version = threading.Condition()
        self._number = 0
        self._frame = b""
        self._drawn_events = -1
        self._clients = 0
        self._closing = False
        self._server = _Server((host, port), _handler(self))
        self._server_thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="stageflow-live", daemon=True
        )
        self._drawer = threading.Thread(target=self._draw_loop, name="stageflow-live-draw", daemon=True)
        self._server_thread.start()
        self._drawer.start()

    @property
    def url(self) -> str:
        """Where the page is, token included."""
        host, port = self._server.server_address[:2]
        name = host.decode() if isinstance(host, bytes) else str(host)
        return f"http://{f'[{name}]' if ':' in name else name}:{port}/{self.token}/"

    @property
    def clients(self) -> int:
        """Browsers that follow the run now."""
        return self._clients

    def emit(self, event: Event) -> None:
        """Fold `event`. A new run on the same engine replaces one that has ended."""
        with self._lock:
            fold = self._fold
            if event.type == names.RUN_STARTED and fold.status not in ("running", "pending"):
                self._fold = fold = ReportFold(fold._saved)
            fold.emit(event)

    # ------------------------------------------------------------ drawing

    def page(self) -> bytes:
        """The page as it stands."""
        with self._lock:
            return render_page(self._fold, graph=self._graph, live=LIVE_SCRIPT).encode("utf-8", "replace")

    def _draw(self) -> None:
        with self._lock:
            fold = self._fold
            if self._drawn_events == fold.stats.events and self._frame:
                return
            self._drawn_events = fold.stats.events
            content = {"title": f"{fold.pipeline}: {fold.status}", "html": render_body(fold, graph=self._graph)}
        data = json.dumps(content)
        frame = f"event: body\ndata: {data}\n\n".encode("utf-8", "replace")
        with self._version:
            self._frame = frame
            self._number += 1
            self._version.notify_all()

    def _draw_loop(self) -> None:
        pause = self._interval
        while True:
            with self._version:
                self._version.wait_for(lambda: self._closing or self._clients > 0)
                if self._closing:
                    return
            started = time.monotonic()
            self._draw()
            pause = max(self._interval, _PAUSE * (time.monotonic() - started))
            with self._version:
                if self._version.wait_for(lambda: self._closing, timeout=pause):
                    return

    # ------------------------------------------------------------ clients

    def follow(self, write: Callable[[bytes], object]) -> None:
        """Write one frame per version until the page closes or `write` fails. Runs on the client's own thread."""
        with self._version:
            if self._clients >= MAX_CLIENTS:
                return
            self._clients += 1
            self._version.notify_all()
        seen = 0
        try:
            while True:
                with self._version:
                    if self._number == seen and not self._closing:
                        self._version.wait(_KEEP_ALIVE)
                    frame = self._frame if self._number > seen else b""
                    seen = self._number
                    closing = self._closing
                write(frame or b": still here\n\n")
                if closing:
                    write(b"event: end\ndata: {}\n\n")
                    return
        finally:
            with self._version:
                self._clients -= 1

    @property
    def full(self) -> bool:
        """True when another client would be turned away."""
        return self._clients >= MAX_CLIENTS

    def close(self, linger: float = 0.0) -> None:
        """Send the last state to who looks, then stop serving. Idempotent."""
        if self._closing:
            return
        if linger > 0 and self._clients:
            self._draw()
            time.sleep(linger)
        self._draw()
        with self._version:
            self._closing = True
            self._version.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._server_thread.join(5.0)
        self._drawer.join(5.0)

    def __enter__(self) -> LivePage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that was closed is no error of ours."""


def _handler(live: LivePage) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 30.0
        protocol_version = "HTTP/1.1"
        server_version = "stageflow"
        sys_version = ""

        def do_GET(self) -> None:
            self.close_connection = True
            token, _, rest = self.path.partition("?")[0].strip("/").partition("/")
            # Compared in constant time; a page of another site that guesses the port learns nothing.
            if not hmac.compare_digest(token.encode("utf-8", "replace"), live.token.encode()):
                self._answer(404, "text/plain; charset=utf-8", b"not here\n")
            elif rest == "":
                self._answer(200, "text/html; charset=utf-8", live.page())
            elif rest == "events":
                self._events()
            else:
                self._answer(404, "text/plain; charset=utf-8", b"not here\n")

        def _head(self, status: int, kind: str, length: int | None) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Referrer-Policy", "no-referrer")
            self.send_header("Connection", "close")
            if length is not None:
                self.send_header("Content-Length", str(length))
            self.end_headers()

        def _answer(self, status: int, kind: str, content: bytes) -> None:
            self._head(status, kind, len(content))
            self.wfile.write(content)

        def _events(self) -> None:
            if live.full:
                self._answer(503, "text/plain; charset=utf-8", b"too many pages are open\n")
                return
            self._head(200, "text/event-stream; charset=utf-8", None)
            live.follow(self.wfile.write)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing: the terminal belongs to the run."""

    return Handler
