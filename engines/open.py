"""Opening a pack: find it, check it, choose a backend, load its graphs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from engines import backends
from engines.auto import Candidate, fastest
from engines.backends import EngineOptions
from engines.cache import ENGINES_FOLDER, user_cache
from engines.errors import PackNotFound
from engines.manifest import MANIFEST_FILE, Manifest, check_integrity, read_manifest
from engines.parity import check_parity, read_parity
from engines.split import in_parts
from engines.states import state_outputs
from engines.types import Engine

PACKS_FOLDER = "packs"
"""Where named packs lie under the home folder."""


@dataclass(frozen=True, slots=True, eq=False)
class LoadedPack:
    """A pack with an engine for each of its graphs, ready for one thread."""

    folder: Path
    """Where it was read from."""
    manifest: Manifest
    """What it is."""
    sha256: str
    """Identity of its content."""
    backend: str
    """Backend of its engines; of several, all joined by ``+``."""
    precision: str
    """Precision of its engines; of several, all joined by ``+``. Each engine's ``spec`` has its own."""
    engines: Mapping[str, Engine]
    """Engine by graph name."""

    def close(self) -> None:
        """Free the engines; idempotent."""
        for engine in self.engines.values():
            engine.close()


def find_pack(name_or_path: str | Path, home: Path) -> Path:
    """Folder of a pack: for a bare name ``home/packs/NAME``, or else a folder of that name here; else the path itself.

    Raises ``PackNotFound`` naming the packs that there are.
    """
    text = str(name_or_path)
    bare = isinstance(name_or_path, str) and Path(text).name == text
    folder = home / PACKS_FOLDER / text if bare else Path(name_or_path).expanduser()
    if (folder / MANIFEST_FILE).is_file():
        return folder
    if bare and (Path(text) / MANIFEST_FILE).is_file():
        return Path(text)
    known = sorted(path.parent.name for path in (home / PACKS_FOLDER).glob(f"*/{MANIFEST_FILE}"))
    there = f"there are: {', '.join(known)}" if known else "there is none yet"
    raise PackNotFound(f"no pack {text!r} at {folder} ({there}); run `sightwire export`, or name a pack's folder")


def open_pack(
    folder: Path,
    *,
    backend: str = "auto",
    precision: str = "fp32",
    threads: int = 1,
    engines: int = 1,
    device: str = "cpu",
    require_parity: bool = True,
    cache: Path | None = None,
    keep_compiled: bool = False,
) -> LoadedPack:
    """Load every graph of the pack in ``folder`` on one backend.

    Call it once for each engine thread: engines have one owner. ``auto`` takes for each graph what is
    fastest in this precision or a more exact one, measured once on this machine and remembered under
    ``cache`` (by default the user's cache folder); ``engines`` says how many such packs will run at once, which
    decides that too. ``keep_compiled`` keeps compiled engines there too, as
    is always done for TensorRT, which compiles for seconds. Engines without passing parity are refused
    unless ``require_parity`` is off.

    Raises ``PackNotFound``, ``ManifestError``, ``PackIntegrityError``, ``BackendUnavailable``,
    ``GraphLoadError``, ``ParityMissing`` or ``ParityFailed``.
    """
    manifest = read_manifest(folder)
    check_integrity(folder, manifest)
    report = read_parity(folder) if require_parity else None
    cache = cache or user_cache()
    compiled = cache / ENGINES_FOLDER if cache is not None and (keep_compiled or device != "cpu") else None
    options = EngineOptions(precision, threads, device, compiled, engines)
    if backend == "auto":
        choice = fastest(folder, manifest, report, options, require_parity=require_parity, cache=cache)
    else:
        choice = {graph.name: (backend, precision) for graph in manifest.graphs}
        if require_parity:
            backends.adapter(backend)
            check_parity(report, manifest, backend, precision)
    loaded = _load_chosen(folder, manifest, choice, options)
    split = {name: in_parts(engine, manifest.graph(name), device) for name, engine in loaded.items()}
    chosen, precisions = ("+".join(sorted(set(names))) for names in zip(*choice.values(), strict=True))
    return LoadedPack(folder, manifest, manifest.sha256(), chosen, precisions, MappingProxyType(split))


def load_engines(folder: Path, manifest: Manifest, backend: str, options: EngineOptions) -> dict[str, Engine]:
    """An engine for each graph; if one fails, those loaded before it are closed."""
    return _load_chosen(folder, manifest, {g.name: (backend, options.precision) for g in manifest.graphs}, options)


def _load_chosen(
    folder: Path, manifest: Manifest, choice: Mapping[str, Candidate], options: EngineOptions
) -> dict[str, Engine]:
    engines: dict[str, Engine] = {}
    with ExitStack() as loaded:
        for graph in manifest.graphs:
            backend, precision = choice[graph.name]
            wanted = replace(options, precision=precision, states=state_outputs(manifest, graph.name))
            engine = backends.load(folder / graph.file, manifest.name, graph, backend, wanted)
            loaded.callback(engine.close)
            engines[graph.name] = engine
        # All are there: they stay open.
        loaded.pop_all()
    return engines
