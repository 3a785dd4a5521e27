"""Nothing of the web extra is loaded before it is used, and what is missing is named."""

import subprocess
import sys

import pytest

import stageflow.websearch as websearch

HEAVY = "('httpx', 'httpcore', 'lxml', 'protego', 'cssselect', 'charset_normalizer', 'trafilatura', 'click')"


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_loads_no_library() -> None:
    code = (
        "import sys, stageflow, stageflow.websearch as w\n"
        "for name in w.__all__: getattr(w, name)\n"
        "w.WebSearchConfig(); w.LxmlExtractor(); w.MockFetcher(); w.FetchStage(); w.ExtractStage()\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    assert python(code) == "[]"


BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {names!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Blocked())
import asyncio, stageflow.websearch as w
try:
    {action}
except w.MissingExtraError as error:
    print(error.code, error.module, error.hint)
"""


WEB = "pip install stageflow[web]"
FETCH = "asyncio.run(w.HttpxFetcher(w.FetchConfig(http2=True)).fetch('http://a.test/'))"
SOCKS = "asyncio.run(w.HttpxFetcher(w.FetchConfig(proxy='socks5://a.test:1')).fetch('http://b.test/'))"
READ = "w.LxmlExtractor().extract('<p>x', 'http://a.test/')"
CLEVER = "w.TrafilaturaExtractor().extract('<p>', 'http://a.test/')"
PLAIN = "print(w.FallbackExtractor().extract('<p>plain', 'http://a.test/').markdown)"


@pytest.mark.parametrize(
    ("names", "action", "said"),
    [
        ({"httpx"}, FETCH, f"SF-WEB-MISSING-EXTRA httpx {WEB}"),
        ({"lxml"}, READ, f"SF-WEB-MISSING-EXTRA lxml {WEB}"),
        ({"cssselect"}, READ, f"SF-WEB-MISSING-EXTRA cssselect {WEB}"),
        ({"h2"}, FETCH, "SF-WEB-MISSING-EXTRA h2 pip install httpx[http2]"),
        ({"socksio"}, SOCKS, "SF-WEB-MISSING-EXTRA socksio pip install httpx[socks]"),
        ({"trafilatura"}, CLEVER, "SF-WEB-MISSING-EXTRA trafilatura pip install stageflow[extract]"),
        ({"httpx", "lxml"}, PLAIN, "plain"),
    ],
)
def test_without_the_extra_the_first_use_says_what_to_install(names: set[str], action: str, said: str) -> None:
    assert python(BLOCK.format(names=sorted(names), action=action)) == said


def test_every_public_name_exists() -> None:
    for name in websearch.__all__:
        assert getattr(websearch, name).__module__.startswith("stageflow.websearch")
    assert set(websearch.__all__) <= set(dir(websearch))
    with pytest.raises(AttributeError, match="NoSuchThing"):
        _ = websearch.NoSuchThing
