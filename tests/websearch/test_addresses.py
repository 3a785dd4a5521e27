"""No request reaches a private address unless it was allowed: by literal, by name, by redirect, by rebinding."""

import ipaddress
import pickle
from collections.abc import Callable

import pytest

from stageflow.core.errors import DefinitionError
from stageflow.websearch import (
    AddressPolicy,
    AddressRefusedError,
    FetchConfig,
    FetchError,
    FetchRetryConfig,
    HttpxFetcher,
)
from stageflow.websearch.addresses import why_refused
from tests.websearch.conftest import Site

SAFE = FetchConfig(respect_robots=False, retry=FetchRetryConfig(max_retries=0))


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "127.9.9.9",
            "10.0.0.1",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "0.0.0.0",
            "100.64.0.1",
        ),
        *("224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "192.88.99.1", "168.63.129.16"),
        *("100.100.100.200", "::1", "::", "fe80::1", "fc00::1", "fd00:ec2::254", "ff02::1", "fec0::1", "2001:db8::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "::7f00:1"),
    ],
)
def test_every_address_that_is_not_public_is_refused(address: str) -> None:
    assert why_refused(ipaddress.ip_address(address)) is not None
    with pytest.raises(AddressRefusedError):
        AddressPolicy().check("host.test", 80, address)


@pytest.mark.parametrize("address", ["93.184.216.34", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses_pass(address: str) -> None:
    assert why_refused(ipaddress.ip_address(address)) is None
    AddressPolicy().check("host.test", 80, address)


def test_allowed_hosts_open_only_what_they_name() -> None:
    policy = AddressPolicy(allow_hosts=["intra.test", "db.test:8080", "10.1.0.0/16", "::1"])
    policy.check("INTRA.test", 443, "10.9.9.9")
    policy.check("db.test", 8080, "10.9.9.9")
    policy.check("other.test", 80, "10.1.2.3")
    policy.check("other.test", 80, "::1")
    for host, port, address in (
        ("db.test", 80, "10.9.9.9"),
        ("x.intra.test", 80, "10.9.9.9"),
        ("other.test", 80, "10.2.0.1"),
    ):
        with pytest.raises(AddressRefusedError):
            policy.check(host, port, address)
    with pytest.raises(DefinitionError):
        AddressPolicy(allow_hosts=["http://what/"])


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "2130706433", "0x7f.1", "127.1", "0177.0.0.1", "LOCALHOST."],
)
async def test_loopback_is_refused_in_every_spelling(site: Site, host: str) -> None:
    site.page("/", "never seen")
    async with HttpxFetcher(SAFE) as fetcher:
        with pytest.raises(FetchError) as caught:
            await fetcher.fetch(f"http://{host}:{site.port}/")
    # an octal number is no address at all to the URL library, which refuses it before ours does
    assert isinstance(caught.value, AddressRefusedError) or "Invalid IPv4" in str(caught.value)
    assert site.requests == []


async def test_a_name_that_leads_to_loopback_is_refused_and_an_allowed_one_is_not(site: Site) -> None:
    site.page("/", "inside")

    async def resolver(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    async with HttpxFetcher(SAFE, resolver=resolver) as fetcher:
        with pytest.raises(AddressRefusedError, match=r"innocent\.test leads to 127\.0\.0\.1 \(loopback\)") as caught:
            await fetcher.fetch(f"http://innocent.test:{site.port}/")
    assert not caught.value.transient
    assert "allow_hosts" in str(caught.value.hint)
    async with HttpxFetcher(SAFE.replace(allow_hosts=("innocent.test",)), resolver=resolver) as fetcher:
        assert (await fetcher.fetch(f"http://innocent.test:{site.port}/")).text == "inside"


async def test_one_private_answer_among_public_ones_refuses_the_name(site: Site) -> None:
    async def resolver(host: str, port: int) -> list[str]:
        return ["93.184.216.34", "10.0.0.7"]

    async with HttpxFetcher(SAFE, resolver=resolver) as fetcher:
        with pytest.raises(AddressRefusedError, match=r"10\.0\.0\.7"):
            await fetcher.fetch("http://two-faced.test/")


async def test_a_name_that_changes_its_mind_gains_nothing(site: Site) -> None:
    """Rebinding: what is connected to is what was checked; a name is resolved once per connection."""
    site.page("/", "secret", connection="close")
    asked: list[str] = []

    async def resolver(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) > 1 else ["127.0.0.2"]

    listed = SAFE.replace(allow_hosts=("127.0.0.2",))
    async with HttpxFetcher(listed, resolver=resolver) as fetcher:
        with pytest.raises(
            FetchError, match="rebind"
        ) as first:  # 127.0.0.2 passes the check, and nothing listens there
            await fetcher.fetch(f"http://rebind.test:{site.port}/")
        assert not isinstance(first.value, AddressRefusedError)
        with pytest.raises(AddressRefusedError):
            await fetcher.fetch(f"http://rebind.test:{site.port}/")
    assert len(asked) == 2
    assert site.requests == []


async def test_a_redirect_to_a_private_address_is_refused(site: Site, make_site: Callable[[], Site]) -> None:
    inside = make_site()
    inside.page("/metadata", "secret")
    site.redirect("/by-address", f"http://127.0.0.1:{inside.port}/metadata")
    site.redirect("/by-name", f"http://localhost:{inside.port}/metadata")
    site.redirect("/by-cloud", "http://169.254.169.254/latest/meta-data/")
    only_this = SAFE.replace(allow_hosts=(f"127.0.0.1:{site.port}",))
    async with HttpxFetcher(only_this) as fetcher:
        for path in ("/by-address", "/by-name", "/by-cloud"):
            with pytest.raises(AddressRefusedError):
                await fetcher.fetch(site.url + path)
    assert len(site.requests) == 3
    assert inside.requests == []


async def test_robots_txt_may_not_redirect_inside_either(site: Site, make_site: Callable[[], Site]) -> None:
    inside = make_site()
    site.redirect("/robots.txt", f"http://localhost:{inside.port}/robots.txt")
    polite = SAFE.replace(respect_robots=True, allow_hosts=(f"127.0.0.1:{site.port}",))
    async with HttpxFetcher(polite) as fetcher:
        with pytest.raises(AddressRefusedError):
            await fetcher.fetch(site.url + "/")
    assert inside.requests == []


def test_the_error_travels_between_processes() -> None:
    with pytest.raises(AddressRefusedError) as caught:
        AddressPolicy().check("h.test", 80, "10.0.0.1")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.message, copy.hint, copy.address) == (caught.value.message, caught.value.hint, "10.0.0.1")
