"""What of an address can be refused before anything is connected to: all that does not take a name server."""

from __future__ import annotations

from ipaddress import ip_address

from stream.errors import SettingsError
from stream.ingest.address import AddressGuard, NotAnAddress, parse_address
from stream.source_settings import NETWORK_SCHEMES, SourceSettings, Transport

REMEDY = "the operator can allow its network in api.networks, or name the source in the configuration file"
_ANY_PORT = 1


def check_admission(settings: SourceSettings, guard: AddressGuard) -> None:
    """Refuse a source of the API whose address is wrong, or not allowed, whatever a name server says.

    A name is not resolved: what it stands for is checked at each connection. Raises ``SettingsError``.
    """
    if settings.trusted or settings.scheme not in NETWORK_SCHEMES:
        return
    if settings.scheme in ("rtsp", "rtsps") and settings.transport is Transport.UDP:
        raise SettingsError("transport: sources that come through the API get RTP over TCP only; leave it out")
    try:
        host = parse_address(settings.url.get_secret_value(), _ANY_PORT).host
    except NotAnAddress as error:
        raise SettingsError(f"url: {error}") from None
    if not _may_be_allowed(host, guard):
        raise SettingsError(f"url: {host} may not be reached by sources that come through the API; {REMEDY}")


def _may_be_allowed(host: str, guard: AddressGuard) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        # By RFC 6761 these are this machine, and no name server is asked.
        return any(guard.allows(ip_address(own)) for own in ("127.0.0.1", "::1"))
    try:
        ip = ip_address(host)
    except ValueError:
        return True
    return guard.allows(ip)
