"""Which processor this is, for reports and for choices that hold on one machine only."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path


def cpu_model() -> str:
    """Name of the processor."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def machine_id() -> str:
    """Tells apart processors on which a choice may differ: model, instruction sets and number of cores."""
    parts = (platform.machine(), cpu_model(), _cpuinfo().get("flags", ""), str(os.cpu_count()))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _cpuinfo() -> dict[str, str]:
    """Fields of the first processor; empty where there is no /proc."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
