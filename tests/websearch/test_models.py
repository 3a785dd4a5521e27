"""Configuration and models: defaults, round trips, filters, scores."""

import pytest

from stageflow.core.errors import DefinitionError
from stageflow.websearch import (
    CrawlConfig,
    ExtractedLink,
    ExtractionConfig,
    ExtractionResult,
    FetchConfig,
    FetchProgress,
    FetchResult,
    HeadingOutline,
    NavigationAction,
    NavigationConfig,
    NavigationResult,
    PageMetadata,
    PaginationInfo,
    SearchResult,
    SiteMap,
    WebPage,
    WebSearchConfig,
    calculate_relevance_score,
    calculate_retry_delay,
    create_error_result,
    extract_unique_links,
    filter_relevant_pages,
)


def test_defaults_of_fetching() -> None:
    config = FetchConfig()
    assert (config.timeout_seconds, config.max_redirects, config.max_response_size) == (30.0, 10, 10 * 1024 * 1024)
    assert (config.user_agent, config.verify_ssl, config.headers) == ("stageflow-websearch/0.1", True, {})
    assert (config.allow_private, config.cookies, config.http2, config.proxy) == (False, False, False, None)
    retry = config.retry
    assert (retry.max_retries, retry.retry_delay_seconds, retry.backoff_multiplier) == (3, 1.0, 2.0)
    assert (retry.max_delay_seconds, retry.retry_status_codes) == (30.0, frozenset({429, 500, 502, 503, 504}))


def test_defaults_of_extraction_navigation_and_client() -> None:
    config = ExtractionConfig()
    flags = [getattr(config, name) for name in config.to_dict() if name.startswith("preserve_")]
    assert flags == [True] * 7
    assert (config.max_link_text_length, config.max_heading_length, config.min_text_length) == (100, 200, 1)
    assert config.include_link_urls
    assert len(config.remove_selectors) == 16
    assert config.main_content_selectors[:3] == ("article", "main", '[role="main"]')
    navigation = NavigationConfig()
    assert (navigation.min_nav_links, navigation.max_actions) == (3, 20)
    assert navigation.content_selectors == config.main_content_selectors
    whole = WebSearchConfig()
    assert (whole.max_concurrent, whole.auto_extract, whole.auto_navigate) == (5, True, True)
    assert (CrawlConfig().max_pages, CrawlConfig().max_depth, CrawlConfig().same_domain) == (10, 2, True)


def test_configuration_goes_round_and_names_what_is_wrong() -> None:
    config = WebSearchConfig(fetch=FetchConfig(allow_hosts=("a.test",), headers={"x": "y"}), max_concurrent=2)
    assert WebSearchConfig.from_dict(config.to_dict()) == config
    with pytest.raises(DefinitionError, match="max_concurent"):
        WebSearchConfig.from_dict({"max_concurent": 2})
    with pytest.raises(DefinitionError, match="max_pages"):
        CrawlConfig(max_pages=0)


PAGE = WebPage(
    url="http://a.test/",
    final_url="http://a.test/x",
    status_code=200,
    markdown="# T",
    plain_text="T",
    metadata=PageMetadata(title="T", description="D", keywords=["k"]),
    links=[
        ExtractedLink(url="http://a.test/1", text="one", is_internal=True),
        ExtractedLink(url="http://b.test/2", text="two"),
        ExtractedLink(url="http://a.test/3", text="three", is_internal=True),
    ],
    headings=[HeadingOutline(level=1, text="T")],
    navigation_actions=[NavigationAction(action_type="next", label="n", url="http://a.test/2", metadata={"k": 1})],
    pagination=PaginationInfo(next_url="http://a.test/2", page_urls=["http://a.test/2"]),
    word_count=1,
)


@pytest.mark.parametrize(
    "value",
    [
        PAGE,
        PAGE.metadata,
        PAGE.links[0],
        PAGE.navigation_actions[0],
        PAGE.pagination,
        HeadingOutline(level=2, text="x", anchor="y"),
        ExtractionResult(markdown="m", links=PAGE.links, headings=PAGE.headings, tables=[[["a"]]]),
        NavigationResult(pagination=PAGE.pagination, actions=PAGE.navigation_actions),
        SearchResult(query="q", pages=[PAGE], relevance={"http://a.test/": 0.5}),
        FetchResult.from_text("grün", url="http://a.test/"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_models_go_round_through_dictionaries(value: WebPage) -> None:
    assert type(value).from_dict(value.to_dict()) == value
    assert type(value).from_dict({**value.to_dict(), "a_later_field": 1}) == value


def test_defaults_are_the_same_made_and_read() -> None:
    assert PaginationInfo() == PaginationInfo.from_dict({})
    assert PaginationInfo().current_page == 1
    assert not PaginationInfo().has_next
    assert PaginationInfo(prev_url="x").has_prev


def test_a_link_made_from_an_element() -> None:
    link = ExtractedLink.from_element("//B.test/x", "  t ", "https://a.test/")
    assert link == ExtractedLink(url="https://b.test/x", text="t", is_internal=False)
    inner = ExtractedLink.from_element("../y", "t", "https://a.test/p/q/")
    assert inner is not None
    assert (inner.url, inner.is_internal) == ("https://a.test/p/y", True)
    for nothing in ("#x", " #x", "mailto:a@b", "javascript:x"):
        assert ExtractedLink.from_element(nothing, "t", "https://a.test/") is None


def test_links_of_a_page_are_filtered() -> None:
    assert [link.text for link in PAGE.internal_links] == ["one", "three"]
    assert [link.text for link in PAGE.external_links] == ["two"]
    assert [link.text for link in PAGE.extract_links(internal_only=True, limit=1)] == ["one"]
    assert PAGE.extract_links(internal_only=True, external_only=True) == []
    assert len(PAGE.extract_links(limit=0)) == 0


def test_success_is_no_error_and_a_good_status() -> None:
    assert PAGE.success
    assert (PAGE.title, PAGE.description) == ("T", "D")
    failed = create_error_result("http://a.test/", "boom")
    assert (failed.success, failed.error, failed.final_url) == (False, "boom", "http://a.test/")
    assert not WebPage(url="x", status_code=404).success
    assert WebPage(url="x", status_code=304).success
    assert not FetchResult(status_code=304, final_url="x").is_success


def test_truncating_cuts_at_blank_lines_and_sentences() -> None:
    page = WebPage(url="x", markdown="first part\n\nsecond part", plain_text="One is. Two is. Three is.")
    assert page.truncate(100) is page
    short = page.truncate(18)
    assert short.markdown == "first part\n\n[Content truncated...]"
    assert short.plain_text == "One is. Two is."
    early = WebPage(url="x", markdown="a\n\n" + "b" * 50, plain_text="A. " + "b" * 50).truncate(20)
    assert early.markdown == "a\n\n" + "b" * 17 + "\n\n[Content truncated...]"
    assert early.plain_text == "A. " + "b" * 17
    assert WebPage(url="x", markdown="é" * 10).truncate(4).markdown.startswith("éééé\n\n")


def test_relevance() -> None:
    page = WebPage(url="x", plain_text="Async pipelines in Python", metadata=PageMetadata(title="Stageflow"))
    assert calculate_relevance_score(page, "python STAGEFLOW python absent") == pytest.approx(2 / 3)
    assert calculate_relevance_score(page, "") == 0.0
    other = WebPage(url="y", plain_text="python")
    ranked = filter_relevant_pages([other, page, WebPage(url="z")], "python async", threshold=0.5)
    assert [(found.url, score) for found, score in ranked] == [("x", 1.0), ("y", 0.5)]


def test_unique_links_delays_and_counts() -> None:
    assert [link.url for link in extract_unique_links([PAGE, PAGE])] == [link.url for link in PAGE.links]
    assert len(extract_unique_links([PAGE], internal_only=True)) == 2
    assert [calculate_retry_delay(n, base_delay=1, max_delay=5) for n in range(4)] == [1, 2, 4, 5]
    site = SiteMap(base_url="http://a.test", pages=[PAGE], internal_links=["x", "y"], depth_reached=2)
    assert (site.to_dict()["pages"], site.to_dict()["internal_links"], site.to_dict()["depth_reached"]) == (1, 2, 2)


def test_progress_counts() -> None:
    progress = FetchProgress()
    assert progress.percent == 0
    progress.total = 4
    progress.record_success("a")
    progress.record_error("boom", "b")
    assert (progress.percent, progress.succeeded, progress.failed, progress.errors) == (50, 1, 1, ["boom"])
    assert progress.to_dict()["percent"] == 50
    assert FetchProgress.from_dict(progress.to_dict()) == progress
