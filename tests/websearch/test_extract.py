"""What extraction makes of pages: Markdown and text, metadata, links, main content, and what it leaves out."""

import pickle

import pytest

from stageflow.websearch import (
    CodeBlock,
    ExtractionConfig,
    FallbackExtractor,
    FetchResult,
    HeadingOutline,
    LxmlExtractor,
    SelectorError,
    TrafilaturaExtractor,
)
from stageflow.websearch.extract import page_from

URL = "http://site.test/dir/page.html"


def markdown(body: str, **options: object) -> str:
    config = ExtractionConfig.from_dict(dict(options)) if options else None
    return LxmlExtractor(config).extract(f"<html><body><main>{body}</main></body></html>", URL).markdown


def plain(body: str) -> str:
    return LxmlExtractor().extract(f"<html><body><main>{body}</main></body></html>", URL).plain_text


@pytest.mark.parametrize(
    ("html", "expected"),
    [
        ("<h1>One</h1><h3>Three</h3>", "# One\n\n### Three"),
        ("<p>a  b\n c</p><p>d&nbsp;e</p>", "a b c\n\nd e"),
        ("<p>x<br>y<br/>z</p>", "x  \ny  \nz"),
        ("a<hr>b", "a\n\n---\n\nb"),
        ("<p>so <b> bold </b>and<i>it</i></p>", "so **bold** and*it*"),
        ("<b>a <strong>b</strong></b>", "**a b**"),
        ("<b> </b>x<em></em>", "x"),
        ('<a href="x?a=(1)">t</a>', "[t](http://site.test/dir/x?a=%281%29)"),
        ('<a href="/x"><b>t</b></a>', "[**t**](http://site.test/x)"),
        ('<a href="#top">up</a> <a href="javascript:x()">js</a> <a href="mailto:a@b">m</a>', "up js m"),
        ('<a href="/i"><img alt="logo" src="l.png"></a>', "[logo](http://site.test/i)"),
        ("<p>run <code>a &lt; b</code> and <code>x`y</code></p>", "run `a < b` and ``x`y``"),
        (
            '<pre><code class="hl language-Python">def f():\n    pass\n\n\nx</code></pre>',
            "```python\ndef f():\n    pass\n\n\nx\n```",
        ),
        ("<pre>has ``` in it</pre>", "````\nhas ``` in it\n````"),
        ("<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul>", "- a\n- b\n  - c"),
        (
            '<ol start="3"><li>a</li><li value="9">b<ol><li>c</li></ol></li><li>d</li></ol>',
            "3. a\n9. b\n   1. c\n10. d",
        ),
        ("<ul><li><p>a</p><p>b</p></li><li>c</li></ul>", "- a\n\n  b\n- c"),
        ("<ul><li></li><li>x</li></ul>", "- x"),
        ("<blockquote><p>a</p><p>b</p></blockquote>c", "> a\n>\n> b\n\nc"),
        ("<blockquote>a<blockquote>b</blockquote></blockquote>", "> a\n>\n> > b"),
        ("<ul><li>x<pre>1\n\n2</pre></li></ul>", "- x\n\n  ```\n  1\n\n  2\n  ```"),
        (
            "<table><tr><th>A</th><th>B</th></tr><tr><td>1</td><td>2|3</td></tr></table>",
            "| A | B |\n| --- | --- |\n| 1 | 2\\|3 |",
        ),
        (
            (
                '<table><tr><td colspan="2">w</td></tr>'
                '<tr><td rowspan="2">a</td><td>b</td></tr><tr><td>c</td></tr></table>'
            ),
            "| w |  |\n| --- | --- |\n| a | b |\n|  | c |",
        ),
        (
            "<table><caption>Cap</caption><tr><td>a<p>b</p><ul><li>c</li></ul></td></tr></table>",
            "Cap\n\n| a b c |\n| --- |",
        ),
        (
            "<table><tr><td><table><tr><td>in</td><td>side</td></tr></table></td><td>out</td></tr></table>",
            "| in | side |\n| --- | --- |\n\nout",
        ),
        ('<a href="/card"><div><h2>T</h2><p>text</p></div></a>', "## T\n\ntext"),
        ("<h2>a<br>b <em>c</em></h2>", "## a b *c*"),
        ("x<script>evil()</script>y<style>p{}</style><!-- no --><noscript>n</noscript>", "xy"),
        ("<p>a</p><nav>menu</nav><footer>f</footer><div class='ads big'>ad</div><p>b</p>", "a\n\nb"),
        ("<dl><dt>t</dt><dd>d</dd></dl><figure><figcaption>cap</figcaption></figure>", "t\n\nd\n\ncap"),
        ("<button>no</button><select><option>no</option></select><p>yes</p>", "yes"),
        ("<p>&amp;lt; &copy; &#8364;</p>", "&lt; © €"),
    ],
)
def test_markdown(html: str, expected: str) -> None:
    assert markdown(html) == expected


def test_plain_text_has_no_marks() -> None:
    html = (
        "<h1>T</h1><p>a <b>b</b> <a href='/x'>l</a><br>c</p><ul><li>1</li><li>2</li></ul>"
        "<table><tr><td>x</td><td>y</td></tr></table>"
    )
    assert plain(html) == "T\n\na b l\nc\n\n1\n2\n\nx\ty"


@pytest.mark.parametrize(
    ("option", "html", "expected"),
    [
        ({"preserve_headings": False}, "<h1>T</h1>", "T"),
        ({"preserve_lists": False}, "<ul><li>a</li><li>b</li></ul>", "a\n\nb"),
        ({"preserve_links": False}, '<a href="/x">t</a>', "t"),
        ({"include_link_urls": False}, '<a href="/x">t</a>', "t"),
        ({"preserve_emphasis": False}, "<b>a</b> <i>b</i>", "a b"),
        ({"preserve_code": False}, "<code>a</code><pre>b\n\nc</pre>", "a\n\nb\nc"),
        ({"preserve_blockquotes": False}, "<blockquote>a</blockquote>", "a"),
        ({"preserve_tables": False}, "<table><tr><td>a</td><td>b</td></tr></table>", "a\n\nb"),
        ({"max_link_text_length": 3}, '<a href="/x">abcdef</a>', "[abc](http://site.test/x)"),
        ({"max_heading_length": 4}, "<h1>abcdef</h1>", "# abcd"),
        ({"min_text_length": 3}, "<p>ab</p><p>abc</p>", "abc"),
        ({"remove_selectors": ["p.x"]}, "<p class=x>a</p><nav>b</nav>", "b"),
    ],
)
def test_each_option_does_what_it_says(option: dict[str, object], html: str, expected: str) -> None:
    assert markdown(html, **option) == expected


def test_headings_tables_and_code_are_also_data() -> None:
    html = (
        "<h1 id=a>A</h1><h2>B <i>c</i></h2><table><tr><th>k</th><td>v</td></tr></table><pre class='brush: js'>x</pre>"
    )
    result = LxmlExtractor().extract(html, URL)
    assert result.headings == [HeadingOutline(level=1, text="A", anchor="a"), HeadingOutline(level=2, text="B c")]
    assert result.tables == [[["k", "v"]]]
    assert result.code_blocks == [CodeBlock(text="x", language="js")]
    assert result.word_count == len(result.plain_text.split()) == 6


def test_metadata_prefers_open_graph() -> None:
    html = """<html lang="de-CH"><head><title> Plain
      title </title><meta property="og:title" content="OG &amp; title"><meta name="description" content="plain">
      <meta property="og:description" content="og"><meta name="author" content="A. U. Thor">
      <meta property="article:published_time" content="2024-05-06T07:08:09Z"><link rel="canonical" href="/canon">
      <meta property="og:image" content="img.png"><meta name="Keywords" content="a, b,, a">
      <meta property="og:type" content="article">
      </head><body>x</body></html>"""
    found = LxmlExtractor().extract_metadata(html, URL)
    assert found.to_dict() == {
        "title": "OG & title",
        "description": "og",
        "language": "de-CH",
        "author": "A. U. Thor",
        "published_date": "2024-05-06T07:08:09Z",
        "canonical_url": "http://site.test/canon",
        "og_image": "http://site.test/dir/img.png",
        "content_type": "article",
        "keywords": ["a", "b"],
    }


def test_metadata_falls_back_to_plain_tags() -> None:
    html = (
        "<title>T</title><meta name=description content=d><time datetime='2020-01-01'>then</time>"
        "<svg><title>no</title></svg>"
    )
    found = LxmlExtractor().extract_metadata(html, URL)
    assert (found.title, found.description, found.published_date, found.language) == ("T", "d", "2020-01-01", None)


def test_links_are_absolute_unique_and_judged() -> None:
    html = """<base href="/other/"><p>before <a href="a" title="t" rel="nofollow">A</a> after</p><a href="a">again</a>
      <a href="//Else.test/x">E</a><a href="#x">no</a><a href="">no</a><a href="tel:1">no</a><a href="data:,x">no</a>
      <nav><a href="http://site.test:80/n"></a><a href="/n">menu</a></nav><area href="/map" alt="map">"""
    links = LxmlExtractor().extract_links(html, URL)
    assert [(link.url, link.text, link.is_internal) for link in links] == [
        ("http://site.test/other/a", "A", True),
        ("http://else.test/x", "E", False),
        ("http://site.test/n", "menu", True),
        ("http://site.test/map", "map", True),
    ]
    assert (links[0].title, links[0].rel, links[0].context) == ("t", "nofollow", "before A after")


def test_main_content_is_the_first_selector_that_has_text_then_the_densest_element() -> None:
    words = "real words of a paragraph that says something, at length. " * 4
    by_selector = f"<div>noise</div><article></article><div id=content><p>{words}</p></div>"
    assert LxmlExtractor().extract(by_selector, URL).plain_text == " ".join(words.split())
    links = "".join(f"<li><a href=/{n}>some link text number {n} here</a></li>" for n in range(30))
    by_density = f"<div><ul>{links}</ul></div><div class=text><p>{words}</p><p>{words}</p></div><div>© nobody</div>"
    assert LxmlExtractor().extract(by_density, URL).plain_text == "\n\n".join([" ".join(words.split())] * 2)
    assert LxmlExtractor().extract("<p>short</p><p>page</p>", URL).plain_text == "short\n\npage"
    chosen = LxmlExtractor().extract(by_selector + "<p class=pick>this</p>", URL, selector="p.pick")
    assert chosen.plain_text == "this"


def test_a_selector_that_cannot_be_read_is_named() -> None:
    config = ExtractionConfig(remove_selectors=("script", "p:::"))
    with pytest.raises(SelectorError, match="p:::"):
        LxmlExtractor(config).extract("<p>x</p>", URL)


def test_what_is_not_html_is_its_first_ten_thousand_characters() -> None:
    text = FetchResult.from_text("x y " * 5000, url=URL, content_type="text/plain")
    page = page_from(text, LxmlExtractor())
    assert (len(page.plain_text), page.word_count, page.links) == (10_000, 5000, [])
    image = FetchResult(status_code=200, final_url=URL, body=b"\x89PNG\0\0", content_type="image/png")
    assert page_from(image, LxmlExtractor()).plain_text == ""
    missing = FetchResult.from_text("<h1>Not here</h1>", url=URL, status_code=404)
    page = page_from(missing, LxmlExtractor())
    assert (page.error, page.success, page.markdown) == ("HTTP 404", False, "# Not here")


def test_entities_are_not_expanded_and_nothing_is_loaded() -> None:
    billion = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]><p>&b; ok</p>'
    external = '<!DOCTYPE x [<!ENTITY f SYSTEM "file:///etc/passwd">]><p>&f; fine</p>'
    assert "hahaha" not in LxmlExtractor().extract(billion, URL).plain_text
    assert "root:" not in LxmlExtractor().extract(external, URL).plain_text


@pytest.mark.parametrize(
    "hostile",
    [
        "<div>" * 50_000 + "x",
        "<blockquote>" * 5000 + "x",
        "<ul><li>" * 5000 + "x",
        "<b><i>" * 20_000 + "x",
        "<table><tr><td>" * 5000 + "x",
        "<script>" * 30_000,
        "<p>a</p><script></script>" * 8000,
        "<a href=/x>y" * 8000,
        "<p>" + "".join(f"<a href=/{n}>y</a>" for n in range(3000)),
        '<table><tr><td colspan="99999" rowspan="99999">x</table>' * 50,
        "<table>" + "<tr><td rowspan=9999>x" * 3000,
        "<h1>" * 20_000 + "x",
        "&" * 100_000,
        "<!--" * 50_000,
        "<pre>" + "`" * 100_000,
        "<" * 200_000,
        "\0\ud800\uffff" * 1000,
        "<main>" * 300 + "<p class='" + "a " * 100_000 + "'>x",
    ],
    ids=lambda text: text[:18].encode("unicode_escape").decode(),
)
@pytest.mark.timeout(20)
def test_hostile_pages_end_in_bounded_time(hostile: str) -> None:
    for extractor in (LxmlExtractor(), FallbackExtractor()):
        result = extractor.extract(hostile, URL)
        assert len(result.markdown) <= 4 * len(hostile) + 2_000_000
        assert result.word_count == len(result.plain_text.split())
        assert result.duration_ms < 8000


def test_the_page_is_read_up_to_its_limit() -> None:
    config = ExtractionConfig(max_html_chars=20)
    assert LxmlExtractor(config).extract("<p>0123456789</p><p>not seen</p>", URL).plain_text == "0123456789"


def test_trafilatura_reads_the_same_page() -> None:
    pytest.importorskip("trafilatura", exc_type=ImportError)
    words = "Real words of a paragraph that says something, at length, and says it well. " * 5
    html = (
        "<html><head><title>T</title></head><body><nav><a href=/m>m</a></nav>"
        f"<article><h1>H</h1><p>{words}</p></article></body></html>"
    )
    result = TrafilaturaExtractor().extract(html, URL)
    assert "Real words" in result.plain_text
    assert result.metadata.title == "T"
    assert result.links[0].url == "http://site.test/m"


def test_the_fallback_reads_without_a_library() -> None:
    html = """<html lang=en><head><title>T &amp; t</title><meta name=description content="d"></head><body>
      <nav>menu</nav>
      <h2>Head</h2><p>a <b>b</b> <a href="/x">l</a><br>c</p><ul><li>1<li>2</ul><script>no()</script></body></html>"""
    result = FallbackExtractor().extract(html, URL)
    assert result.markdown == "## Head\n\na **b** [l](http://site.test/x)\nc\n\n- 1\n- 2"
    assert result.plain_text == "Head\n\na b l\nc\n\n1\n2"
    assert (result.metadata.title, result.metadata.description, result.metadata.language) == ("T & t", "d", "en")
    assert result.headings == [HeadingOutline(level=2, text="Head")]
    assert [link.url for link in result.links] == ["http://site.test/x"]


def test_extractors_and_results_travel_between_processes() -> None:
    extractor = pickle.loads(pickle.dumps(LxmlExtractor(ExtractionConfig(max_heading_length=3))))
    result = extractor.extract("<h1>abcdef</h1>", URL)
    assert pickle.loads(pickle.dumps(result)).markdown == "# abc"
