"""Reading, joining and comparing URLs by RFC 3986 (`urllib.parse`) with the browser's leniencies (WHATWG); pure.

Nothing here raises on hostile text: what is not a web address is `None` or "".
"""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache
from urllib.parse import SplitResult, parse_qsl, quote, unquote_to_bytes, urlencode, urljoin, urlsplit, urlunsplit

WEB_SCHEMES = frozenset({"http", "https"})
_DEFAULT_PORT = {"http": 80, "https": 443}
# Everything a path or query may hold as it is; "%" stays because what is already encoded must not be encoded twice.
_PATH_SAFE = "/%:@!$&'()*+,;=~-._"
_QUERY_SAFE = _PATH_SAFE + "?[]|"
_MAX_LENGTH = 65_536  # characters: longer ones are no links but payloads
_CACHED_LENGTH = 1024
_CONTROL = re.compile(r"[\t\n\r]")
_BAD_HOST = re.compile(r"[\x00-\x20\x7f#%/<>?@\\^|`{}\[\]:]")
_PLAIN = re.compile(r"[A-Za-z0-9\-._~/=&+,;:@!$'()*]*")  # nothing here is ever encoded or decoded
_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_UNRESERVED = re.compile(r"%(2[DdEe]|3[0-9]|4[1-9A-Fa-f]|5[0-9AaFf]|6[1-9A-Fa-f]|7[0-9AaEe])")
_ESCAPE = re.compile(r"%[0-9A-Fa-f]{2}")
_TRACKING = re.compile(
    r"^(utm_\w+|gclid|fbclid|msclkid|mc_eid|phpsessid|jsessionid|sid|sessionid|aspsessionid\w*)$", re.I
)
# What most links look like. Nothing in these is encoded, decoded or resolved, so the library need not be asked: no
# empty, dot or parameter segment, no escape, no empty query. `test_hostile` holds them against the long way.
_SEGMENTS = r"(?:/(?!\.)[A-Za-z0-9\-._~=&+,:@!$'()*]+)"
_TAIL = rf"({_SEGMENTS}+/?|/)(\?[A-Za-z0-9\-._~/=&+,:@!$()*;]+)?(#[A-Za-z0-9\-._~/=&+,:@!$()*;]+)?"
_ROOTED = re.compile(_TAIL)
_WHOLE = re.compile(rf"https?://([a-z0-9\-]+(?:\.[a-z0-9\-]+)*){_TAIL}")
_HOST = re.compile(r"https?://([a-z0-9\-]+(?:\.[a-z0-9\-]+)*)(?::[0-9]{1,4})?(?:[/?#]|\Z)")
_PATH_SESSION = re.compile(r";jsessionid=[^/?#;]*", re.I)


def parse(url: str) -> SplitResult | None:
    """The parts of `url` as a browser reads them, or None when it cannot be read.

    Blanks around it and tabs and line ends inside it are dropped; in web schemes a backslash is a slash (otherwise two
    parsers could see two different hosts in one URL).
    """
    text = _CONTROL.sub("", url.strip("\x00\x01\x02\x03\x04\x05\x06\x07\x08\t\n\x0b\x0c\r\x1b\x1f "))
    scheme = text.partition(":")[0].lower()
    if scheme in WEB_SCHEMES or ":" not in text:
        head, mark, tail = text.partition("?")
        head, hash_mark, fragment = head.partition("#")
        text = head.replace("\\", "/") + hash_mark + fragment + mark + tail
    try:
        parts = urlsplit(text)
        if parts.netloc:
            _ = parts.port  # a port that is no number raises here
            _ = parts.hostname
    except ValueError:
        return None
    return parts


@lru_cache(maxsize=4096)
def _ascii_host(host: str) -> str | None:
    """The host as it goes on the wire: lower case, IDNA for other scripts, None when no host can look like that."""
    host = host.rstrip(".") if host.endswith(".") and not host.endswith("..") else host
    if ":" in host:
        try:
            return f"[{ipaddress.IPv6Address(host).compressed}]"
        except ValueError:
            return None
    if "%" in host:
        host = unquote_to_bytes(host).decode("utf-8", "replace")
    host = host.lower()
    if not host or len(host) > 253 or _BAD_HOST.search(host):
        return None
    if host.isascii():
        return host
    try:
        import idna

        return idna.encode(host, uts46=True).decode("ascii")
    except ImportError:
        pass
    except ValueError:  # idna's errors are UnicodeErrors
        return None
    try:
        return host.encode("idna").decode("ascii")
    except ValueError:
        return None


def _clean(text: str, safe: str) -> str:
    """Percent-encode what must be, once; decode what never needs to be; upper-case the escapes that stay."""
    if _PLAIN.fullmatch(text):
        return text
    text = _PERCENT.sub("%25", text)
    quoted = quote(text, safe=safe, encoding="utf-8", errors="replace")
    plain = _UNRESERVED.sub(lambda match: chr(int(match[1], 16)), quoted)
    return _ESCAPE.sub(lambda match: match[0].upper(), plain)


def normalize(url: str, *, keep_fragment: bool = False) -> str | None:
    """The one spelling of an absolute http(s) URL, or None when it is not one.

    Host lower-cased and IDNA-encoded, default port, credentials' absence and dot segments resolved, escapes normalised.
    Equal spellings are equal resources (RFC 3986 section 6.2.2); the query is left in its order.
    """
    plain = _WHOLE.fullmatch(url) if len(url) <= _CACHED_LENGTH else None
    if plain is not None and len(plain[1]) <= 253:
        return url if keep_fragment or plain[4] is None else url[: plain.start(4)]
    return _normalize_anything(url, keep_fragment)


def _normalize_anything(url: str, keep_fragment: bool) -> str | None:
    parts = parse(url)
    if parts is None or parts.scheme not in WEB_SCHEMES:
        return None
    name, port = parts.hostname, parts.port
    host = _ascii_host(name) if name else None
    if host is None:
        return None
    netloc = host if port is None or port == _DEFAULT_PORT[parts.scheme] else f"{host}:{port}"
    if "@" in parts.netloc:
        credentials = parts.netloc.rpartition("@")[0]
        netloc = f"{quote(credentials, safe=':%!$&()*+,;=~-._')}@{netloc}"
    # urljoin against the root resolves the dot segments of an absolute path
    path = _clean(parts.path, _PATH_SAFE) or "/"
    if "/." in path:
        joined = urljoin("http://host/", "./" + path.lstrip("/") if path.startswith("//") else path)
        path = urlsplit(joined).path or "/"
    query = _clean(parts.query, _QUERY_SAFE)
    fragment = _clean(parts.fragment, _QUERY_SAFE) if keep_fragment else ""
    return urlunsplit((parts.scheme, netloc, path, query, fragment))


def join(base: str, href: str, *, keep_fragment: bool = False) -> str | None:
    """`href` as seen from `base`, normalised; None for what is no page: `mailto:`, `javascript:`, `data:`, nonsense."""
    if len(href) > _MAX_LENGTH:
        return None
    if len(href) > _CACHED_LENGTH or len(base) > _CACHED_LENGTH:
        return _join(base, href, keep_fragment)
    return _cached_join(base, href, keep_fragment)


def _join(base: str, href: str, keep_fragment: bool) -> str | None:
    plain = _ROOTED.fullmatch(href)
    if plain is not None:
        root = _cached_root(base) if len(base) <= _CACHED_LENGTH else _root(base)
        if root is not None:
            return root + (href if keep_fragment or plain[3] is None else href[: plain.start(3)])
    return _join_anything(base, href, keep_fragment)


def _root(base: str) -> str | None:
    """Scheme, credentials, host and port of `base` as `normalize` writes them; None when it is no web address."""
    clean = normalize(base)
    return None if clean is None else "/".join(clean.split("/", 3)[:3])


def _join_anything(base: str, href: str, keep_fragment: bool) -> str | None:
    reference = parse(href)
    if reference is None:
        return None
    if reference.scheme and reference.scheme not in WEB_SCHEMES:
        return None
    if reference.scheme and not reference.netloc:
        return None  # "http:foo": legal once, today only a parser differential
    start = _cached_parse(base) if len(base) <= _CACHED_LENGTH else parse(base)
    if start is None or (not reference.netloc and (start.scheme not in WEB_SCHEMES or not start.netloc)):
        return normalize(reference.geturl(), keep_fragment=keep_fragment) if reference.scheme else None
    if not reference.scheme and reference.netloc and start.scheme not in WEB_SCHEMES:
        reference = reference._replace(scheme="https")
    try:
        joined = urljoin(start.geturl(), reference.geturl())
    except ValueError:
        return None
    return normalize(joined, keep_fragment=keep_fragment)


# Menus repeat on every page of a site; what is kept is bounded in number and in length.
_cached_join = lru_cache(maxsize=8192)(_join)
_cached_parse = lru_cache(maxsize=1024)(parse)
_cached_root = lru_cache(maxsize=1024)(_root)


def host_of(url: str) -> str:
    """The host, lower case, without port; "" when there is none."""
    return _cached_host(url) if len(url) <= _CACHED_LENGTH else _host_of(url)


def _host_of(url: str) -> str:
    plain = _HOST.match(url)
    if plain is not None and len(plain[1]) <= 253:
        return plain[1]
    return _host_of_anything(url)


def _host_of_anything(url: str) -> str:
    parts = parse(url)
    if parts is None or not parts.hostname:
        return ""
    return (_ascii_host(parts.hostname) or "").strip("[]")


_cached_host = lru_cache(maxsize=8192)(_host_of)


def origin_of(url: str) -> str:
    """Scheme, host and port as one string: what robots.txt and credentials belong to."""
    parts = parse(url)
    if parts is None or not parts.hostname or parts.scheme not in WEB_SCHEMES:
        return ""
    host = _ascii_host(parts.hostname)
    if host is None:
        return ""
    return f"{parts.scheme}://{host}:{parts.port or _DEFAULT_PORT[parts.scheme]}"


def extract_domain(url: str) -> str:
    """The host of `url`: case, port, query and credentials play no part; "" when it has none."""
    return host_of(url)


def same_domain(left: str, right: str) -> bool:
    """Whether both lie on the same host; False when either has none."""
    host = host_of(left)
    return bool(host) and host == host_of(right)


def crawl_key(url: str) -> str | None:
    """What two spellings of one page share in a crawl: besides `normalize`, tracking and session parameters and
    order do not count."""
    clean = normalize(url)
    if clean is None:
        return None
    parts = urlsplit(clean)
    path = _PATH_SESSION.sub("", parts.path)
    query = parts.query
    if query:
        pairs = parse_qsl(query, keep_blank_values=True, encoding="utf-8", errors="replace", max_num_fields=None)
        query = urlencode(sorted((key, value) for key, value in pairs if not _TRACKING.match(key)), errors="replace")
    return urlunsplit((parts.scheme, parts.netloc, path, query, ""))


def path_segments(url: str) -> list[str]:
    """The non-empty segments of the path."""
    parts = parse(url)
    return [segment for segment in parts.path.split("/") if segment] if parts else []


def shape_of(url: str) -> str:
    """The URL with every run of digits written as `0`: pages of one calendar have one shape."""
    return re.sub(r"\d+", "0", crawl_key(url) or url)
