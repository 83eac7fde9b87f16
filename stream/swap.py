"""Replaces a pack while its service runs: the new one is loaded beside the old, tried on the same windows, and takes
over between two windows, or is let go.

While both run, the old one's results are published; the new one computes each batch once more after them. Whatever
speaks against the new one (it cannot be loaded, fails on a batch, is too slow for the sources that there are, says
something else too often) leaves everything as it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from engines.errors import EngineError, PackNotFound
from engines.manifest import Manifest, Precision, read_manifest
from engines.parity import decision_bound_of, mask_bound_of
from stream.clock import NS_PER_S, Clock
from stream.disagreement import HeadDisagreement
from stream.engine_pool import EnginePool, PackLoad
from stream.errors import SettingsError, SightwireError
from stream.event_format import PackInfo
from stream.packs import FailedPack, Generation, ServedPack, contract_difference, exported_pack, load_pack, with_hop
from stream.trial import PackTrial, TrialFigures

log = logging.getLogger(__name__)

POLL_S = 0.1
"""How often a comparison is looked at when no batch comes."""
MAX_DISAGREEMENT = 0.05
"""See ``SwapRequest.max_disagreement``."""
JUDGE_NS = 2 * NS_PER_S
"""A new pack's speed is judged after this long (or at the end of a shorter comparison)."""


class SwapRefused(SightwireError):
    """A swap cannot be begun; nothing has changed."""


class PackUnknown(SwapRefused):
    """No pack of that name is served, or none of that name has been exported."""


class SwapConflict(SwapRefused):
    """Another swap of the pack is under way, the pack does not run, or the new one does not fit in its place."""


class SwapRequest(BaseModel):
    """What is to take a pack's place, and when it may."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pack: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}$")] | None = None
    """Name of an exported pack; the folder that the served one came from when not given."""
    backend: Literal["auto", "onnxruntime", "openvino", "tensorrt"] | None = None
    """Backend; as now when not given."""
    precision: Precision | None = None
    """The least exact precision that may be used; as now when not given."""
    compare_s: Annotated[float, Field(ge=0, le=3600)] = 30.0
    """How long both run; 0 takes the new one over untried."""
    max_disagreement: Annotated[float, Field(ge=0, le=1)] | None = None
    """Largest share by which a head may disagree (see ``HeadDisagreement.share``). When not given: what the precisions
    may differ by in masks and in what is decided (``Swap.mask_share`` and ``Swap.decision_share``), but at least
    ``MAX_DISAGREEMENT``."""


class SwapPhase(StrEnum):
    """How far a swap is."""

    LOADING = "loading"
    COMPARING = "comparing"
    DONE = "done"
    ROLLED_BACK = "rolled_back"


def engines_needed(loads: Mapping[str, PackLoad], elapsed_ns: int, costs: Mapping[str, float]) -> float:
    """Engine threads that the windows of live sources keep busy.

    ``loads`` is the work of ``elapsed_ns``; ``costs`` puts nanoseconds a window in place of those measured.
    """
    busy_ns = 0.0
    for name, load in loads.items():
        measured = load.busy_ns / load.computed if load.computed else 0.0
        busy_ns += load.offered * costs.get(name, measured)
    return busy_ns / max(1, elapsed_ns)


@dataclass(slots=True, eq=False)
class Swap:
    """One swap, under way or over."""

    name: str
    """The pack that serves, by the name it serves under."""
    request: SwapRequest
    """What was asked for."""
    old: PackInfo
    """What served before."""
    began_ns: int
    """When it began (monotonic)."""
    phase: SwapPhase = SwapPhase.LOADING
    new: PackInfo | None = None
    """What is to serve; known once it is loaded."""
    mask_share: float = 0.0
    """Share of a mask's pixels in which the two packs may differ by their precisions alone."""
    decision_share: float = 0.0
    """Share of windows in which they may decide otherwise by their precisions alone."""
    compared_ns: int = 0
    """How long both have run."""
    figures: TrialFigures | None = None
    """What the comparison has found; ``None`` before it."""
    cause: str = ""
    """Why it was rolled back, in one line."""

    @property
    def running(self) -> bool:
        """Whether it is under way."""
        return self.phase in (SwapPhase.LOADING, SwapPhase.COMPARING)

    @property
    def progress(self) -> float:
        """Share of the comparison that is over, 0..1."""
        if self.phase is SwapPhase.DONE:
            return 1.0
        whole_ns = self.request.compare_s * NS_PER_S
        return min(1.0, self.compared_ns / whole_ns) if whole_ns else 0.0


class RolledBack(Exception):
    """Speaks against the new pack; the message is the cause."""


def judge(swap: Swap, figures: TrialFigures, loads: Mapping[str, PackLoad], threads: int) -> bool:
    """Whether the new pack may take over now. Raises ``RolledBack`` when something speaks against it.

    ``loads`` is what the pool has done since the comparison began.
    """
    request, elapsed_ns = swap.request, swap.compared_ns
    over = elapsed_ns >= request.compare_s * NS_PER_S
    if figures.error is not None:
        raise RolledBack(figures.error)
    if figures.timed and (over or elapsed_ns >= JUDGE_NS):
        new_ns, old_ns = figures.new_ns / figures.timed, figures.old_ns / figures.timed
        needed = engines_needed(loads, elapsed_ns, {swap.name: new_ns})
        if new_ns > old_ns and needed > threads:
            raise RolledBack(
                f"too slow: it takes {new_ns / 1e6:.1f} ms a window ({old_ns / 1e6:.1f} ms now), so the live sources "
                f"would need {needed:.2f} engine threads where there are {threads}; take a faster backend or precision"
            )
    if not over:
        return False
    if not figures.windows:
        raise RolledBack(
            f"no window came in {request.compare_s:g} s to compare on; start a source, compare for longer, "
            "or set compare_s to 0"
        )
    for head, found in figures.heads.items():
        allowed = _allowed(swap, found)
        if found.share > allowed:
            raise RolledBack(
                f"head {head} disagrees by {found.share:.1%} (over {found.windows} windows), more than the "
                f"{allowed:.1%} allowed; look at the new pack, or raise max_disagreement"
            )
    return True


def _allowed(swap: Swap, found: HeadDisagreement) -> float:
    if swap.request.max_disagreement is not None:
        return swap.request.max_disagreement
    if found.mask_agreement is not None:
        return max(MAX_DISAGREEMENT, swap.mask_share)
    return max(MAX_DISAGREEMENT, swap.decision_share if found.cosine is None else 0.0)


def mask_share(*packs: ServedPack) -> float:
    """Share of a mask's pixels in which the least exact of some packs may differ from PyTorch."""
    return _least_exact(mask_bound_of, packs)


def decision_share(*packs: ServedPack) -> float:
    """Share of windows in which the least exact of some packs may decide otherwise than PyTorch."""
    return _least_exact(decision_bound_of, packs)


def _least_exact(bound_of: Callable[[Manifest, str], float | None], packs: Sequence[ServedPack]) -> float:
    precisions = [(pack.manifest, name) for pack in packs for name in pack.info.precision.split("+")]
    bounds = [bound_of(manifest, name) for manifest, name in precisions]
    return max((1 - bound for bound in bounds if bound is not None), default=0.0)


class Swaps:
    """The swaps of a service: one of each pack at a time.

    ``serving`` are the packs at work by name, ``failed`` those that cannot be run; ``took_over`` is told, before its
    first window, of a generation that takes another's place; ``is_gone`` says whether a source runs no more.
    """

    def __init__(
        self,
        pool: EnginePool,
        serving: Mapping[str, Generation],
        failed: Mapping[str, FailedPack],
        took_over: Callable[[Generation], None],
        is_gone: Callable[[str], bool],
        home: Path,
        max_batch: int,
        clock: Clock,
    ) -> None:
        self._pool = pool
        self._serving = serving
        self._failed = failed
        self._took_over = took_over
        self._is_gone = is_gone
        self._home = home
        self._max_batch = max_batch
        self._clock = clock
        self._latest: dict[str, Swap] = {}
        self._tasks: dict[Swap, asyncio.Task[None]] = {}
        self._group: asyncio.TaskGroup | None = None
        self._ended: dict[Swap, set[str]] = {}
        self.outcomes: Counter[tuple[str, str]] = Counter()
        """Swaps that are over, by pack and last phase."""

    def attach(self, tasks: asyncio.TaskGroup | None) -> None:
        """Where swaps run; ``None``: no more are begun."""
        self._group = tasks

    async def aclose(self) -> None:
        """Roll back what is under way."""
        self._group = None
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def latest(self, name: str) -> Swap | None:
        """The swap of a pack that is under way, or its last one; ``None`` when there was none."""
        return self._latest.get(name)

    def all(self) -> list[Swap]:
        """The latest swap of each pack that was ever swapped."""
        return list(self._latest.values())

    def source_ended(self, source_id: str) -> None:
        """What a trial may still compute of a source that has ended is let go once the trial is over."""
        for swap in self._tasks:
            self._ended.setdefault(swap, set()).add(source_id)

    async def begin(self, name: str, request: SwapRequest) -> Swap:
        """Begin a swap; it goes on by itself. Raises ``PackUnknown``, ``SwapConflict`` or ``SwapRefused``."""
        old = self.known(name).pack
        self._free_group(name, old)
        folder = await asyncio.to_thread(self._folder, old, request)
        group = self._free_group(name, old)
        swap = self._latest[name] = Swap(name, request, old.info, self._clock.monotonic_ns())
        task = group.create_task(self._run(swap, folder), name=f"swap {name}")
        self._tasks[swap] = task
        task.add_done_callback(lambda _: self._tasks.pop(swap, None))
        return swap

    def _free_group(self, name: str, old: ServedPack) -> asyncio.TaskGroup:
        """Where a swap may run now. Raises ``SwapConflict``."""
        latest = self._latest.get(name)
        if self._group is None:
            raise SwapConflict("the service is ending or not yet started; try again when it is ready")
        if (latest is not None and latest.running) or self._serving[name].pack is not old:
            raise SwapConflict(f"pack {name} is being swapped already; wait until that is over")
        return self._group

    def known(self, name: str) -> Generation:
        """What serves under a name. Raises ``PackUnknown``, or ``SwapConflict`` for a pack that cannot be run."""
        if name in self._failed:
            raise SwapConflict(f"pack {name} does not run ({self._failed[name].cause}); start the service anew")
        if name not in self._serving:
            raise PackUnknown(f"no pack {name!r} is served (there are: {', '.join(sorted(self._serving))})")
        return self._serving[name]

    def _folder(self, old: ServedPack, request: SwapRequest) -> Path:
        try:
            folder = old.copies[0].folder if request.pack is None else exported_pack(request.pack, self._home)
            manifest = with_hop(read_manifest(folder), old.wanted.hop_s)
        except PackNotFound as error:
            raise PackUnknown(str(error)) from error
        except (EngineError, SettingsError) as error:
            raise SwapRefused(str(error)) from error
        _check_fits(old, manifest)
        return folder

    async def _run(self, swap: Swap, folder: Path) -> None:
        old = self._serving[swap.name]
        log.info("pack %s: loading %s beside it", swap.name, folder.name)
        try:
            new = await asyncio.to_thread(self._load, old.pack, swap.request, folder)
            await self._take_over(swap, old, new)
        except (RolledBack, SwapRefused, EngineError, SettingsError) as error:
            self._end(swap, SwapPhase.ROLLED_BACK, str(error))
            log.error("pack %s: stays as it is, the swap was rolled back: %s", swap.name, error)
        except asyncio.CancelledError:
            if swap.running:
                self._end(swap, SwapPhase.ROLLED_BACK, "the service ended")
            raise
        finally:
            self._ended.pop(swap, None)

    def _load(self, old: ServedPack, request: SwapRequest, folder: Path) -> Generation:
        """Raises ``EngineError``, ``SettingsError`` or ``SwapConflict``."""
        changes = {"backend": request.backend, "precision": request.precision}
        wanted = old.wanted.model_copy(
            update={"name": str(folder)} | {key: value for key, value in changes.items() if value is not None}
        )
        pack = load_pack(wanted, len(old.copies), folder, old.name)
        try:
            _check_fits(old, pack.manifest)
            new = Generation(pack)
            new.warm_up(self._max_batch)
            return new
        except BaseException:
            for copy in pack.copies:
                copy.close()
            raise

    async def _take_over(self, swap: Swap, old: Generation, new: Generation) -> None:
        swap.new, swap.mask_share = new.pack.info, mask_share(old.pack, new.pack)
        swap.decision_share = decision_share(old.pack, new.pack)
        try:
            await self._compare(swap, old, new)
        except BaseException:
            self._pool.end_trial(swap.name)
            await self._pool.retire(new)
            raise
        # Nothing is awaited from here to the end of the cut, so no window can come in between.
        self._took_over(new)
        self._pool.cut_over(swap.name, new)
        self._end(swap, SwapPhase.DONE)
        log.info("pack %s: %s %s took over", swap.name, new.pack.info.name, new.pack.info.version)
        await self._pool.retire(old)
        self._forget_ended(swap, new)

    async def _compare(self, swap: Swap, old: Generation, new: Generation) -> None:
        """Returns when the new pack may take over. Raises ``RolledBack``."""
        if swap.request.compare_s == 0:
            return
        loop, moved = asyncio.get_running_loop(), asyncio.Event()

        def has_moved() -> None:
            loop.call_soon_threadsafe(moved.set)

        trial = PackTrial(old, new, self._clock, has_moved)
        before, began_ns = self._pool.loads(), self._clock.monotonic_ns()
        swap.phase = SwapPhase.COMPARING
        self._pool.try_on(swap.name, trial)
        while True:
            swap.compared_ns = self._clock.monotonic_ns() - began_ns
            swap.figures = trial.figures()
            loads = {name: load.since(before[name]) for name, load in self._pool.loads().items()}
            if judge(swap, swap.figures, loads, self._pool.threads):
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await moved.wait()
            moved.clear()

    def _forget_ended(self, swap: Swap, new: Generation) -> None:
        for source_id in self._ended.pop(swap, set()):
            if self._is_gone(source_id):
                new.store.forget(source_id)

    def _end(self, swap: Swap, phase: SwapPhase, cause: str = "") -> None:
        swap.phase, swap.cause = phase, cause
        self.outcomes[swap.name, str(phase)] += 1


def _check_fits(old: ServedPack, manifest: Manifest) -> None:
    if difference := contract_difference(old.manifest, manifest):
        raise SwapConflict(
            f"pack {manifest.name} {manifest.version} cannot take the place of {old.name}: {difference}; "
            "start the service anew with it"
        )
