"""Keeps passwords out of the log, whoever writes the line."""

from __future__ import annotations

import logging
import re
from urllib.parse import unquote

from stream.settings import Settings
from stream.source_settings import SourceSettings

_USER_INFO = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)[^\s/@]+@", re.IGNORECASE)
_SECRET_QUERY = re.compile(
    r"[?&;](?:[a-z_-]*(?:token|pass|passwd|password|passphrase|pwd|secret|signature|sig|auth|key))=([^&;#\s]+)",
    re.IGNORECASE,
)
"""Values of a URL's query whose names say that they are secret."""
_MASK = "***"
_known: set[str] = set()


def register_secrets(settings: Settings) -> None:
    """Remember every password and token of the settings, as given and decoded."""
    for source in settings.sources:
        remember_source(source)
    if settings.redis.url is not None:
        _remember(_password(settings.redis.url.get_secret_value()))
    if settings.http.token is not None:
        _remember(settings.http.token.get_secret_value())
    for server in settings.webrtc.ice_servers:
        if server.credential is not None:
            _remember(server.credential.get_secret_value())


def remember_source(source: SourceSettings) -> None:
    """Remember the secrets of a source that came later."""
    url = source.url.get_secret_value()
    for secret in (_password(url), *_SECRET_QUERY.findall(url)):
        _remember(secret)
    if source.publish_token is not None:
        _remember(source.publish_token.get_secret_value())


def _password(url: str) -> str:
    return url.partition("://")[2].rpartition("@")[0].partition(":")[2]


def _remember(secret: str) -> None:
    # A password of one or two characters would blank out half of the log.
    _known.update(text for text in (secret, unquote(secret)) if len(text) > 2)


def without_secrets(text: str) -> str:
    """The text with the user info of addresses and all known secrets blanked out."""
    text = _USER_INFO.sub(rf"\g<scheme>{_MASK}@", text)
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, _MASK)
    return text


class SecretFilter(logging.Filter):
    """Blanks out secrets in every record, also those of libraries, and in the tracebacks that go with them."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrites the record; lets all pass."""
        record.msg, record.args = without_secrets(record.getMessage()), None
        if record.exc_info:
            record.exc_text = without_secrets(logging.Formatter().formatException(record.exc_info))
        return True
