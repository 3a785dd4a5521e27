"""URLs and encodings: the rules browsers follow, and no crash on anything else."""

import codecs

import pytest

from stageflow.websearch import encoding, urls
from stageflow.websearch.urls import crawl_key, join, normalize


@pytest.mark.parametrize(
    ("base", "href", "expected"),
    [
        # RFC 3986 5.4
        ("http://a/b/c/d;p?q", "g", "http://a/b/c/g"),
        ("http://a/b/c/d;p?q", "./g/.", "http://a/b/c/g/"),
        ("http://a/b/c/d;p?q", "/g", "http://a/g"),
        ("http://a/b/c/d;p?q", "//g", "http://g/"),
        ("http://a/b/c/d;p?q", "?y", "http://a/b/c/d;p?y"),
        ("http://a/b/c/d;p?q", "../..", "http://a/"),
        ("http://a/b/c/d;p?q", "../../../g", "http://a/g"),
        ("http://a/b/c/d;p?q", "g;x=1/../y", "http://a/b/c/y"),
        ("http://a/b/c/d;p?q", "", "http://a/b/c/d;p?q"),
        # where string surgery goes wrong
        ("http://a.test", "b", "http://a.test/b"),
        ("http://a.test?x=/y", "b", "http://a.test/b"),
        ("https://a.test/x", "//b.test/y", "https://b.test/y"),
        ("http://a.test/", "HTTP://B.Test:80/%7eu/%c3%a9", "http://b.test/~u/%C3%A9"),
        ("http://a.test/", " x\ty\n", "http://a.test/xy"),
        ("http://a.test/", "http://bücher.test/ä b?ö", "http://xn--bcher-kva.test/%C3%A4%20b?%C3%B6"),
        ("http://good.test/", "http:\\\\evil.test\\@good.test", "http://evil.test/@good.test"),
        ("http://a.test/", "http://[::1]:8080/x", "http://[::1]:8080/x"),
        # what is no page
        ("http://a.test/", "mailto:a@b.test", None),
        ("http://a.test/", "javascript:void(0)", None),
        ("http://a.test/", "JavaScript:void(0)", None),
        ("http://a.test/", "data:text/html,x", None),
        ("http://a.test/", "tel:+1", None),
        ("http://a.test/", "http://", None),
        ("http://a.test/", "http://a b/", None),
        ("http://a.test/", "http://[::1", None),
        ("http://a.test/", "http://a.test:99999/", None),
        ("http://a.test/", "http://a.test:x/", None),
        ("not a url", "x", None),
    ],
)
def test_joining(base: str, href: str, expected: str | None) -> None:
    assert join(base, href) == expected


def test_equal_pages_have_equal_keys() -> None:
    assert normalize("http://A.test:80/x/./y/../z#f") == "http://a.test/x/z"
    one = crawl_key("http://a.test/p;jsessionid=F00?b=2&utm_source=x&a=1&PHPSESSID=9#top")
    assert one == crawl_key("HTTP://A.test/p?a=1&b=2") == "http://a.test/p?a=1&b=2"
    assert crawl_key("http://a.test/p?a=1") != crawl_key("http://a.test/p?a=2")


def test_domains_ignore_case_port_query_and_credentials() -> None:
    assert urls.extract_domain("http://u:p@A.Test:8080?x=/y") == "a.test"
    assert urls.same_domain("http://a.test:1/x", "https://A.TEST/y")
    assert not urls.same_domain("http://a.test", "http://b.a.test")
    assert not urls.same_domain("nonsense", "nonsense")


@pytest.mark.parametrize(
    ("data", "content_type", "text", "codec"),
    [
        (codecs.BOM_UTF8 + "é".encode(), "text/html; charset=latin-1", "é", "utf-8"),
        (codecs.BOM_UTF16_LE + "é".encode("utf-16-le"), "", "é", "utf-16-le"),
        (codecs.BOM_UTF16_BE + "é".encode("utf-16-be"), "", "é", "utf-16-be"),
        ("й".encode("koi8-r"), 'text/html; charset="KOI8-R"', "й", "koi8-r"),
        (b"\x93q\x94", "text/html; charset=iso-8859-1", "“q”", "cp1252"),
        (b"<meta charset=windows-1251>" + "й".encode("cp1251"), "text/html", "<meta charset=windows-1251>й", "cp1251"),
        (
            b'<meta http-equiv=x content="text/html; charset=Shift_JIS">' + "日".encode("cp932"),
            "",
            '<meta http-equiv=x content="text/html; charset=Shift_JIS">日',
            "cp932",
        ),
        (
            b'<?xml version="1.0" encoding="euc-jp"?>' + "日".encode("euc_jp"),
            "",
            '<?xml version="1.0" encoding="euc-jp"?>日',
            "euc_jp",
        ),
        (b"<!-- <meta charset=koi8-r> -->" + "é".encode(), "", "<!-- <meta charset=koi8-r> -->é", "utf-8"),
        (b"<meta charset=utf-16>" + "é".encode(), "", "<meta charset=utf-16>é", "utf-8"),
        ("grün".encode(), "text/html; charset=nonsense", "grün", "utf-8"),
        (b"+ADw-script+AD4-", "text/html; charset=utf-7", "+ADw-script+AD4-", "utf-8"),
        (b"\\x41", "text/html; charset=unicode_escape", "\\x41", "utf-8"),
        (b"ab\xff", "text/plain; charset=utf-8", "ab�", "utf-8"),
        (b"", "", "", "utf-8"),
        ("aé".encode()[:2], "", "a�", "utf-8"),
    ],
)
def test_encodings_are_found_as_browsers_find_them(data: bytes, content_type: str, text: str, codec: str) -> None:
    assert encoding.decode(data, content_type) == (text, codec)


def test_an_undeclared_encoding_is_detected() -> None:
    text = "Съешь же ещё этих мягких французских булок, да выпей чаю. Широкая электрификация южных губерний."
    assert encoding.decode(b"<p>" * 2000 + text.encode("cp1251"))[0].endswith(text)
