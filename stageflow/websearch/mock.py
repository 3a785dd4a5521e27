"""A fetcher that reads from a dictionary and remembers what it was asked: for tests of whatever takes a `Fetcher`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping

import msgspec

from stageflow.websearch.models import FetchResult

MockPage = tuple[int, str | bytes, Mapping[str, str]]


class MockRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One call as it was made."""

    url: str
    timeout: float | None = None
    headers: dict[str, str] = {}


class MockFetcher:
    """Answers from `pages`: URL -> (status, content, headers), or an exception to raise. Unknown URLs are 404."""

    def __init__(self, pages: Mapping[str, MockPage | Exception] | None = None) -> None:
        self._pages: dict[str, MockPage | Exception] = dict(pages or {})
        self.history: list[MockRequest] = []
        self.closed = False

    def add(
        self, url: str, content: str | bytes | Exception, *, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """Set the answer for `url`; HTML unless `headers` says otherwise."""
        if isinstance(content, Exception):
            self._pages[url] = content
        else:
            self._pages[url] = (status, content, dict(headers or {"content-type": "text/html; charset=utf-8"}))

    async def fetch(
        self, url: str, *, timeout: float | None = None, headers: Mapping[str, str] | None = None
    ) -> FetchResult:
        """The answer set for `url`."""
        started = time.perf_counter()
        self.history.append(MockRequest(url=url, timeout=timeout, headers=dict(headers or {})))
        page = self._pages.get(url, (404, "not found", {"content-type": "text/plain"}))
        if isinstance(page, Exception):
            raise page
        status, content, given = page
        lower = {name.lower(): value for name, value in given.items()}
        return FetchResult(
            status_code=status,
            url=url,
            final_url=url,
            body=content.encode("utf-8", "replace") if isinstance(content, str) else content,
            headers=lower,
            content_type=lower.get("content-type", "").partition(";")[0].strip().lower(),
            duration_ms=(time.perf_counter() - started) * 1000,
            request_id=uuid.uuid4().hex,
        )

    async def aclose(self) -> None:
        """Remember that it was closed."""
        self.closed = True
