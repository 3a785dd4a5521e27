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
from urllib.parse import parse_qs, urlsplit

#: what a service some way off would take to answer; without it the loopback hides what the event loop is for
ROUND_TRIP = 0.02
PAGE = 16  #: packages in one answer


@cache
def installed() -> dict[str, metadata.Distribution]:
    """Every distribution of this environment by name."""
    return {name: found for found in metadata.distributions() if (name := found.metadata["Name"])}


def describe(name: str) -> dict[str, object]:
    """Facts about one distribution."""
    found = installed()[name]
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
    """GET /packages?page=N describes some, in the order of their names, and says how many pages there are."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer one request."""
        time.sleep(ROUND_TRIP)
        asked = urlsplit(self.path)
        answer: object = None
        if asked.path.strip("/") == "packages":
            page = parse_qs(asked.query).get("page", ["1"])[0]
            names = sorted(installed())
            last = max(1, -(-len(names) // PAGE))
            if page.isdecimal() and 1 <= int(page) <= last:
                first = (int(page) - 1) * PAGE
                answer = {"pages": last, "packages": [describe(name) for name in names[first : first + PAGE]]}
        status = HTTPStatus.NOT_FOUND if answer is None else HTTPStatus.OK
        body = json.dumps({"error": "no such page"} if answer is None else answer).encode()
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
