"""Runs trainings in processes of their own, as told by a JSON list of jobs; prints how each ended.

Everything is imported once and each job is a fork, so that ten deaths cost little more than one.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # What training would import in each fork anew.

from models import checkpoint
from models.errors import ModelError
from models.train import train


def work(job: dict[str, Any], pipe: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(job.get("env", {}))
    if "file_bytes" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_bytes"], job["file_bytes"]))
    if "kill_at_sync" in job:
        die_at_sync(job["kill_at_sync"])

    def report(stage: str, done: int, total: int, loss: float | None) -> None:
        if stage == "train" and done == job.get("kill_at_step"):
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        answer: dict[str, Any] = {"numbers": train(Path(job["config"]), report=report)}
    except ModelError as error:
        answer = {"error": str(error), "kind": type(error).__name__}
    os.write(pipe, json.dumps(answer).encode())


def die_at_sync(count: int) -> None:
    """Die while a checkpoint is being written: before the disk is told so many times to keep something."""
    real: Callable[[Path], None] = checkpoint._sync
    left = count

    def sync(path: Path) -> None:
        nonlocal left
        left -= ".part" in str(path)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        real(path)

    checkpoint._sync = sync


def start(job: dict[str, Any]) -> tuple[int, int]:
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            work(job, writing)
        finally:
            sys.stderr.flush()
            os._exit(0)
    os.close(writing)
    return process, reading


def end(process: int, reading: int) -> dict[str, Any]:
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    status = os.waitpid(process, 0)[1]
    return {"signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, **(json.loads(said) if said else {})}


if __name__ == "__main__":
    for jobs in json.loads(sys.argv[1]):
        running = [start(job) for job in jobs]
        for process, reading in running:
            print(json.dumps(end(process, reading)), flush=True)
