"""The page that a person opens in a browser."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from stream.http.packs import PackReport
from stream.http.page import rendered
from stream.http.sources import SourceReport
from tests.stream.test_sources import CANARY, LIVE, serving


class Page(HTMLParser):
    """All tags and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def source(source_id: str, state: str, cause: str) -> SourceReport:
    return SourceReport(
        id=source_id, url="rtsp://camera/x", state=state, since_s=3.2, cause=cause, attempts=1, next_retry_s=0.5,
        reconnects={"ended": 2}, failed_attempts={}, frames={"decoded": 7}, av_skew_s=None, kept=True, settings={},
    )  # fmt: skip


def test_what_is_wrong_stands_with_the_source_or_pack() -> None:
    failed = PackReport(name="mine", state="failed", cause="pack mine: graph window is truncated", pack=None)
    page = Page(
        rendered([source("gate", "backing_off", "connection refused"), source("yard", "live", "lost")], [failed])
    )
    for text in ("gate", "backing off", "connection refused", "2", "7", "mine", "failed", failed.cause):
        assert text in page.texts
    assert "lost" not in page.texts[page.texts.index("yard") :], "what is over is not wrong now"


def test_nothing_that_somebody_else_wrote_becomes_markup() -> None:
    evil = "<script>alert(1)</script>"
    page = Page(
        rendered([source(evil, "failed", evil)], [PackReport(name=evil, state="failed", cause=evil, pack=None)])
    )
    assert "script" not in page.tags
    assert page.texts.count(evil) == 4


def test_without_a_source_it_says_how_to_add_one() -> None:
    assert "sightwire sources add" in rendered([], [])


async def test_the_page_shows_what_runs(tiny_pack: Path, tmp_path: Path) -> None:
    async with serving(tiny_pack, tmp_path) as run:
        await run.client.post("/v1/sources", json={"id": "a", "url": LIVE})
        away = f"rtsp://u:{CANARY}@192.0.2.1/x"
        await run.client.post("/v1/sources", json={"id": "b", "url": away, "open_timeout_s": 0.5})
        await run.until("a", "live")
        answer = await run.client.get("/")
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
        page = Page(answer.text)
        for text in ("a", "live", "b", "rtsp://192.0.2.1/x", "tiny", "serving"):
            assert text in page.texts
        assert CANARY not in answer.text
        assert (await run.client.get("/nothing")).json()["detail"] == "there is no /nothing; docs/api.md lists what is"
