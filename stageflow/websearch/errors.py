"""Errors of the room, each under the branch of the one tree that says whose fault it is.

Imports nothing outside the standard library and `stageflow.core`: a worker that only unpickles an error stays light.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from stageflow.core.errors import DefinitionError, ResourceError


class MissingExtraError(DefinitionError):
    """A library of an optional extra is not installed (fields `module`, `extra`)."""

    code = "SF-WEB-MISSING-EXTRA"


class SelectorError(DefinitionError):
    """A CSS selector in the configuration cannot be read (field `selector`)."""

    code = "SF-WEB-SELECTOR"


class FetchError(ResourceError):
    """A page could not be fetched (fields `url`, `transient`: whether trying again may help)."""

    code = "SF-WEB-FETCH"
    transient: bool = False


class FetchTimeoutError(FetchError):
    """The whole attempt, connect to last byte, took longer than `limit` seconds."""

    code = "SF-WEB-TIMEOUT"


class AddressRefusedError(FetchError):
    """The URL leads to an address that may not be reached: private, loopback, link-local, metadata (fields
    `url`/`host`, `address`)."""

    code = "SF-WEB-ADDRESS-REFUSED"


class UrlRefusedError(FetchError):
    """The URL is not an absolute http or https URL, or cannot be read at all (field `url`)."""

    code = "SF-WEB-URL-REFUSED"


class RobotsDisallowedError(FetchError):
    """The site's robots.txt does not let this user agent fetch the URL (field `url`)."""

    code = "SF-WEB-ROBOTS"


class TooManyRedirectsError(FetchError):
    """More than `limit` redirects, or a redirect that leads back to itself."""

    code = "SF-WEB-REDIRECTS"


class BadResponseError(FetchError):
    """The server's bytes are not what they claim: broken compression, unknown content coding, broken HTTP."""

    code = "SF-WEB-BAD-RESPONSE"


def require(module: str, *, extra: str = "web", package: str | None = None) -> ModuleType:
    """Import `module` or say which extra, or which `package`, brings it.

    Raises:
        MissingExtraError: the module is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        root = module.partition(".")[0]
        if (error.name or "").partition(".")[0] not in {root, "httpcore"}:
            raise
        missing = error.name or module
        raise MissingExtraError(
            f"stageflow.websearch needs {missing!r}, which is not installed",
            hint=f"pip install {package or f'stageflow[{extra}]'}",
            module=missing,
            extra=extra,
        ) from error


_TRANSIENT_WORDS = ("timeout", "timed out", "connection", "reset", "refused", "temporary", "502", "503", "504", "429")


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: our own errors say so themselves; strangers are judged by type, then by their
    words."""
    if isinstance(error, FetchError):
        return error.transient
    if isinstance(error, DefinitionError):
        return False
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    text = str(error).lower()
    return any(word in text for word in _TRANSIENT_WORDS)
