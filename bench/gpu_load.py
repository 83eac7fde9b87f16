"""How busy a GPU is while something else runs, by NVIDIA's management library or its command."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import statistics
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_EVERY_S = 0.1
_COMMAND = ("--query-gpu=utilization.gpu", "--format=csv,noheader,nounits")

Probe = Callable[[], float]
"""Utilisation now, in percent."""


class Unmeasured(Exception):
    """Utilisation cannot be measured here; the message says why and what to install."""


def open_probe() -> Probe:
    """What reads the utilisation of the first GPU. Raises ``Unmeasured``."""
    if importlib.util.find_spec("pynvml") is not None:
        return _library()
    if (command := shutil.which("nvidia-smi")) is not None:
        return lambda: _by_command(command)
    raise Unmeasured("GPU utilisation is not measured: pip install nvidia-ml-py, or put nvidia-smi on the path")


def _library() -> Probe:
    nvml: Any = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
        device = nvml.nvmlDeviceGetHandleByIndex(0)
    except nvml.NVMLError as error:
        raise Unmeasured(f"GPU utilisation is not measured: NVML does not start ({error})") from error

    def read() -> float:
        try:
            return float(nvml.nvmlDeviceGetUtilizationRates(device).gpu)
        except nvml.NVMLError as error:
            raise Unmeasured(f"GPU utilisation is not measured: NVML does not tell ({error})") from error

    return read


def _by_command(command: str) -> float:
    try:
        told = subprocess.run([command, *_COMMAND], capture_output=True, text=True, timeout=10, check=True).stdout
        return float(told.splitlines()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        raise Unmeasured(f"GPU utilisation is not measured: nvidia-smi fails ({type(error).__name__})") from error


class Watch:
    """Utilisation while it was watched."""

    def __init__(self) -> None:
        self.readings: list[float] = []
        self.trouble: str | None = None
        """Why there are no more readings."""

    @property
    def mean(self) -> float | None:
        """In percent; ``None`` without a reading."""
        return statistics.fmean(self.readings) if self.readings else None


@contextmanager
def watched(probe: Probe | None) -> Iterator[Watch]:
    """Read the utilisation all the while, ten times a second."""
    watch, done = Watch(), threading.Event()

    def look() -> None:
        while probe is not None and not done.wait(_EVERY_S):
            try:
                watch.readings.append(probe())
            except Unmeasured as error:
                watch.trouble = str(error)
                return

    thread = threading.Thread(target=look, name="utilisation")
    thread.start()
    try:
        yield watch
    finally:
        done.set()
        thread.join()
