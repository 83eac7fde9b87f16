from __future__ import annotations

import errno

import av.error
import pytest

from stream.clock import ManualClock
from stream.errors import SourceError
from stream.ingest.errors import Failure, failure, map_av_error
from stream.ingest.open import open_source
from stream.source_settings import SourceSettings

URL = "rtsp://admin:canary@camera.invalid:554/live?token=canary"


def made(kind: type[av.error.FFmpegError], code: int = 5) -> av.error.FFmpegError:
    return kind(code, "said FFmpeg", URL)


@pytest.mark.parametrize(
    ("kind", "reason", "retryable"),
    [
        (av.error.HTTPUnauthorizedError, Failure.CREDENTIALS, False),
        (av.error.HTTPForbiddenError, Failure.CREDENTIALS, False),
        (av.error.HTTPNotFoundError, Failure.NOT_FOUND, True),
        (av.error.HTTPServerError, Failure.SERVER, True),
        (av.error.ConnectionRefusedError, Failure.REFUSED, True),
        (av.error.ConnectionResetError, Failure.CONNECTION_LOST, True),
        (av.error.TimeoutError, Failure.TIMEOUT, True),
        (av.error.ExitError, Failure.TIMEOUT, True),
        (av.error.InvalidDataError, Failure.NOT_UNDERSTOOD, True),
        (av.error.EOFError, Failure.ENDED, True),
        (av.error.OSError, Failure.NO_SUCH_HOST, True),
        (av.error.UnknownError, Failure.NO_SUCH_HOST, True),
    ],
)
def test_each_error_has_a_reason_and_no_secret(
    kind: type[av.error.FFmpegError], reason: Failure, retryable: bool
) -> None:
    error = map_av_error("cam", URL, made(kind))
    assert (error.reason, error.retryable) == (reason.value, retryable)
    message = str(error)
    assert message.startswith("source cam: rtsp://camera.invalid:554/live: ")
    assert "canary" not in message
    assert "\n" not in message


def test_what_a_resolvable_host_fails_with_is_not_blamed_on_its_name() -> None:
    error = map_av_error("cam", "rtsp://127.0.0.1/x", made(av.error.OSError))
    assert error.reason == Failure.IO.value
    error = map_av_error("cam", "rtsp://127.0.0.1/x", made(av.error.OSError, errno.EHOSTUNREACH))
    assert error.reason == Failure.UNREACHABLE.value


def test_every_reason_says_what_to_do() -> None:
    for reason in Failure:
        error = failure("cam", URL, reason)
        assert len(str(error)) > len("source cam: rtsp://camera.invalid:554/live: ") + 10


def test_a_file_never_gets_better_by_itself() -> None:
    assert not any(failure("cam", "clip.mp4", reason).retryable for reason in Failure)


@pytest.mark.parametrize(
    "url", ["rtsp://host:99999/x", "rtsp://:554/x", "rtsp:///x", "rtsp://u:canary@[::1/x", "rtsp://u:canary@host:0/x"]
)
def test_an_address_that_names_no_host_is_refused_before_anything_is_opened(url: str) -> None:
    with pytest.raises(SourceError) as caught:
        open_source(SourceSettings.model_validate({"id": "cam", "url": url}), (), None, ManualClock())
    assert (caught.value.reason, caught.value.retryable) == (Failure.BAD_URL, False)
    assert "canary" not in str(caught.value)
