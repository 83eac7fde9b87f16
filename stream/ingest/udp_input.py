"""MPEG-TS over UDP, to one address or to a group: datagrams as a file that FFmpeg reads."""

from __future__ import annotations

import ipaddress
import socket
import struct
from urllib.parse import parse_qs, urlsplit

from stream.ingest.bounds import MediaPatience
from stream.ingest.errors import Failure, map_os_error
from stream.ingest.link import POLL_S, Link

BUFFER_BYTES = 4 << 20
"""Asked of the system, which may grant less: a key frame comes as a burst."""
_LARGEST = 65_536


class UdpInput:
    """Listens at ``udp://address:port``; a group is joined, on ``?localaddr=`` where given."""

    def __init__(self, link: Link, patience: MediaPatience) -> None:
        """Raises ``SourceError`` when the address is none of this machine's, or is taken."""
        self._link = link
        self._patience = patience
        try:
            parts = urlsplit(link.url.replace("udp://@", "udp://", 1))
            host, port = parts.hostname or "0.0.0.0", parts.port or 0
            where = ipaddress.ip_address(host)
            local = parse_qs(parts.query).get("localaddr", ["0.0.0.0"])[0]
        except ValueError:
            port = 0
        if not port:
            raise link.failure(Failure.BAD_URL, "expected udp://ADDRESS:PORT, the address by number")
        try:
            self._socket = _listen(where, port, local)
        except OSError as error:
            raise map_os_error(link.settings.id, link.url, error) from None
        self._socket.settimeout(POLL_S)

    def read(self, size: int) -> bytes:
        """One datagram, or nothing at the end."""
        while self._patience.wait_more():
            try:
                data = self._socket.recv(_LARGEST)
            except TimeoutError:
                continue
            except OSError as error:
                self._patience.fail(map_os_error(self._link.settings.id, self._link.url, error))
                break
            if data:
                self._patience.got_bytes(len(data))
                # FFmpeg reads as much as a datagram can hold; a larger one is no stream for it.
                return data[:size]
        return b""

    def close(self) -> None:
        """Leave the group, free the port."""
        self._socket.close()


def _listen(where: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int, local: str) -> socket.socket:
    family = socket.AF_INET if where.version == 4 else socket.AF_INET6
    listener = socket.socket(family, socket.SOCK_DGRAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        if where.is_multicast:
            # Several sources, and other programs, may listen to one group.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((str(where), port))
        if where.is_multicast and where.version == 4:
            member = where.packed + socket.inet_aton(local)
            listener.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
        elif where.is_multicast:
            member = where.packed + struct.pack("@I", 0)
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, member)
    except OSError:
        listener.close()
        raise
    return listener
