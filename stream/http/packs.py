"""Packs over HTTP: ``/v1/packs``, and swapping one while the service runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Body, HTTPException, Response
from pydantic import BaseModel, ConfigDict, ValidationError

from stream.clock import NS_PER_S
from stream.event_format import PackInfo
from stream.packs import FailedPack, ServedPack
from stream.settings import setting_error
from stream.swap import PackUnknown, Swap, SwapConflict, SwapRefused, SwapRequest, Swaps


class _Report(BaseModel):
    model_config = ConfigDict(frozen=True)


class HeadReport(_Report):
    """One answer of a pack."""

    name: str
    kind: str
    labels: tuple[str, ...]


class BranchReport(_Report):
    """One sliding window of a pack."""

    name: str
    mode: str
    window_s: float
    hop_s: float
    heads: tuple[HeadReport, ...]


class Identity(_Report):
    """Which pack, run how; events say the same."""

    name: str
    version: str
    sha256: str
    backend: str
    precision: str

    @classmethod
    def of(cls, info: PackInfo) -> Identity:
        """What events say of a pack."""
        return cls(
            name=info.name,
            version=info.version,
            sha256=info.sha256,
            backend=info.backend,
            precision=info.precision,
        )


class PackReport(_Report):
    """A pack of this service as clients see it."""

    name: str
    """What sources and this API call it; it stays when another pack takes its place."""
    state: str
    """``serving``; ``loading`` or ``comparing`` while another is tried in its place and it goes on serving;
    ``failed``."""
    cause: str
    """Why it failed; empty when it did not."""
    pack: Identity | None
    """What computes its windows; ``None`` when it failed."""
    branches: tuple[BranchReport, ...] = ()
    parity_max_abs_error: dict[str, float] = {}
    """Largest difference from PyTorch by graph, from the pack's parity report."""


class HeadDisagreementReport(_Report):
    """How far two packs are apart on one head; ``None`` for what does not apply to it."""

    windows: int
    disagreement: float
    """What ``max_disagreement`` bounds."""
    other_top: float | None
    other_side: float | None
    score_difference: float | None
    mask_agreement: float | None
    cosine: float | None


class SwapReport(_Report):
    """A swap as clients see it."""

    name: str
    """The pack whose place is taken."""
    phase: str
    """``loading``, ``comparing``, ``done`` or ``rolled_back``."""
    cause: str
    """Why it was rolled back; empty when it was not."""
    old: Identity
    new: Identity | None
    """``None`` until it is loaded."""
    progress: float
    """Share of the comparison that is over, 0..1."""
    compared_s: float
    """How long both have run."""
    windows: int
    """Windows that the new pack computed beside the old one."""
    old_ms_per_window: float | None
    new_ms_per_window: float | None
    """Mean time of a window on the same batches; ``None`` before there were enough."""
    heads: dict[str, HeadDisagreementReport]
    """Disagreement by head."""
    request: dict[str, Any]
    """What was asked for."""


def pack_report(pack: ServedPack, swap: Swap | None) -> PackReport:
    """What is known of a pack that serves."""
    branches = tuple(
        BranchReport(
            name=branch.name,
            mode=str(branch.mode),
            window_s=branch.window_ns / NS_PER_S,
            hop_s=branch.hop_ns / NS_PER_S,
            heads=tuple(HeadReport(name=h.name, kind=str(h.kind), labels=h.labels) for h in branch.heads),
        )
        for branch in pack.manifest.branches
    )
    return PackReport(
        name=pack.name,
        state=str(swap.phase) if swap is not None and swap.running else "serving",
        cause="",
        pack=Identity.of(pack.info),
        branches=branches,
        parity_max_abs_error=dict(pack.parity),
    )


def failure_report(pack: FailedPack) -> PackReport:
    """What is known of a pack that does not run."""
    return PackReport(name=pack.name, state="failed", cause=pack.cause, pack=None)


def swap_report(swap: Swap) -> SwapReport:
    """What is known of a swap now."""
    figures = swap.figures
    timed = figures.timed if figures is not None else 0
    heads = figures.heads if figures is not None else {}

    def ms(spent_ns: int) -> float | None:
        return round(spent_ns / timed / 1e6, 3) if timed else None

    return SwapReport(
        name=swap.name,
        phase=str(swap.phase),
        cause=swap.cause,
        old=Identity.of(swap.old),
        new=None if swap.new is None else Identity.of(swap.new),
        progress=round(swap.progress, 3),
        compared_s=round(swap.compared_ns / NS_PER_S, 3),
        windows=0 if figures is None else figures.windows,
        old_ms_per_window=None if figures is None else ms(figures.old_ns),
        new_ms_per_window=None if figures is None else ms(figures.new_ns),
        heads={
            head: HeadDisagreementReport(
                windows=found.windows,
                disagreement=found.share,
                other_top=found.other_top,
                other_side=found.other_side,
                score_difference=found.score_difference,
                mask_agreement=found.mask_agreement,
                cosine=found.cosine,
            )
            for head, found in heads.items()
        },
        request=swap.request.model_dump(mode="json"),
    )


def packs_router(
    packs: Callable[[], Sequence[ServedPack]], failed: Callable[[], Sequence[FailedPack]], swaps: Swaps
) -> APIRouter:
    """The resource. Every handler runs on the event loop, where packs are swapped."""
    router = APIRouter(prefix="/v1/packs")

    @router.get("")
    async def list_packs() -> list[PackReport]:
        """All packs of the settings."""
        serving = [pack_report(pack, swaps.latest(pack.name)) for pack in packs()]
        return serving + [failure_report(pack) for pack in failed()]

    @router.post("/{name}:swap", status_code=202)
    async def swap(
        name: str, response: Response, fields: Annotated[dict[str, Any] | None, Body()] = None
    ) -> SwapReport:
        """Begin to put another pack in its place; ``Location`` says where to look how it goes."""
        with _refusals():
            begun = await swaps.begin(name, SwapRequest.model_validate(fields or {}))
        response.headers["Location"] = f"/v1/packs/{name}/swap"
        return swap_report(begun)

    @router.get("/{name}/swap")
    async def show_swap(name: str) -> SwapReport:
        """The swap that is under way, or the last one."""
        with _refusals():
            found = swaps.latest(name)
            if found is None:
                swaps.known(name)
                raise HTTPException(404, f"pack {name} was not swapped since the service began")
            return swap_report(found)

    return router


@contextmanager
def _refusals() -> Iterator[None]:
    """The service's errors as answers."""
    try:
        yield
    except PackUnknown as error:
        raise HTTPException(404, str(error)) from None
    except SwapConflict as error:
        raise HTTPException(409, str(error)) from None
    except SwapRefused as error:
        raise HTTPException(422, str(error)) from None
    except ValidationError as error:
        raise HTTPException(422, setting_error(error)) from None
