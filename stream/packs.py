"""The packs of a service: loaded once for each engine thread, and what sources and events need to know of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from engines.errors import EngineError
from engines.manifest import NS_PER_S, Manifest, VideoInput
from engines.open import LoadedPack, find_pack, open_pack
from engines.parity import read_parity
from stream.errors import SettingsError
from stream.event_format import PackInfo
from stream.inference import FeatureStore, PackRunner
from stream.sampling import distinct_inputs
from stream.settings import PackSettings, Settings, SourceSettings
from stream.windows import Watch


@dataclass(frozen=True, slots=True)
class ServedPack:
    """A pack as this service runs it."""

    manifest: Manifest
    """With the hop that the settings ask for."""
    info: PackInfo
    """For events."""
    copies: tuple[LoadedPack, ...]
    """One for each engine thread."""
    parity: Mapping[str, float]
    """Largest difference from PyTorch by graph, from the pack's report; empty without one."""


def load_packs(settings: Settings, home: Path) -> tuple[ServedPack, ...]:
    """Load every pack of the settings, once for each engine thread. Takes seconds; blocks.

    Raises ``SettingsError`` with the cause and the remedy.
    """
    packs = tuple(_load_pack(pack, settings.engine.threads, home) for pack in settings.packs)
    names = [pack.info.name for pack in packs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SettingsError(f"pack {twice[0]} is given twice; packs of one service need different names")
    return packs


def _load_pack(wanted: PackSettings, threads: int, home: Path) -> ServedPack:
    try:
        folder = find_pack(wanted.name, home)
        copies = [
            open_pack(
                folder,
                backend=wanted.backend,
                precision=wanted.precision,
                device=wanted.device,
                require_parity=wanted.require_parity,
            )
            for _ in range(threads)
        ]
    except EngineError as error:
        raise SettingsError(str(error)) from error
    first = copies[0]
    manifest = with_hop(first.manifest, wanted.hop_s)
    info = PackInfo(manifest.name, manifest.version, first.sha256, first.backend, first.precision)
    return ServedPack(manifest, info, tuple(copies), _parity(first))


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


def runners(packs: Sequence[ServedPack], thread: int, store: FeatureStore) -> dict[str, PackRunner]:
    """The packs of one engine thread."""
    return {pack.info.name: PackRunner(pack.copies[thread], store) for pack in packs}


def watches(packs: Sequence[ServedPack], source: SourceSettings) -> list[Watch]:
    """The branches that look at a source. Raises ``SettingsError`` when it names a pack that is not there."""
    known = {pack.info.name for pack in packs}
    if source.packs is not None and (unknown := sorted(set(source.packs) - known)):
        raise SettingsError(
            f"source {source.id}: pack {unknown[0]!r} is not among the packs ({', '.join(sorted(known))})"
        )
    chosen = known if source.packs is None else set(source.packs)
    return [
        Watch(pack.info.name, branch)
        for pack in packs
        if pack.info.name in chosen
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
