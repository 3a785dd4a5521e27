"""Which characters the bytes of a page mean, decided in the order browsers do: BOM, header, `<meta>`, detection. Pure.

charset-normalizer is imported only when nothing else decides.
"""

from __future__ import annotations

import codecs
import re
from typing import Final

_PRESCAN_BYTES: Final = 1024  # what the HTML standard lets a browser look at
_DETECT_BYTES: Final = 8192  # detection costs milliseconds per KiB and gains nothing beyond
_BOMS: Final = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))

# Labels that mean something else on the web than in Python (WHATWG Encoding, "names and labels").
_WEB_LABELS: Final = {
    **dict.fromkeys(
        ("ascii", "us-ascii", "iso-8859-1", "iso8859-1", "iso_8859-1", "latin1", "latin-1", "l1", "cp819", "x-cp1252"),
        "cp1252",
    ),
    **dict.fromkeys(("iso-8859-9", "iso8859-9", "latin5", "l5"), "cp1254"),
    **dict.fromkeys(("tis-620", "iso-8859-11", "iso8859-11"), "cp874"),
    **dict.fromkeys(("gb2312", "gbk", "gb_2312-80", "x-gbk", "chinese", "csgb2312"), "gb18030"),
    **dict.fromkeys(("shift_jis", "shift-jis", "sjis", "x-sjis", "ms_kanji", "windows-31j"), "cp932"),
    **dict.fromkeys(("euc-kr", "ks_c_5601-1987", "ksc5601", "korean", "windows-949"), "cp949"),
    **dict.fromkeys(("big5", "big5-hkscs", "cn-big5", "x-x-big5"), "big5hkscs"),
    **dict.fromkeys(("utf8", "unicode-1-1-utf-8", "x-unicode20utf8"), "utf-8"),
    **dict.fromkeys(("utf-16", "utf16", "ucs-2", "iso-10646-ucs-2", "unicode"), "utf-16-le"),
    "x-user-defined": "cp1252",
    "x-mac-cyrillic": "mac_cyrillic",
    "macintosh": "mac_roman",
    "x-mac-roman": "mac_roman",
}
# Python knows codecs that must never be chosen by a stranger (utf-7, unicode_escape, punycode, hex): only these may.
_ALLOWED: Final = frozenset(
    {"utf-8", "utf-16-le", "utf-16-be", "cp866", "cp874", "cp932", "cp949", "gb18030", "big5hkscs", "euc_jp", "koi8-r"}
    | {"koi8-u", "mac-roman", "mac-cyrillic", "iso2022_jp"}
    | {f"cp{number}" for number in range(1250, 1259)}
    | {f"iso8859-{number}" for number in (2, 3, 4, 5, 6, 7, 8, 10, 13, 14, 15, 16)}
)
_CHARSET: Final = re.compile(r"""charset\s*=\s*(?:"([^"]{1,64})"|'([^']{1,64})'|([^\s;,"'>]{1,64}))""", re.I)
_META: Final = re.compile(rb"<meta[\s/][^>]{0,1000}", re.I)
_XML: Final = re.compile(rb"""^\s*<\?xml[^>]{0,200}?encoding\s*=\s*["']([\w.:-]{1,64})["']""", re.I)
_COMMENT: Final = re.compile(rb"<!--.*?(?:-->|\Z)", re.S)


def codec_for(label: str) -> str | None:
    """The Python codec for a web label, or None when the web knows no such label."""
    wanted = label.strip().strip("\"'").lower()
    if not wanted or len(wanted) > 64 or "\0" in wanted:
        return None
    wanted = _WEB_LABELS.get(wanted, wanted)
    try:
        name = codecs.lookup(wanted).name
    except (LookupError, ValueError):
        return None
    return name if name in _ALLOWED else None


def _from_header(content_type: str) -> str | None:
    match = _CHARSET.search(content_type)
    return codec_for(match[1] or match[2] or match[3]) if match else None


def _from_meta(head: bytes) -> str | None:
    """The charset a `<meta>` or an XML declaration in the first bytes names; comments do not count."""
    declared = _XML.match(head)
    found = codec_for(declared[1].decode("ascii", "replace")) if declared else None
    if found is None:
        for tag in _META.findall(_COMMENT.sub(b"", head)):
            match = _CHARSET.search(tag.decode("latin-1"))
            found = codec_for(match[1] or match[2] or match[3]) if match else None
            if found is not None:
                break
    # Bytes in which "<meta" was readable are not UTF-16, whatever they say.
    return "utf-8" if found is not None and found.startswith("utf-16") else found


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        # a body cut off in the middle of a character is still UTF-8
        return error.reason == "unexpected end of data" and error.end == len(data) and error.start >= len(data) - 3
    return True


def _detect(data: bytes) -> str | None:
    """The best guess of charset-normalizer on the first bytes that are not plain ASCII; None when it has none."""
    try:
        from charset_normalizer import from_bytes
    except ImportError:
        return None
    odd = re.search(rb"[\x80-\xff]", data)
    start = max(0, (odd.start() if odd else 0) - 256)
    try:
        best = from_bytes(data[start : start + _DETECT_BYTES]).best()
    except Exception:  # a detector's bug on hostile bytes must not cost the page
        return None
    return codec_for(best.encoding.replace("_", "-")) or codec_for(best.encoding) if best is not None else None


def sniff(data: bytes, content_type: str = "") -> tuple[str, int]:
    """The Python codec for `data` and the length of its byte order mark. Looks at 1 KiB for `<meta>`, 8 KiB to
    detect."""
    for mark, name in _BOMS:
        if data.startswith(mark):
            return name, len(mark)
    declared = _from_header(content_type) or _from_meta(data[:_PRESCAN_BYTES])
    if declared is not None:
        return declared, 0
    if _is_utf8(data):
        return "utf-8", 0
    return _detect(data) or "utf-8", 0


def decode(data: bytes, content_type: str = "") -> tuple[str, str]:
    """`data` as text, and the codec used. Bytes that do not fit become U+FFFD; never raises."""
    codec, skip = sniff(data, content_type)
    try:
        return data[skip:].decode(codec, "replace"), codec
    except (UnicodeError, LookupError):
        return data[skip:].decode("utf-8", "replace"), "utf-8"
