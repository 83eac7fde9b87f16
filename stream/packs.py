"""The packs of a service: loaded once for each engine thread, and what sources and events need to know of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from engines.errors import EngineError, GraphLoadError, InferenceError, ManifestError, PackNotFound
from engines.manifest import MANIFEST_FILE, NS_PER_S, Branch, HeadKind, Manifest, VideoInput, read_manifest
from engines.open import PACKS_FOLDER, LoadedPack, find_pack, open_pack
from engines.parity import read_parity
from stream.errors import SettingsError
from stream.event_format import PackInfo
from stream.gpu import pictures_on
from stream.inference import PackRunner
from stream.memory import SourceMemory
from stream.sampling import distinct_inputs
from stream.settings import PackSettings, Settings
from stream.source_settings import SourceSettings
from stream.types import ClipWindow, Prediction
from stream.windows import Watch

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServedPack:
    """A pack as this service runs it."""

    name: str
    """What sources, windows and the API call it; it stays when another pack takes its place."""
    wanted: PackSettings
    """What it was loaded by."""
    manifest: Manifest
    """With the hop that the settings ask for."""
    info: PackInfo
    """For events."""
    copies: tuple[LoadedPack, ...]
    """One for each engine thread."""
    parity: Mapping[str, float]
    """Largest difference from PyTorch by graph, from the pack's report; empty without one."""


@dataclass(frozen=True, slots=True)
class FailedPack:
    """A pack of the settings that this service cannot run."""

    name: str
    """What it would be called."""
    cause: str
    """One line: pack, graph and remedy."""

    def tell(self) -> None:
        """Say so in the log."""
        log.error("pack %s does not run, the others go on without it: %s", self.name, self.cause)


class Generation:
    """A served pack at work: a runner for each engine thread, and the features and states of its own.

    Two generations of one pack share nothing, so that what one engine computed never reaches another.
    """

    def __init__(self, pack: ServedPack) -> None:
        self.pack = pack
        self.store = SourceMemory(pictures=pictures_on(pack.wanted.device, pack.manifest.branches))
        self.runners = tuple(PackRunner(copy, self.store) for copy in pack.copies)

    def warm_up(self, max_batch: int) -> None:
        """Meet every lazy set-up before the first real window; blocks. Raises ``EngineError``."""
        with self._within_memory(f"batches of {max_batch}"):
            for runner in self.runners:
                runner.warmup(max_batch)

    def run(self, thread: int, branch: str, windows: tuple[ClipWindow, ...]) -> list[list[Prediction]]:
        """Predictions per window, computed on the engine thread of that number. Raises ``InferenceError``."""
        with self._within_memory(f"a batch of {len(windows)}"):
            return self.runners[thread].run(branch, windows)

    @contextmanager
    def _within_memory(self, what: str) -> Iterator[None]:
        try:
            yield
        except MemoryError as error:
            raise InferenceError(
                f"pack {self.pack.info.name}: out of memory on {what}; use a smaller engine.max_batch"
            ) from error

    def close(self) -> None:
        """Free the engines; idempotent."""
        for runner in self.runners:
            runner.close()


OnFailure = Callable[[FailedPack], None]


def load_packs(settings: Settings, home: Path, on_failure: OnFailure | None = None) -> tuple[ServedPack, ...]:
    """Load every pack of the settings, once for each engine thread. Takes seconds; blocks.

    ``on_failure`` is told of each that cannot be loaded, and the others are loaded nevertheless. Raises
    ``SettingsError`` with the cause and the remedy for a setting that does not fit, when no pack can be loaded, and
    without ``on_failure`` when one cannot.
    """
    packs: list[ServedPack] = []
    failures: list[FailedPack] = []
    for wanted in settings.packs:
        try:
            packs.append(load_pack(wanted, settings.engine.threads, find_pack(wanted.name, home)))
        except EngineError as error:
            if on_failure is None:
                raise SettingsError(str(error)) from error
            failures.append(FailedPack(_name_of(wanted, home), str(error)))
    names = [pack.name for pack in packs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SettingsError(f"pack {twice[0]} is given twice; packs of one service need different names")
    if failures and not packs:
        raise SettingsError(failures[0].cause)
    if on_failure is not None:
        for failure in failures:
            on_failure(failure)
    return tuple(packs)


def _name_of(wanted: PackSettings, home: Path) -> str:
    """A name for a pack that cannot be loaded: its manifest's where that can be read."""
    try:
        return read_manifest(find_pack(wanted.name, home)).name
    except EngineError:
        return Path(wanted.name).name


def load_pack(wanted: PackSettings, threads: int, folder: Path, name: str | None = None) -> ServedPack:
    """Load one pack, once for each engine thread; blocks. ``name`` is what to call it, by default its own name.

    Raises ``EngineError``, or ``SettingsError`` for a hop that does not fit.
    """
    copies: list[LoadedPack] = []
    try:
        for _ in range(threads):
            copies.append(_open(wanted, threads, folder))
        first = copies[0]
        manifest = with_hop(first.manifest, wanted.hop_s)
        _check_labels(manifest)
        info = PackInfo(manifest.name, manifest.version, first.sha256, first.backend, first.precision)
        return ServedPack(name or manifest.name, wanted, manifest, info, tuple(copies), _parity(first))
    except BaseException:
        for copy in copies:
            copy.close()
        raise


def _open(wanted: PackSettings, threads: int, folder: Path) -> LoadedPack:
    try:
        return open_pack(
            folder,
            backend=wanted.backend,
            precision=wanted.precision,
            device=wanted.device,
            engines=threads,
            require_parity=wanted.require_parity,
        )
    except MemoryError as error:
        raise GraphLoadError(
            f"pack {wanted.name}: out of memory while it is loaded; give the service more, or fewer engine.threads"
        ) from error


def _check_labels(manifest: Manifest) -> None:
    """Raise ``ManifestError`` when a graph scores another number of labels than its head has."""
    for branch in manifest.branches:
        outputs = {tensor.name: tensor for tensor in manifest.graph(branch.graph).outputs}
        for head in branch.heads:
            size = outputs[head.output].shape[-1]
            if head.kind in (HeadKind.ACTION, HeadKind.CLASS) and size != len(head.labels):
                raise ManifestError(
                    f"pack {manifest.name}: graph {branch.graph}: output {head.output} has {size} scores, head "
                    f"{head.name} has {len(head.labels)} labels; export the pack again"
                )


def exported_pack(name: str, home: Path) -> Path:
    """Folder of an exported pack by its name; a path is none. Raises ``PackNotFound`` naming those that there are."""
    known = {path.parent.name: path.parent for path in (home / PACKS_FOLDER).glob(f"*/{MANIFEST_FILE}")}
    if name not in known:
        there = f"there are: {', '.join(sorted(known))}" if known else "there is none yet"
        raise PackNotFound(f"no exported pack {name!r} ({there}); run `sightwire export`")
    return known[name]


def contract_difference(old: Manifest, new: Manifest) -> str | None:
    """How the windows and heads of two packs differ; ``None`` where one can take the other's place.

    Backbones, modes, graphs, thresholds and temperatures may differ.
    """
    before, after = ({branch.name: branch for branch in manifest.branches} for manifest in (old, new))
    if before.keys() != after.keys():
        return f"its branches are {', '.join(sorted(after))}, not {', '.join(sorted(before))}"
    for name, branch in before.items():
        if difference := _branch_difference(branch, after[name]):
            return f"branch {name}: {difference}"
    return None


def _branch_difference(old: Branch, new: Branch) -> str | None:
    for what in ("window_ns", "hop_ns"):
        before, after = getattr(old, what), getattr(new, what)
        if before != after:
            return f"its {what.removesuffix('_ns')} is {after / NS_PER_S:g} s, not {before / NS_PER_S:g} s"
    if old.video != new.video or old.audio != new.audio:
        return "it samples video or audio in another way"
    heads = {head.name: head for head in new.heads}
    if heads.keys() != {head.name for head in old.heads}:
        return f"its heads are {', '.join(sorted(heads))}, not {', '.join(sorted(head.name for head in old.heads))}"
    for head in old.heads:
        if heads[head.name].kind is not head.kind:
            return f"head {head.name} is of kind {heads[head.name].kind}, not {head.kind}"
        if heads[head.name].labels != head.labels:
            return f"head {head.name} has other labels, or the same in another order"
    return None


def _parity(pack: LoadedPack) -> dict[str, float]:
    report = read_parity(pack.folder)
    if report is None:
        return {}
    # ``auto`` may run each graph on another backend.
    specs = {name: engine.spec for name, engine in pack.engines.items()}
    entries = {
        graph.name: report.entry(graph, specs[graph.name].backend, specs[graph.name].precision)
        for graph in pack.manifest.graphs
    }
    return {name: entry.max_abs_error for name, entry in entries.items() if entry is not None}


def with_hop(manifest: Manifest, hop_s: float | None) -> Manifest:
    """The manifest with another hop for its first branch. Raises ``SettingsError`` for one that does not fit."""
    if hop_s is None:
        return manifest
    fields = manifest.model_dump()
    fields["branches"][0]["hop_ns"] = round(hop_s * NS_PER_S)
    try:
        return Manifest.model_validate(fields)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise SettingsError(f"pack {manifest.name}: hop_s {hop_s:g} does not fit: {reason}") from None


def watches(packs: Sequence[ServedPack], source: SourceSettings, failed: Collection[str] = ()) -> list[Watch]:
    """The branches that look at a source. Raises ``SettingsError`` when it names a pack that is not there.

    It may name one of those that ``failed``; nothing of that looks at it.
    """
    known = {pack.name for pack in packs}
    if source.packs is not None and (unknown := sorted(set(source.packs) - known - set(failed))):
        raise SettingsError(
            f"source {source.id}: pack {unknown[0]!r} is not among the packs ({', '.join(sorted(known))})"
        )
    chosen = known if source.packs is None else set(source.packs)
    return [
        Watch(pack.name, branch)
        for pack in packs
        if pack.name in chosen
        for branch in with_hop(pack.manifest, source.hop_s).branches
    ]


def video_inputs(watched: Sequence[Watch]) -> tuple[VideoInput, ...]:
    """What is sampled of a source's video."""
    return distinct_inputs(watch.branch.video for watch in watched if watch.branch.video is not None)


def audio_rate(source: SourceSettings, watched: Sequence[Watch]) -> int | None:
    """Rate that a source's audio is resampled to; ``None`` when nobody listens.

    Raises ``SettingsError`` when packs want different rates.
    """
    if not source.audio:
        return None
    rates = {watch.branch.audio.sample_rate for watch in watched if watch.branch.audio is not None}
    if len(rates) > 1:
        raise SettingsError(
            f"source {source.id}: its packs want audio at {sorted(rates)} Hz; give them sources of their own"
        )
    return next(iter(rates), None)
