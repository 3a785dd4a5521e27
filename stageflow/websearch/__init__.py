"""Fetching, reading and searching the web as stages; needs the `web` extra.

Stands on the runtime. May not import: `stageflow.helpers`, `stageflow.tools`, testing, report, cli, demo.
Nothing here imports httpx, lxml or protego before something is fetched or read; without them the first use says
`pip install stageflow[web]`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stageflow.websearch.addresses import AddressPolicy as AddressPolicy
    from stageflow.websearch.client import WebClient as WebClient
    from stageflow.websearch.config import CrawlConfig as CrawlConfig
    from stageflow.websearch.config import ExtractionConfig as ExtractionConfig
    from stageflow.websearch.config import FetchConfig as FetchConfig
    from stageflow.websearch.config import FetchRetryConfig as FetchRetryConfig
    from stageflow.websearch.config import NavigationConfig as NavigationConfig
    from stageflow.websearch.config import WebSearchConfig as WebSearchConfig
    from stageflow.websearch.errors import AddressRefusedError as AddressRefusedError
    from stageflow.websearch.errors import BadResponseError as BadResponseError
    from stageflow.websearch.errors import FetchError as FetchError
    from stageflow.websearch.errors import FetchTimeoutError as FetchTimeoutError
    from stageflow.websearch.errors import MissingExtraError as MissingExtraError
    from stageflow.websearch.errors import RobotsDisallowedError as RobotsDisallowedError
    from stageflow.websearch.errors import SelectorError as SelectorError
    from stageflow.websearch.errors import TooManyRedirectsError as TooManyRedirectsError
    from stageflow.websearch.errors import UrlRefusedError as UrlRefusedError
    from stageflow.websearch.extract import ContentExtractor as ContentExtractor
    from stageflow.websearch.extract import LxmlExtractor as LxmlExtractor
    from stageflow.websearch.extract import TrafilaturaExtractor as TrafilaturaExtractor
    from stageflow.websearch.fallback import FallbackExtractor as FallbackExtractor
    from stageflow.websearch.fallback import FallbackNavigator as FallbackNavigator
    from stageflow.websearch.fetcher import Fetcher as Fetcher
    from stageflow.websearch.fetcher import FetchObserver as FetchObserver
    from stageflow.websearch.fetcher import HttpxFetcher as HttpxFetcher
    from stageflow.websearch.fetcher import NoOpObserver as NoOpObserver
    from stageflow.websearch.journal import CrawlJournal as CrawlJournal
    from stageflow.websearch.mock import MockFetcher as MockFetcher
    from stageflow.websearch.models import CodeBlock as CodeBlock
    from stageflow.websearch.models import ExtractedLink as ExtractedLink
    from stageflow.websearch.models import ExtractionResult as ExtractionResult
    from stageflow.websearch.models import FetchProgress as FetchProgress
    from stageflow.websearch.models import FetchResult as FetchResult
    from stageflow.websearch.models import HeadingOutline as HeadingOutline
    from stageflow.websearch.models import NavigationAction as NavigationAction
    from stageflow.websearch.models import NavigationResult as NavigationResult
    from stageflow.websearch.models import PageMetadata as PageMetadata
    from stageflow.websearch.models import PaginationInfo as PaginationInfo
    from stageflow.websearch.models import SearchResult as SearchResult
    from stageflow.websearch.models import SiteMap as SiteMap
    from stageflow.websearch.models import WebPage as WebPage
    from stageflow.websearch.navigate import LxmlNavigator as LxmlNavigator
    from stageflow.websearch.navigate import Navigator as Navigator
    from stageflow.websearch.run import ExtractionPool as ExtractionPool
    from stageflow.websearch.run import calculate_relevance_score as calculate_relevance_score
    from stageflow.websearch.run import calculate_retry_delay as calculate_retry_delay
    from stageflow.websearch.run import create_error_result as create_error_result
    from stageflow.websearch.run import extract_all_links as extract_all_links
    from stageflow.websearch.run import extract_unique_links as extract_unique_links
    from stageflow.websearch.run import fetch_pages as fetch_pages
    from stageflow.websearch.run import fetch_with_retry as fetch_with_retry
    from stageflow.websearch.run import filter_relevant_pages as filter_relevant_pages
    from stageflow.websearch.run import map_site as map_site
    from stageflow.websearch.run import search_and_extract as search_and_extract
    from stageflow.websearch.stages import CrawlSource as CrawlSource
    from stageflow.websearch.stages import ExtractStage as ExtractStage
    from stageflow.websearch.stages import FetchStage as FetchStage
    from stageflow.websearch.stages import JournalSink as JournalSink
    from stageflow.websearch.urls import extract_domain as extract_domain
    from stageflow.websearch.urls import same_domain as same_domain

_NAMES = {
    "addresses": ("AddressPolicy",),
    "client": ("WebClient",),
    "config": (
        *("CrawlConfig", "ExtractionConfig", "FetchConfig", "FetchRetryConfig", "NavigationConfig"),
        "WebSearchConfig",
    ),
    "errors": (
        *("AddressRefusedError", "BadResponseError", "FetchError", "FetchTimeoutError", "MissingExtraError"),
        *("RobotsDisallowedError", "SelectorError", "TooManyRedirectsError", "UrlRefusedError"),
    ),
    "extract": ("ContentExtractor", "LxmlExtractor", "TrafilaturaExtractor"),
    "fallback": ("FallbackExtractor", "FallbackNavigator"),
    "fetcher": ("FetchObserver", "Fetcher", "HttpxFetcher", "NoOpObserver"),
    "journal": ("CrawlJournal",),
    "mock": ("MockFetcher",),
    "models": (
        *("CodeBlock", "ExtractedLink", "ExtractionResult", "FetchProgress", "FetchResult", "HeadingOutline"),
        *(
            "NavigationAction",
            "NavigationResult",
            "PageMetadata",
            "PaginationInfo",
            "SearchResult",
            "SiteMap",
            "WebPage",
        ),
    ),
    "navigate": ("LxmlNavigator", "Navigator"),
    "run": (
        *("ExtractionPool", "calculate_relevance_score", "calculate_retry_delay", "create_error_result"),
        *("extract_all_links", "extract_unique_links", "fetch_pages", "fetch_with_retry", "filter_relevant_pages"),
        *("map_site", "search_and_extract"),
    ),
    "stages": ("CrawlSource", "ExtractStage", "FetchStage", "JournalSink"),
    "urls": ("extract_domain", "same_domain"),
}
_HOME = {name: f"stageflow.websearch.{module}" for module, names in _NAMES.items() for name in names}
__all__ = sorted(_HOME)  # noqa: PLE0605 - the table above is the one list

if not TYPE_CHECKING:  # hidden from checkers, or they would accept any name

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOME[name]), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
