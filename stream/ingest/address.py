"""Addresses of network sources: read strictly, resolved once, checked, and connected to as checked.

What comes through the API is guarded: a name is resolved here, every address it stands for is held against the
networks that are allowed, and the connection goes to an address that passed. Nothing resolves the name again, so a
name server that answers differently the next time gains nothing.
"""

from __future__ import annotations

import errno
import os
import re
import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from urllib.parse import quote, unquote

from stream.types import StopFlag

IpAddress = IPv4Address | IPv6Address
IpNetwork = IPv4Network | IPv6Network
Endpoint = tuple[int, tuple[str, int]]
"""Address family, and host and port by number."""

STAGGER_S = 0.25
"""How long an address may be silent before the next one is tried too, and how often the stop flag is looked at."""
FORBIDDEN: tuple[IpNetwork, ...] = tuple(
    ip_network(text)
    for text in (
        "0.0.0.0/8",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "224.0.0.0/4",
        "240.0.0.0/4",
        "::/128",
        "::1/128",
        "fe80::/10",
        "fec0::/10",
        "ff00::/8",
        # Metadata services of clouds that lie outside the link-local networks.
        "100.100.100.200/32",
        "168.63.129.16/32",
        "192.0.0.192/32",
        "fd00:ec2::254/128",
    )
)
"""This machine, its links and its cloud: no camera lives there, and much that trusts its neighbours does."""

_NAT64 = ip_network("64:ff9b::/96")
_COMPATIBLE = ip_network("::/96")

_URL = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://"
    r"(?:(?P<user>(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*)"
    r"(?::(?P<password>(?:[A-Za-z0-9._~!$&'()*+,;=:-]|%[0-9A-Fa-f]{2})*))?@)?"
    r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))"
    r"(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/[^\s#\\\x00-\x20\x7f-\U0010ffff]*|\?[^@\s#\\\x00-\x20\x7f-\U0010ffff]*)?"
)
"""A URL that no two programs read differently: ASCII, one user info, no backslash, fragment or zone."""
_NUMERIC = re.compile(r"(?:.*\.)?(?:0[xX][0-9A-Fa-f]*|[0-9]+)")
"""A host whose last label is a number: an IPv4 address, in whatever notation."""


class NotAnAddress(ValueError):
    """The text is no address that can be connected to; the message says why, without quoting it."""


class Forbidden(Exception):
    """The address lies in a network that is not allowed; the message names host and address."""


@dataclass(frozen=True, slots=True)
class Address:
    """A URL in parts. ``user`` and ``password`` are decoded, and not shown."""

    scheme: str
    """Lower case."""
    host: str
    """A name without a trailing dot, or an IP address without brackets."""
    port: int
    path: str
    """With the query; empty when there is none."""
    user: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)

    @property
    def authority(self) -> str:
        """Host and port as they stand in a URL."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def url(self, scheme: str | None = None, authority: str | None = None, *, login: bool = True) -> str:
        """The URL again, with parts exchanged."""
        info = ""
        if login and self.user is not None:
            info = quote(self.user, safe="")
            info += "@" if self.password is None else f":{quote(self.password, safe='')}@"
        return f"{scheme or self.scheme}://{info}{authority or self.authority}{self.path}"


def parse_address(url: str, default_port: int) -> Address:
    """The parts of a URL. Raises ``NotAnAddress`` for one that could be read in more than one way."""
    match = _URL.fullmatch(url)
    if match is None:
        raise NotAnAddress("expected scheme://[user:password@]host[:port]/path, special characters percent-encoded")
    port = int(match["port"] or default_port)
    if not 0 < port < 65536:
        raise NotAnAddress("the port must lie between 1 and 65535")
    return Address(
        scheme=match["scheme"].lower(),
        host=_host(match["v6"], match["name"]),
        port=port,
        path=match["path"] or "",
        user=None if match["user"] is None else unquote(match["user"]),
        password=None if match["password"] is None else unquote(match["password"]),
    )


def _host(v6: str | None, name: str | None) -> str:
    if v6 is not None:
        try:
            return str(IPv6Address(v6))
        except ValueError:
            raise NotAnAddress("what stands in brackets is no IPv6 address") from None
    host = (name or "").removesuffix(".").lower()
    if not host or any(not label for label in host.split(".")):
        raise NotAnAddress("the host has an empty part")
    if _NUMERIC.fullmatch(host):
        try:
            return str(IPv4Address(host))
        except ValueError:
            raise NotAnAddress("write an IPv4 address as four decimal numbers") from None
    return host


class AddressGuard:
    """Says which addresses may be connected to.

    Without ``networks`` that is everything but ``FORBIDDEN``. With them only what lies in one of them, and what is
    forbidden only by a network that lies wholly within the forbidden one: ``0.0.0.0/0`` does not open loopback,
    ``127.0.0.0/8`` does.
    """

    def __init__(self, networks: Sequence[IpNetwork] | None = None) -> None:
        self._networks = networks

    def allows(self, ip: IpAddress) -> bool:
        """Whether the address, and every IPv4 address that it stands for, may be connected to."""
        return all(self._allows(address) for address in (ip, *_embedded(ip)))

    def _allows(self, ip: IpAddress) -> bool:
        holding = [net for net in self._networks or () if ip in net]
        special = [net for net in FORBIDDEN if ip in net]
        if special:
            return any(_within(net, outer) for net in holding for outer in special)
        # An IPv4 address inside an IPv6 one was checked as what it is; the wrapping needs no network of its own.
        return self._networks is None or bool(holding) or bool(_embedded(ip))


def _within(net: IpNetwork, outer: IpNetwork) -> bool:
    if isinstance(net, IPv4Network):
        return isinstance(outer, IPv4Network) and net.subnet_of(outer)
    return isinstance(outer, IPv6Network) and net.subnet_of(outer)


def _embedded(ip: IpAddress) -> tuple[IPv4Address, ...]:
    """IPv4 addresses that packets to an IPv6 address may end up at."""
    if isinstance(ip, IPv4Address):
        return ()
    if ip.ipv4_mapped is not None:
        return (ip.ipv4_mapped,)
    if ip.sixtofour is not None:
        return (ip.sixtofour,)
    if ip.teredo is not None:
        return ip.teredo
    if ip in _NAT64 or (ip in _COMPATIBLE and int(ip) > 1):
        return (IPv4Address(int(ip) & 0xFFFFFFFF),)
    return ()


def endpoints(host: str, port: int, guard: AddressGuard | None) -> list[Endpoint]:
    """Where a host can be reached, by number; with a guard only what it allows.

    Raises ``Forbidden`` when nothing is left, ``OSError`` when the name cannot be resolved.
    """
    found: list[Endpoint] = []
    refused: list[str] = []
    for family, _, _, _, where in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        if family not in (socket.AF_INET, socket.AF_INET6):
            continue
        number = str(where[0])
        # A zone id names a link of this machine: no such address is ever allowed.
        if guard is not None and ("%" in number or not guard.allows(ip_address(number))):
            refused.append(number)
        elif (family, (number, port)) not in found:
            found.append((family, (number, port)))
    if not found and refused:
        raise Forbidden(f"{host} is at {refused[0]}, which sources that come through the API may not reach")
    return found


def connect(host: str, port: int, guard: AddressGuard | None, timeout_s: float, stop: StopFlag) -> socket.socket:
    """A TCP connection to the address that answers first; ``timeout_s`` for all of them.

    They are tried in the system's order, the next one when those before have failed or said nothing for ``STAGGER_S``
    (as RFC 8305, 5 has it). Raises ``Forbidden``, or ``OSError``: that of the last one to fail, ``TimeoutError`` when
    one is silent, ``ConnectionAbortedError`` when told to stop.
    """
    with selectors.DefaultSelector() as calls:
        try:
            connection = _first_answer(endpoints(host, port, guard), calls, timeout_s, stop)
            calls.unregister(connection)
        finally:
            for call in calls.get_map().values():
                _socket(call).close()
    connection.settimeout(timeout_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _first_answer(
    untried: list[Endpoint], calls: selectors.BaseSelector, timeout_s: float, stop: StopFlag
) -> socket.socket:
    failed = OSError("the name has no address")
    until_s = time.monotonic() + timeout_s
    while untried or calls.get_map():
        if stop.is_set():
            raise ConnectionAbortedError(errno.ECONNABORTED, "told to stop")
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(errno.ETIMEDOUT, "no address answers")
        if untried and (code := _call(untried.pop(0), calls)):
            failed = OSError(code, os.strerror(code))
            continue
        for answered, _ in calls.select(min(STAGGER_S, left_s)):
            connection = _socket(answered)
            code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if not code:
                return connection
            failed = OSError(code, os.strerror(code))
            calls.unregister(connection)
            connection.close()
    raise failed


def _call(endpoint: Endpoint, calls: selectors.BaseSelector) -> int:
    """Begin to connect; the error's number where that fails at once, else 0."""
    family, where = endpoint
    connection = socket.socket(family, socket.SOCK_STREAM)
    connection.setblocking(False)
    code = connection.connect_ex(where)
    if code not in (0, errno.EINPROGRESS):
        connection.close()
        return code
    calls.register(connection, selectors.EVENT_WRITE)
    return 0


def _socket(call: selectors.SelectorKey) -> socket.socket:
    assert isinstance(call.fileobj, socket.socket)
    return call.fileobj
