"""The base pack on a GPU, from frames to answers: ``python -m bench.gpu [--json PATH] [--pack PATH] [--seconds N]``.

Runs from a checkout alone on any machine with a CUDA device. What the figures mean stands in docs/gpu.md.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console

from bench.common import BenchError, Measured, Row, machine, show, write_json
from bench.gpu_load import Probe, Unmeasured, open_probe, watched
from bench.gpu_windows import Cameras
from engines.errors import EngineError, PackNotFound
from engines.manifest import Manifest, read_manifest
from engines.open import LoadedPack, find_pack
from stream.inference import PackRunner
from stream.memory import SourceMemory
from stream.settings import home

try:
    import torch

    from bench.gpu_backends import Backend, Reference, backends_for, chain_difference, load
    from bench.gpu_pictures import picture_rows
    from export.onnx import export_base
    from stream.gpu_pictures import DevicePictures
except ImportError as error:
    _MISSING: str | None = f"{error.name or error} is not installed"
else:
    _MISSING = None

WEIGHTS = Path(__file__).resolve().parents[1] / "models" / "weights" / "base"
MOST_CHAIN_ERROR = 1e-3
"""Most that scores may differ between frames on the device and in host memory."""
NO_DEVICE = 2
"""Exit code where there is no CUDA device."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured."""

    device: str
    """``cuda`` or ``cpu``."""
    precision: str
    """Of the engines."""
    seconds: float
    """For each number of sources."""
    sources: tuple[int, ...]
    """Numbers of sources."""
    threads: int
    """Engine threads; each has engines of its own and its share of the sources."""
    max_batch: int
    """Windows that are computed together at most."""


@dataclass(slots=True)
class Tally:
    """What one engine thread did."""

    latencies_s: list[float] = field(default_factory=list)
    """Of each window, from when it was closed to its answer."""
    windows: int = 0
    """Windows answered."""


def no_device(device: str) -> str | None:
    """Why nothing can be measured on a device, with the remedy; ``None`` where something can."""
    remedy = "run it where there is an NVIDIA GPU with its driver, or with --device cpu to try the same code on a CPU"
    if _MISSING is not None:
        return f"{_MISSING}; pip install -e '.[gpu]', and {remedy}"
    if device == "cuda" and not torch.cuda.is_available():
        return f"no CUDA device: torch {torch.__version__} sees none; {remedy}"
    return None


@contextmanager
def pack_folder(wanted: str) -> Iterator[Path]:
    """The pack, by name or folder; the base pack is exported for the time being where it is not there.

    Raises ``PackNotFound``, ``BenchError``.
    """
    try:
        yield find_pack(wanted, home()).resolve()
    except PackNotFound:
        if wanted != "base":
            raise
    else:
        return
    if not WEIGHTS.is_dir():
        raise BenchError(f"no base pack, and no weights at {WEIGHTS} to export it from; give --pack")
    with tempfile.TemporaryDirectory(prefix="sightwire-gpu-") as folder:
        export_base(WEIGHTS, Path(folder), clips=None)
        yield Path(folder)


def turns(runner: PackRunner, cameras: Cameras, max_batch: int, first: int, tally: Tally) -> None:
    """One turn: all windows close at once and are computed in batches. Raises ``EngineError``."""
    begin = time.perf_counter()
    for branch, windows in cameras.due(first):
        for at in range(0, len(windows), max_batch):
            batch = tuple(windows[at : at + max_batch])
            runner.run(branch, batch)
            tally.latencies_s += [time.perf_counter() - begin] * len(batch)
            tally.windows += len(batch)


def saturate(packs: Sequence[LoadedPack], memory: SourceMemory, count: int, plan: Plan) -> tuple[list[Tally], float]:
    """Run ``count`` sources as fast as they go, after some turns that are not counted; tallies and seconds taken.

    Raises ``EngineError``.
    """
    busy = min(len(packs), count)
    shares = [[f"cam{n}" for n in range(count)][first::busy] for first in range(busy)]
    tallies = [Tally() for _ in shares]
    errors: list[EngineError] = []
    start = threading.Barrier(busy + 1)
    until = [0.0]

    def work(pack: LoadedPack, names: list[str], tally: Tally) -> None:
        runner, cameras = PackRunner(pack, memory), Cameras(pack.manifest, names)
        try:
            for turn in range(2):
                turns(runner, cameras, plan.max_batch, turn, Tally())
            start.wait()
            start.wait()
            turn = 2
            while turn == 2 or time.perf_counter() < until[0]:
                turns(runner, cameras, plan.max_batch, turn, tally)
                turn += 1
        except EngineError as error:
            errors.append(error)
            start.abort()
        except threading.BrokenBarrierError:
            return

    threads = [
        threading.Thread(target=work, args=(pack, names, tally))
        for pack, names, tally in zip(packs, shares, tallies, strict=False)
    ]
    for thread in threads:
        thread.start()
    begin = time.perf_counter()
    try:
        start.wait()
        begin = time.perf_counter()
        until[0] = begin + plan.seconds
        start.wait()
    except threading.BrokenBarrierError:
        pass
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return tallies, time.perf_counter() - begin


def measure_backend(packs: Sequence[LoadedPack], backend: Backend, plan: Plan, probe: Probe | None) -> Measured:
    """Figures of one backend, by number of sources. Raises ``EngineError``."""
    manifest = packs[0].manifest
    rows: list[Row] = []
    notes: list[str] = []
    pictures = DevicePictures(manifest.branches, plan.device)
    for count in plan.sources:
        memory = SourceMemory(pictures=pictures)
        before = pictures.counts.uploads
        with watched(probe) as watch:
            tallies, took_s = saturate(packs, memory, count, plan)
        windows = sum(tally.windows for tally in tallies)
        waited_ms = 1e3 * np.concatenate([tally.latencies_s for tally in tallies])
        p50, p95 = np.percentile(waited_ms, [50, 95])
        rows += [
            Row(f"{backend.key}_windows_per_s_{count}", windows / took_s, f"{count} source(s)", "windows/s"),
            Row(f"{backend.key}_latency_p50_ms_{count}", float(p50), "  closed to answered, median", "ms"),
            Row(f"{backend.key}_latency_p95_ms_{count}", float(p95), "  closed to answered, 95 %", "ms"),
        ]
        if watch.mean is not None:
            rows.append(Row(f"{backend.key}_gpu_utilisation_{count}", watch.mean, "  GPU utilisation", "%"))
        if watch.trouble is not None:
            notes.append(watch.trouble)
        notes.append(f"{count} source(s): {pictures.counts.uploads - before} frames uploaded for {windows} windows")
        for n in range(count):
            memory.forget(f"cam{n}")
    rows.append(
        Row(f"{backend.key}_bytes_per_source", pictures.bytes_per_source, "frames of one source on the device", "bytes")
    )
    rows += _device_memory(backend, plan)
    return Measured(tuple(rows), tuple(dict.fromkeys(notes)))


def _device_memory(backend: Backend, plan: Plan) -> list[Row]:
    if plan.device != "cuda":
        return []
    free, total = torch.cuda.mem_get_info()
    what = "memory of the GPU in use, by all processes, after the largest number of sources"
    return [Row(f"{backend.key}_gpu_memory_mb", (total - free) / 1e6, what, "MB")]


def run(console: Console, options: argparse.Namespace) -> int:
    """Measure every backend that loads and answers as the CPU does; 1 when one does not. Raises ``EngineError`` or
    ``BenchError``."""
    plan = _plan(options)
    facts = {**machine(), **_device_facts(plan)}
    console.print(" · ".join(f"{key} {value}" for key, value in facts.items()), style="dim")
    probe = _probe(console, plan)
    found: list[Measured] = []
    wrong = False
    with pack_folder(options.pack) as folder:
        manifest = read_manifest(folder)
        reference = Reference.on_cpu(folder, manifest)
        for backend in backends_for(plan.device, plan.precision):
            try:
                packs = _loaded(folder, manifest, backend, plan)
            except EngineError as error:
                console.print(f"{backend.name}: not measured: {error}", soft_wrap=True)
                continue
            try:
                problem = _difference(packs[0], reference, backend, plan)
                if problem is not None:
                    wrong = True
                    console.print(f"{backend.name}: off, so not measured: {problem}", soft_wrap=True)
                    continue
                measured = measure_backend(packs, backend, plan, probe)
            finally:
                for pack in packs:
                    pack.close()
                _tidy()
            show(console, f"{backend.name} {backend.precision} on {plan.device}, pack {manifest.name}", measured)
            found.append(measured)
        found.append(_pictures(console, plan, manifest))
    if options.json is not None:
        write_json(options.json, found, facts)
    return int(wrong)


def _loaded(folder: Path, manifest: Manifest, backend: Backend, plan: Plan) -> list[LoadedPack]:
    packs: list[LoadedPack] = []
    try:
        for _ in range(plan.threads):
            packs.append(load(folder, manifest, backend))
            for engine in packs[-1].engines.values():
                engine.warmup(sorted({1, min(plan.max_batch, max(plan.sources))}))
    except EngineError:
        for pack in packs:
            pack.close()
        raise
    return packs


def _difference(pack: LoadedPack, reference: Reference, backend: Backend, plan: Plan) -> str | None:
    """What is wrong with a backend's answers; ``None`` where nothing is."""
    try:
        problem = reference.difference(pack, backend)
        if problem is None:
            error = chain_difference(pack, DevicePictures(pack.manifest.branches, plan.device))
            if not error <= MOST_CHAIN_ERROR:
                problem = f"scores differ by {error:.3g} when frames lie on the device"
    except EngineError as error:
        problem = str(error)
    return problem


def _pictures(console: Console, plan: Plan, manifest: Manifest) -> Measured:
    measured = picture_rows(manifest, plan.device, plan.seconds)
    show(console, f"pictures to {plan.device}", measured)
    return measured


def _tidy() -> None:
    """What one backend held is not to count against the next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _probe(console: Console, plan: Plan) -> Probe | None:
    if plan.device != "cuda":
        console.print("These are figures of a CPU: they show that the code runs, and say nothing of a GPU.")
        return None
    try:
        return open_probe()
    except Unmeasured as reason:
        console.print(str(reason))
        return None


def _device_facts(plan: Plan) -> dict[str, str | int]:
    facts: dict[str, str | int] = {"device": plan.device, "torch": str(torch.__version__), "threads": plan.threads}
    if plan.device == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    return facts


def _plan(options: argparse.Namespace) -> Plan:
    threads = options.threads or (2 if options.device == "cuda" else 1)
    return Plan(options.device, options.precision, options.seconds, options.sources, threads, options.max_batch)


def arguments(given: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures here, under flat keys")
    parser.add_argument(
        "--pack", default="base", help="pack to measure with, by name or folder [base, made if need be]"
    )
    parser.add_argument("--seconds", type=float, default=5.0, metavar="N", help="for each number of sources [5]")
    parser.add_argument("--sources", default="1,4,16,64", metavar="N,…", help="numbers of sources [1,4,16,64]")
    parser.add_argument("--threads", type=int, metavar="N", help="engine threads [2; on a CPU 1]")
    parser.add_argument("--max-batch", type=int, default=32, metavar="N", help="windows computed together at most [32]")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "fp16", "int8"), help="of the engines [fp32]")
    parser.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"), help="cpu tries the same code there [cuda]"
    )
    parsed = parser.parse_args(given)
    counts = parsed.sources.split(",")
    if not all(count.isdecimal() and 1 <= int(count) <= 1024 for count in counts):
        parser.error("--sources takes numbers from 1 to 1024 with commas between them")
    parsed.sources = tuple(int(count) for count in counts)
    if not 0 < parsed.seconds <= 600:
        parser.error("--seconds takes more than 0, up to 600")
    if not 1 <= parsed.max_batch <= 1024 or not 1 <= (parsed.threads or 1) <= 64:
        parser.error("--max-batch takes 1 to 1024, --threads 1 to 64")
    return parsed


def main(given: list[str] | None = None) -> int:
    """Exit code 0 when all that loads was measured, 1 with a line when an engine is off or something fails, 2 with a
    line without a device."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    options = arguments(sys.argv[1:] if given is None else given)
    if (reason := no_device(options.device)) is not None:
        print(f"error: {reason}", file=sys.stderr)
        return NO_DEVICE
    try:
        return run(Console(width=None if sys.stdout.isatty() else 120), options)
    except (BenchError, EngineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
