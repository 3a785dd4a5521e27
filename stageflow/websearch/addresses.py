"""Which addresses may be reached: the policy against server-side request forgery. Pure: resolves and connects to
nothing.

`network` asks it at connect time, for every address a name resolves to, so a name that changes its mind between a
check and
a connect (DNS rebinding) gains nothing.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Final

from stageflow.core.errors import DefinitionError
from stageflow.websearch import urls
from stageflow.websearch.errors import AddressRefusedError, UrlRefusedError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# Metadata services of clouds that sit on addresses the registries call public.
_METADATA: Final = frozenset({ipaddress.ip_address("168.63.129.16"), ipaddress.ip_address("100.100.100.200")})
_NAT64: Final = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("64:ff9b:1::/48"))
_RELAY: Final = ipaddress.IPv4Network("192.88.99.0/24")
_SITE_LOCAL: Final = ipaddress.IPv6Network("fec0::/10")
_V4_COMPATIBLE: Final = ipaddress.IPv6Network("::/96")


def _inner(address: Address) -> list[Address]:
    """The IPv4 addresses that travel inside an IPv6 one: each must be allowed as well."""
    if isinstance(address, ipaddress.IPv4Address):
        return []
    found: list[Address] = []
    if address.ipv4_mapped is not None:
        found.append(address.ipv4_mapped)
    if address.sixtofour is not None:
        found.append(address.sixtofour)
    if address.teredo is not None:
        found.extend(address.teredo)
    if any(address in network for network in _NAT64) or (address in _V4_COMPATIBLE and int(address) > 1):
        found.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return found


def why_refused(address: Address) -> str | None:
    """What is wrong with reaching `address`, in one or two words; None when it is an ordinary public address."""
    if address in _METADATA:
        return "a metadata service"
    if address.is_loopback:
        return "loopback"
    if address.is_link_local:
        return "link-local"
    if address.is_multicast:
        return "multicast"
    if address.is_unspecified:
        return "unspecified"
    inner = _inner(address)
    for hidden in inner:
        reason = why_refused(hidden)
        if reason is not None:
            return f"{reason} inside IPv6"
    if inner and isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return None
    if isinstance(address, ipaddress.IPv4Address):
        if address in _RELAY:
            return "reserved"
    elif address in _SITE_LOCAL:
        return "private"
    if address.is_private:
        return "private"
    if address.is_reserved or not (address.is_global or inner):
        return "reserved"
    return None


class AddressPolicy:
    """Decides for one fetcher. Immutable, thread-safe."""

    def __init__(self, *, allow_private: bool = False, allow_hosts: Iterable[str] = ()) -> None:
        self.allow_private = allow_private
        self._names: set[tuple[str, int | None]] = set()
        self._networks: list[Network] = []
        for entry in allow_hosts:
            self._add(entry)

    def _add(self, entry: str) -> None:
        try:
            self._networks.append(ipaddress.ip_network(entry.strip().strip("[]"), strict=False))
            return
        except ValueError:
            pass
        parts = urls.parse(f"//{entry.strip()}")
        host = urls.host_of(f"http://{entry.strip()}/")
        if parts is None or not host or parts.path:
            raise DefinitionError(
                f"allow_hosts has {entry!r}, which is no host, host:port, address or network", field="allow_hosts"
            )
        self._names.add((host, parts.port))

    def names(self, host: str, port: int | None) -> bool:
        """Whether the user listed this very host (with this port, where the entry has one)."""
        wanted = host.lower().strip("[]").rstrip(".")
        return (wanted, None) in self._names or (wanted, port) in self._names

    def check(self, host: str, port: int | None, address: str) -> None:
        """Refuse `address`, to which `host` leads, unless it is public or allowed.

        Raises:
            AddressRefusedError: with the reason; never transient.
        """
        if self.allow_private or self.names(host, port):
            return
        try:
            found = ipaddress.ip_address(address.partition("%")[0])
        except ValueError:
            message = f"{host} leads to {address!r}, which is no address"
            raise AddressRefusedError(message, host=host, address=address) from None
        candidates = [found, *_inner(found)]
        if any(one in network for one in candidates for network in self._networks if one.version == network.version):
            return
        reason = why_refused(found)
        if reason is not None:
            leads = f"{host} leads to {address}" if host.strip("[]") != address else address
            raise AddressRefusedError(
                f"refused to connect: {leads} ({reason})",
                hint="list the host in allow_hosts, or set allow_private=True, if this is meant",
                host=host,
                address=address,
            )

    def check_url(self, url: str) -> str:
        """The normalised URL, if it may be asked for as far as its text tells.

        Raises:
            UrlRefusedError: not an absolute http(s) URL.
            AddressRefusedError: the host is an address that is refused.
        """
        clean = urls.normalize(url, keep_fragment=True)
        if clean is None:
            raise UrlRefusedError(f"not an absolute http or https URL: {url[:200]!r}", url=url)
        parts = urls.parse(clean)
        host = urls.host_of(clean)
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return clean
        port = parts.port if parts is not None and parts.port is not None else (443 if clean[4] == "s" else 80)
        self.check(host, port, host)
        return clean
