"""Where a page leads: pagination, menus, breadcrumbs, and the order of actions."""

import pytest

from stageflow.websearch import FallbackNavigator, LxmlNavigator, NavigationConfig, PaginationInfo

URL = "http://s.test/list?page=2"


def pagination(html: str, url: str = URL) -> PaginationInfo | None:
    return LxmlNavigator().analyze(html, url).pagination


def test_a_pagination_container_tells_everything() -> None:
    html = """<div class="pagination"><a href="?page=1">« Prev</a><a href="?page=1">1</a>
      <span class="current">2</span><a href="?page=3">3</a><a href="?page=4">4</a><a href="?page=3">Next »</a></div>"""
    found = pagination(html)
    assert found == PaginationInfo(
        current_page=2,
        total_pages=2,
        next_url="http://s.test/list?page=3",
        prev_url="http://s.test/list?page=1",
        page_urls=["http://s.test/list?page=4"],
    )
    assert found.has_next
    assert found.has_prev


@pytest.mark.parametrize(
    ("link", "end"),
    [
        ("<a href=/x>Next</a>", "next"),
        ("<a href=/x>older posts</a>", "next"),
        ("<a href=/x>→</a>", "next"),
        ("<a href=/x>&gt;</a>", "next"),
        ('<a href=/x class="btn-next"><i></i></a>', "next"),
        ('<a href=/x rel="next">weiter</a>', "next"),
        ('<a href=/x aria-label="Next page"><svg></svg></a>', "next"),
        ('<li class="next"><a href=/x>...</a></li>', "next"),
        ("<a href=/x>« previous</a>", "prev"),
        ("<a href=/x>&lt;</a>", "prev"),
        ("<a href=/x>Back</a>", "prev"),
        ('<a href=/x class="prev">..</a>', "prev"),
    ],
)
def test_ends_are_known_by_text_sign_or_class(link: str, end: str) -> None:
    found = pagination(f"<div class=pager><ul>{link}</ul></div>", "http://s.test/")
    assert found is not None
    assert (found.next_url, found.prev_url) == (
        ("http://s.test/x", None) if end == "next" else (None, "http://s.test/x")
    )


def test_a_menu_is_not_a_pagination_and_nextcloud_is_not_next() -> None:
    assert (
        pagination("<div role=navigation><a href=/a>Nextcloud</a><a href=/b>Background</a></div>", "http://s.test/")
        is None
    )
    assert pagination("<p>nothing</p>") is None
    assert pagination("") is None


def test_links_with_page_numbers_serve_where_no_container_is() -> None:
    html = "<a href='/l/page/3'>c</a><a href='/l/page/1'>a</a><a href='/about'>x</a><a href='/l/page/5'>d</a>"
    found = pagination(html, "http://s.test/l/page/2")
    assert found is not None
    assert (found.current_page, found.total_pages) == (2, 4)
    assert [url[-1] for url in found.page_urls] == ["1", "3", "5"]
    assert (found.next_url, found.prev_url) == ("http://s.test/l/page/3", "http://s.test/l/page/1")
    assert pagination("<a href='?page=3'>only one</a>", "http://s.test/") is None


def test_declared_relations_serve_too() -> None:
    found = pagination("<link rel=next href=/n><link rel=prev href=/p><p>x</p>", "http://s.test/")
    assert found is not None
    assert (found.next_url, found.prev_url) == ("http://s.test/n", "http://s.test/p")


def test_actions_are_ordered_unique_and_capped() -> None:
    menu = "".join(f"<a href=/m{n}>Menu {n}</a>" for n in range(4))
    text = "words " * 60
    html = f"""<nav class=x>{menu}</nav>
      <ol class=breadcrumb><li><a href=/>Home</a></li><li><a href=/s>Section</a></li></ol>
      <article><p>{text}<a href=/c1>content one</a><a href=/m1>menu again</a><a href=/c2>ab</a></p></article>
      <div class=pagination><a href=/n>next</a><a href=/m2>prev</a></div>"""
    found = LxmlNavigator().analyze(html, "http://s.test/")
    assert [(action.action_type, action.url[13:], action.priority) for action in found.actions] == [
        ("next", "/n", 1),
        ("previous", "/m2", 2),
        ("navigation", "/m0", 3),
        ("navigation", "/m1", 3),
        ("navigation", "/m3", 3),
        ("content", "/c1", 4),
    ]
    assert [link.text for link in found.breadcrumbs] == ["Home", "Section"]
    assert len(found.nav_links) == 4
    assert found.main_content is not None
    assert found.main_content.startswith("words words")
    capped = LxmlNavigator(NavigationConfig(max_actions=2, min_nav_links=9)).analyze(html, "http://s.test/")
    assert [action.action_type for action in capped.actions] == ["next", "previous"]
    assert capped.nav_links == []


def test_main_content_falls_back_to_the_longest_division_named_like_it() -> None:
    html = f"<article>short</article><div class=page-body>{'a ' * 300}</div><div id=content2>{'b ' * 50}</div>"
    found = LxmlNavigator().analyze(html, "http://s.test/")
    assert found.main_content is not None
    assert set(found.main_content.split()) == {"a"}


def test_the_fallback_knows_next_and_previous_only() -> None:
    found = FallbackNavigator().analyze(
        "<a href=/n>Next</a><a href=/p>prev</a><nav><a href=/x>x</a></nav>", "http://s.test/"
    )
    assert [(action.action_type, action.url) for action in found.actions] == [
        ("next", "http://s.test/n"),
        ("previous", "http://s.test/p"),
    ]
    assert FallbackNavigator().analyze("<p>x</p>", "http://s.test/").pagination is None
