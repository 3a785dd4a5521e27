"""Whatever a stranger sends: no crash, no hang, no wrong type. Every crash found becomes an example here."""

import pickle
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from stageflow.websearch import FallbackExtractor, FallbackNavigator, FetchResult, LxmlExtractor, LxmlNavigator, urls
from stageflow.websearch.decompress import decode_all
from stageflow.websearch.encoding import decode, sniff
from stageflow.websearch.errors import BadResponseError
from stageflow.websearch.extract import page_from
from stageflow.websearch.fetcher import retry_after_seconds
from stageflow.websearch.politeness import RobotsRules

bounded = settings(max_examples=120, deadline=3000, derandomize=True, database=None)

TAGS = st.sampled_from(
    [
        *(
            "p",
            "div",
            "a",
            "b",
            "i",
            "em",
            "strong",
            "ul",
            "ol",
            "li",
            "table",
            "tr",
            "td",
            "th",
            "caption",
            "blockquote",
        ),
        *(
            "pre",
            "code",
            "h1",
            "h2",
            "h6",
            "br",
            "hr",
            "img",
            "script",
            "style",
            "nav",
            "main",
            "article",
            "svg",
            "title",
        ),
        *("base", "meta", "link", "select", "option", "form", "dl", "dt", "dd", "html", "body", "head", "template"),
        *("noscript", "iframe", "textarea"),
    ]
)
ATTRIBUTE = st.sampled_from(
    [
        *("", " href=x", " href='//['", " href=javascript:x", " class='content next'", " id=content", " rowspan=70000"),
        *(
            " colspan=0",
            " colspan=-1",
            " start=99999999999",
            " value=x",
            " lang=\ud800",
            " rel=next",
            " href='?page=9'",
        ),
        *(" href=http://[::1", " role=navigation", " class=pagination", " charset=utf-7", " name=keywords content=','"),
    ]
)
PIECE = st.one_of(
    st.builds("<{}{}>".format, TAGS, ATTRIBUTE),
    st.builds("</{}>".format, TAGS),
    st.text(max_size=12),
    st.sampled_from(
        ["<!--", "-->", "<![CDATA[", "]]>", "<!DOCTYPE html>", "&amp;", "&#0;", "&#xffffff;", "<?x", "\0", "`", "|"]
    ),
)
HTML = st.lists(PIECE, max_size=60).map("".join)


def check(html: str, url: str = "http://a.test/b?page=2") -> None:
    for extractor in (LxmlExtractor(), FallbackExtractor()):
        result = extractor.extract(html, url)
        assert result.word_count == len(result.plain_text.split())
        assert "\n\n\n" not in result.plain_text or result.code_blocks
        for link in result.links:
            assert urls.normalize(link.url, keep_fragment=True) == link.url
        widths = {len({len(row) for row in table}) for table in result.tables}
        assert widths <= {1}
        pickle.loads(pickle.dumps(result))
        result.markdown.encode()
    for navigator in (LxmlNavigator(), FallbackNavigator()):
        found = navigator.analyze(html, url)
        assert len(found.actions) <= 20
        assert len({action.url for action in found.actions}) == len(found.actions)


@bounded
@given(HTML)
@example("<table><tr><td><b><p>x</b></td></table></b>")
@example("<h1><table><tr><td><h2>x</h1></h2>y")
@example("<a href=x><table><tr><td><a href=y>z</a></table></a>")
@example("<pre><h1>x</pre></h1><li>y</li></ul>")
@example("<base href='http://[::1'><a href=x>y</a>")
def test_any_mixture_of_tags_is_read(html: str) -> None:
    check(html)


@bounded
@given(st.binary(max_size=400), st.text(max_size=40))
@example(b"\xff\xfe\x00", "")
@example(b"<meta charset=", "text/html; charset=")
@example(b"\x80" * 300, "text/html; charset=\x00")
def test_any_bytes_are_text_and_a_page(data: bytes, content_type: str) -> None:
    text, codec = decode(data, content_type)
    assert isinstance(text, str)
    assert sniff(data, content_type)[0] == codec or codec == "utf-8"
    result = FetchResult(
        status_code=200,
        final_url="http://a.test/",
        body=data,
        headers={"content-type": content_type},
        content_type="text/html",
    )
    page = page_from(result, LxmlExtractor())
    assert page.error is None
    page.to_dict()


@bounded
@given(st.text(max_size=60), st.text(max_size=60))
@example("http://a.test/", "http://\u2100/")
@example("http://a.test/", "//a%00b/")
@example("http://a.test/", "http://xn--a/")
@example("http://a.test/", "http://" + "a" * 300)
@example("http://[", "x")
@example("", "//x")
@example("http://a.test/", "http://a.test:٣/")
def test_joining_any_texts_gives_a_web_address_or_nothing(base: str, href: str) -> None:
    for joined in (
        urls.join(base, href),
        urls.join("http://a.test/x/y", href),
        urls.normalize("http://h.test/" + href),
    ):
        if joined is None:
            continue
        assert joined.startswith(("http://", "https://"))
        assert joined.isascii()
        assert urls.normalize(joined) == joined  # one spelling: normalising again changes nothing
        assert urls.crawl_key(joined) is not None
        assert urls.host_of(joined)
        assert "\\" not in joined
        urls.path_segments(joined)


BASES = [
    "http://a.test/",
    "https://A.test:443/x/y?q",
    "http://u:p@a.test:8080/x/",
    "file:///x",
    "http://[::1]/a",
    "http://a..b/",
    "http://a.test",
    "mailto:x",
    "//a/b",
    "http://127.1/",
    "https://a.test:99999/",
]
ODD = st.text("/.:?#;=&a0Z-_~@%+,!$'()*[]\\ \tü", max_size=14)


@settings(bounded, max_examples=600)
@given(
    st.sampled_from(BASES),
    ODD,
    st.sampled_from(["", "http://", "https://b", "HTTP://b.test", "http://b:80", "http://b.test."]),
    st.booleans(),
)
@example("http://a.test/", "b.html?from=1#top", "", False)
@example("http://a.test/", "p?#", "http://b.test", True)
def test_the_short_ways_give_what_the_library_gives(base: str, rest: str, start: str, keep: bool) -> None:
    href = f"{start}/{rest}"
    assert urls._join(base, href, keep) == urls._join_anything(base, href, keep)
    assert urls.normalize(href, keep_fragment=keep) == urls._normalize_anything(href, keep)
    assert urls._host_of(href) == urls._host_of_anything(href)


@bounded
@given(st.sampled_from(["http://", "https://", "http:\\\\", "//"]), st.text(max_size=30), st.text(max_size=10))
def test_urllib_and_httpx_see_the_same_host(scheme: str, host: str, path: str) -> None:
    import httpx

    joined = urls.join("http://base.test/", f"{scheme}{host}/{path}")
    if joined is None:
        return
    try:
        theirs = httpx.URL(joined)
    except httpx.InvalidURL:
        return  # refused there as well
    assert theirs.raw_host.decode().strip("[]").lower() == urls.host_of(joined)
    port = theirs.port or {"http": 80, "https": 443}[theirs.scheme]
    assert int(urls.origin_of(joined).rpartition(":")[2]) == port


ROBOTS_LINE = st.one_of(
    st.text(max_size=30),
    st.builds(
        "{}: {}".format,
        st.sampled_from(
            ["User-agent", "Disallow", "Allow", "Crawl-delay", "Request-rate", "Sitemap", "Visit-time", "Host"]
        ),
        st.one_of(
            st.text(max_size=20),
            st.sampled_from(["*", "/", "/*$", "nan", "inf", "-1", "1e999", "1/0", "%zz", "*" * 16]),
        ),
    ),
)


@bounded
@given(st.lists(ROBOTS_LINE, max_size=20), st.binary(max_size=40))
@example(["User-agent: *", "Crawl-delay: inf"], b"")
@example(["User-agent: *", "Crawl-delay: nan", "Disallow: /*a*a*a*a*a*a*a*a*b"], b"")
def test_any_robots_txt_gives_an_answer(lines: list[str], tail: bytes) -> None:
    rules = RobotsRules(200, "\n".join(lines).encode("utf-8", "replace") + tail)
    answer = rules.ask("http://a.test/" + "a" * 500, "stageflow-websearch/0.1")
    assert answer.allowed in (True, False)
    assert 0 <= answer.crawl_delay <= 86_400


@bounded
@given(st.binary(max_size=300), st.sampled_from(["gzip", "deflate", "gzip, deflate", "", "x-gzip", "identity"]))
@example(b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\x03\x00\x00\x00\x00\x00\x00\x00\x00\x00\x1f\x8b", "gzip")
def test_any_bytes_decompress_or_are_refused(data: bytes, coding: str) -> None:
    try:
        body, cut = decode_all([data[:7], data[7:]], coding, limit=100)
    except BadResponseError:
        return
    assert len(body) <= 100
    assert cut or len(body) <= 100


@bounded
@given(st.text(max_size=40))
@example("Mon, 99 Jan 99999 00:00:00 GMT")
@example("9" * 400)
def test_any_retry_after_is_seconds_or_nothing(value: str) -> None:
    wait = retry_after_seconds(value, now=1.7e9)
    assert wait is None or wait >= 0


@bounded
@given(
    st.dictionaries(
        st.sampled_from(["status_code", "headers", "text", "x"]), st.none() | st.integers() | st.text(max_size=5)
    )
)
def test_reading_a_result_from_anything_is_a_result_or_a_clear_error(data: dict[str, Any]) -> None:
    import msgspec

    try:
        result = FetchResult.from_dict({"final_url": "http://a.test/", **data})
    except (msgspec.ValidationError, ValueError, TypeError):
        return
    assert isinstance(result.text, str)
