"""Media over HTTP: our own requests, so that each connection, at each redirect too, goes to a checked address."""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import re
import secrets
from dataclasses import replace
from urllib.parse import quote, urljoin
from urllib.request import parse_http_list, parse_keqv_list

from stream.errors import SourceError
from stream.ingest.address import Address, NotAnAddress, parse_address
from stream.ingest.bounds import MediaPatience
from stream.ingest.errors import Failure, map_os_error
from stream.ingest.http_wire import Body, Wire, exchange
from stream.ingest.link import Link, PatientSocket

MAX_REDIRECTS = 5
PORTS = {"http": 80, "https": 443}
_HASHES = {"MD5": "md5", "SHA-256": "sha256"}
_UNSAFE = re.compile(r"[^\x21\x24-\x3b\x3d\x3f-\x5b\x5d\x5f\x61-\x7a\x7e]")
"""What may not stand in a URL and is commonly found there all the same; ``%`` is kept."""

_DIGITS = re.compile(r"[0-9]{1,18}")
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-")


class HttpInput:
    """The body of one resource as a file that FFmpeg reads; requests it again from elsewhere when FFmpeg seeks.

    Making one sends the request. Raises ``SourceError`` when there is no body to read.
    """

    def __init__(self, link: Link, url: str, patience: MediaPatience, first: int = 0, last: int | None = None) -> None:
        """``first`` and ``last`` are the bytes wanted of it."""
        self._link = link
        self._patience = patience
        self._url = url
        self._first, self._last = first, last
        self._position = 0
        self._body = self._request(0)
        self.url = self._address(self._url).url(login=False)
        """Where it was found, after redirects; without user info."""
        self.content_type = self._body.headers.get_content_type()
        self._length = self._body_length()
        self._rewinds = self._length is not None and "bytes" in self._body.headers.get("Accept-Ranges", "")
        self._begin = b""
        self.closed = False

    def _body_length(self) -> int | None:
        text = self._body.headers.get("Content-Length", "")
        return int(text) if _DIGITS.fullmatch(text) else None

    @property
    def finite(self) -> bool:
        """Whether it is a file, not a stream."""
        return self._length is not None

    def peek(self, count: int) -> bytes:
        """The first bytes, without taking them."""
        while len(self._begin) < count and (more := self._read(count - len(self._begin))):
            self._begin += more
        return self._begin

    def read(self, size: int) -> bytes:
        """Some bytes, none at the end; raises nothing."""
        begin, self._begin = self._begin[:size], self._begin[size:]
        data = begin or self._read(size)
        self._position += len(data)
        return data

    def _read(self, size: int) -> bytes:
        try:
            return self._body.read(size)
        except (http.client.HTTPException, OSError, ValueError):
            self._patience.fail(self._link.failure(Failure.CONNECTION_LOST))
            return b""

    def seekable(self) -> bool:
        """Whether the server gives parts of it."""
        return self._rewinds

    def tell(self) -> int:
        """Where the next byte read stands."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Read from there next; -1 for where no byte is. Raises nothing, as ``read``."""
        length = self._length or 0
        target = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: length}.get(whence, -1) + offset
        if whence not in (io.SEEK_SET, io.SEEK_CUR, io.SEEK_END) or not 0 <= target <= length:
            return -1
        if target != self._position:
            self._begin = b""
            self._body.close()
            try:
                self._body = self._request(target)
            except SourceError as error:
                self._patience.fail(error)
            self._position = target
        return target

    def close(self) -> None:
        """Close the connection; reading is over."""
        self.closed = True
        self._body.close()

    def _request(self, offset: int) -> Body:
        """The answer to a request for the bytes from ``offset`` on, redirects followed. Raises ``SourceError``."""
        address = self._address(self._url)
        authorization: str | None = None
        for _ in range(MAX_REDIRECTS + 1):
            body = self._exchange(address, offset, authorization)
            if body.status in (301, 302, 303, 307, 308):
                body.close()
                address = self._redirected(address, body.headers.get("Location", ""))
                authorization = None
                continue
            if body.status == 401 and authorization is None and address.user is not None:
                body.close()
                authorization = _answer(body.headers.get_all("WWW-Authenticate", []), address)
                if authorization is not None:
                    continue
            if body.status == 206 or (body.status == 200 and not self._first + offset):
                self._url = address.url(login=False)
                self._check_part(body, offset)
                return body
            body.close()
            raise self._refused(body.status)
        raise self._link.failure(Failure.SERVER, f"more than {MAX_REDIRECTS} redirects; check the address")

    def _check_part(self, body: Body, offset: int) -> None:
        """Raise ``SourceError`` when the server sends another part than was asked for."""
        part = _CONTENT_RANGE.match(body.headers.get("Content-Range", ""))
        if part is not None and int(part[1]) != self._first + offset:
            body.close()
            raise self._link.failure(Failure.SERVER, "the server sends another part than it was asked for")

    def _address(self, url: str) -> Address:
        """Where to ask; the source's credentials go to its own server and to no other."""
        own = _parsed(self._link, self._link.url)
        target = _parsed(self._link, url)
        same = (own.scheme, own.host, own.port) == (target.scheme, target.host, target.port)
        return replace(target, user=own.user if same else None, password=own.password if same else None)

    def _redirected(self, address: Address, location: str) -> Address:
        try:
            joined = urljoin(address.url(login=False), location).partition("#")[0]
        except ValueError:
            raise self._link.failure(Failure.SERVER, "a redirect leads to no address; check the server") from None
        target = self._address(joined)
        if address.scheme == "https" and target.scheme == "http":
            raise self._link.failure(Failure.FORBIDDEN, "a redirect leads from HTTPS to HTTP; check the address")
        return target

    def _range(self, offset: int) -> str | None:
        first = self._first + offset
        if not first and self._last is None:
            return None
        return f"bytes={first}-{'' if self._last is None else self._last}"

    def _exchange(self, address: Address, offset: int, authorization: str | None) -> Body:
        headers: dict[str, str | bytes] = {"User-Agent": "sightwire", "Accept": "*/*", "Connection": "close"}
        if (wanted := self._range(offset)) is not None:
            headers["Range"] = wanted
        if authorization is not None:
            headers["Authorization"] = authorization.encode()
        secure = address.scheme == "https"
        if address.port == PORTS[address.scheme]:
            headers["Host"] = f"[{address.host}]" if ":" in address.host else address.host
        self._patience.next_resource()
        connection = self._link.connect(address.host, address.port, tls=secure)
        wire = Wire(PatientSocket(connection, self._link, self._patience), self._link, self._patience)
        try:
            return exchange(wire, address.host, address.port, _target(address), headers)
        except http.client.HTTPException:
            wire.close()
            raise self._patience.error or self._link.failure(self._silence()) from None
        except OSError as error:
            wire.close()
            raise self._patience.error or map_os_error(self._link.settings.id, self._link.url, error) from None

    def _silence(self) -> Failure:
        """What it means that the answer is none: cut off when stopped, else another language."""
        return Failure.CONNECTION_LOST if self._patience.over else Failure.NOT_UNDERSTOOD

    def _refused(self, status: int) -> SourceError:
        if status in (401, 403, 407):
            return self._link.failure(Failure.CREDENTIALS)
        if status in (404, 410):
            return self._link.failure(Failure.NOT_FOUND)
        if status == 200:
            return self._link.failure(Failure.SERVER, "the server gives no parts of files, where parts are needed")
        return self._link.failure(Failure.SERVER, f"the server answered with status {status}; look into its log")


def _parsed(link: Link, url: str) -> Address:
    scheme, colon, _ = url.partition("://")
    if not colon or scheme.lower() not in PORTS:
        raise link.failure(Failure.FORBIDDEN, f"leads to {scheme[:16]!r}, where only http:// and https:// are allowed")
    try:
        return parse_address(_UNSAFE.sub(lambda match: quote(match[0]), url), PORTS[scheme.lower()])
    except NotAnAddress as error:
        raise link.failure(Failure.BAD_URL, str(error)) from None


def _target(address: Address) -> str:
    return address.path if address.path.startswith("/") else f"/{address.path}"


def _answer(challenges: list[str], address: Address) -> str | None:
    """The ``Authorization`` header for the best challenge known (RFC 7616, RFC 7617); ``None`` when there is none."""
    user, password = address.user or "", address.password or ""
    for challenge in challenges:
        scheme, _, rest = challenge.partition(" ")
        if scheme.lower() == "digest" and (header := _digest(_fields(rest), address)):
            return header
    if any(challenge.split(" ")[0].lower() == "basic" for challenge in challenges):
        return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
    return None


def _fields(challenge: str) -> dict[str, str]:
    """The fields of a challenge; none when it is malformed."""
    try:
        return parse_keqv_list(parse_http_list(challenge))
    except (ValueError, IndexError):
        return {}


def _digest(challenge: dict[str, str], address: Address) -> str | None:
    algorithm = challenge.get("algorithm", "MD5")
    name = _HASHES.get(algorithm.upper())
    qops = [qop.strip() for qop in challenge.get("qop", "").split(",") if qop]
    if name is None or "nonce" not in challenge or (qops and "auth" not in qops):
        return None

    def digest(*parts: str) -> str:
        return hashlib.new(name, ":".join(parts).encode(), usedforsecurity=False).hexdigest()

    user, realm, nonce = address.user or "", challenge.get("realm", ""), challenge["nonce"]
    secret, target = digest(user, realm, address.password or ""), _target(address)
    fields = {"username": user, "realm": realm, "nonce": nonce, "uri": target}
    plain = {"algorithm": algorithm}
    if qops:
        count, own = "00000001", secrets.token_hex(8)
        fields["cnonce"] = own
        fields["response"] = digest(secret, nonce, count, own, "auth", digest("GET", target))
        plain |= {"qop": "auth", "nc": count}
    else:
        fields["response"] = digest(secret, nonce, digest("GET", target))
    if "opaque" in challenge:
        fields["opaque"] = challenge["opaque"]
    if any(ord(char) < 32 for value in (*fields.values(), algorithm) for char in value):
        return None
    quoted = [f'{key}="{_escaped(value)}"' for key, value in fields.items()]
    return "Digest " + ", ".join(quoted + [f"{key}={value}" for key, value in plain.items()])


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
