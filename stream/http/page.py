"""The page at ``/``: what a person sees who opens the service's address in a browser. Made here, without scripts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from stream.clock import Clock
from stream.http.packs import PackReport, failure_report, pack_report
from stream.http.sources import SourceReport, report
from stream.packs import FailedPack, ServedPack
from stream.sources import Sources
from stream.swap import Swaps

REFRESH_S = 2
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24 }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 2rem }
th, td { text-align: left; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid #d8dde3; vertical-align: top }
td { overflow-wrap: anywhere } th { font-weight: 600; white-space: nowrap }
td:nth-child(2) { font-weight: 600; white-space: nowrap; overflow-wrap: normal }
.live, .serving { color: #1a7f37 } .failed { color: #b42318 } .ended, .paused { color: #6b7280 }
.connecting, .stalled, .backing_off, .loading, .comparing { color: #9a6700 }
small { display: block; color: #57606a } code { background: #f0f2f4; padding: .1rem .3rem }
@media (prefers-color-scheme: dark) {
  body { background: #14171a; color: #e3e6e8 } th, td { border-color: #343a40 } code { background: #262b30 }
  .live, .serving { color: #4ac26b } .failed { color: #ff8a80 } .connecting, .stalled, .backing_off { color: #e3b341 }
  a { color: #79b8ff } small { color: #9aa4ad }
}
"""


def page_router(
    sources: Sources,
    clock: Clock,
    packs: Callable[[], Sequence[ServedPack]],
    failed: Callable[[], Sequence[FailedPack]],
    swaps: Swaps,
) -> APIRouter:
    """The page. It runs on the event loop, where sources and packs change."""
    router = APIRouter()

    @router.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        """State of all sources and packs."""
        now = [report(one, clock, kept=sources.is_kept(one.settings)) for one in sources.values()]
        serving = [pack_report(pack, swaps.latest(pack.name)) for pack in packs()]
        return HTMLResponse(rendered(now, serving + [failure_report(pack) for pack in failed()]), headers=_HEADERS)

    return router


def rendered(sources: Sequence[SourceReport], packs: Sequence[PackReport]) -> str:
    """The page as HTML."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="refresh" content="{REFRESH_S}"><title>Sightwire</title><style>{_STYLE}</style></head><body>
<h1>Sightwire</h1>
<h2>Sources</h2>
{_table(("source", "state", "for", "lost", "frames", "address"), [_source(one) for one in sources])}
<h2>Packs</h2>
{_table(("pack", "state", "version", "runs on", "answers"), [_pack(one) for one in packs])}
<p>Events: <code>sightwire events --follow</code>.
Figures: <a href="/metrics">metrics</a>, <a href="/v1/sources">sources</a>, <a href="/v1/packs">packs</a> as JSON.</p>
<small>Looks again every {REFRESH_S} s.</small>
</body></html>
"""


def _table(titles: Sequence[str], rows: Sequence[str]) -> str:
    if not rows:
        return "<p>None yet: <code>sightwire sources add ID URL</code>.</p>"
    head = "".join(f"<th>{title}</th>" for title in titles)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _source(one: SourceReport) -> str:
    at_work = one.state in ("live", "ended", "paused")
    cells = (
        escape(one.id),
        _state(one.state),
        f"{one.since_s:.0f}&nbsp;s",
        str(sum(one.reconnects.values())),
        str(one.frames["decoded"]),
        escape(one.url)
        + (
            "" if at_work or not one.cause else f"<small>{escape(one.cause.removeprefix(f'source {one.id}: '))}</small>"
        ),
    )
    return _row(cells)


def _pack(one: PackReport) -> str:
    heads = ", ".join(head.name for branch in one.branches for head in branch.heads)
    cells = (
        escape(one.name),
        _state(one.state),
        "" if one.pack is None else escape(f"{one.pack.name} {one.pack.version}"),
        "" if one.pack is None else escape(f"{one.pack.backend} {one.pack.precision}"),
        escape(heads or one.cause),
    )
    return _row(cells)


def _state(state: str) -> str:
    return f'<span class="{escape(state)}">{escape(state.replace("_", " "))}</span>'


def _row(cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
