"""A small HTTP service on loopback: metadata of the packages installed beside this one.

Run as a file, in a process of its own, so that what the demo measures is real I/O and none of the service's work. It
prints its address and serves until its standard input ends, which it does when the demo ends, however that happens.

Imports the standard library only.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from urllib.parse import unquote

#: what a service some way off would take to answer; without it the loopback hides what the event loop is for
ROUND_TRIP = 0.02


@cache
def installed() -> dict[str, metadata.Distribution]:
    """Every distribution of this environment by name."""
    return {name: found for found in metadata.distributions() if (name := found.metadata["Name"])}


def describe(name: str) -> dict[str, object] | None:
    """Facts about one distribution; None if it is not installed."""
    found = installed().get(name)
    if found is None:
        return None
    # The list of files as text: `found.files` makes an object of each, which takes ten times as long.
    rows = [row.rsplit(",", 2) for row in (found.read_text("RECORD") or "").splitlines()]
    return {
        "name": name,
        "version": found.version,
        "summary": str(found.metadata["Summary"] or "") if "Summary" in found.metadata else "",
        "requires": len(found.requires or []),
        "files": len(rows),
        "nbytes": sum(int(row[2]) for row in rows if len(row) == 3 and row[2].isdigit()),
    }


class Handler(BaseHTTPRequestHandler):
    """GET /packages lists names; GET /packages/NAME describes one."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer one request."""
        time.sleep(ROUND_TRIP)
        path = self.path.partition("?")[0].strip("/").split("/")
        answer: object = None
        if path == ["packages"]:
            answer = sorted(installed())
        elif len(path) == 2 and path[0] == "packages":
            answer = describe(unquote(path[1]))
        status = HTTPStatus.NOT_FOUND if answer is None else HTTPStatus.OK
        body = json.dumps({"error": "no such package"} if answer is None else answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not logged: the demo's own output is on this terminal."""


class Server(ThreadingHTTPServer):
    """One daemon thread per connection."""

    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away early is no news."""


def main() -> None:
    """Serve on a free port until standard input ends."""
    server = Server(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main()
