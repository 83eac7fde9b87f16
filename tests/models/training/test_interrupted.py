"""Training that is killed, runs out of disk, or is shared by processes: real processes, real signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from models.checkpoint import Checkpoints, load_model, read_tensors
from tests.models.training.conftest import tiny, write_config

pytestmark = pytest.mark.timeout(900)  # A machine that does other things at the same time takes long to import torch.
REPOSITORY = Path(__file__).parents[3]
STEPS = 7


def free_port() -> int:
    """One that nobody listens on, here and now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _run(*rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How each job ended; those of one round run side by side."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    script = [sys.executable, str(Path(__file__).with_name("jobs.py")), json.dumps(rounds)]
    done = subprocess.run(script, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=850, check=False)
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == sum(len(jobs) for jobs in rounds), done.stderr
    return results


def test_killed_anywhere_it_ends_the_same(world: Path, tmp_path: Path) -> None:
    settings = {"optim__epochs": 3, "optim__max_steps": STEPS, "mode": "semi-supervised", "pseudo__threshold": 0.5}
    whole = str(write_config(tmp_path / "whole.yaml", tiny(world, tmp_path / "whole", **settings)))
    often = str(write_config(tmp_path / "often.yaml", tiny(world, tmp_path / "often", **settings)))
    deaths = [
        {"config": often, "kill_at_step": 1},
        {"config": often, "kill_at_step": 3},
        # A checkpoint's two files and their folder: between them, the writing of a whole one is cut.
        {"config": often, "kill_at_sync": 2},
        {"config": often, "kill_at_sync": 5},
        {"config": often, "kill_at_step": STEPS},
    ]
    ends = _run([{"config": whole}], *([death] for death in deaths), [{"config": often}])
    assert [end["signal"] for end in ends] == [0, *(signal.SIGKILL for _ in deaths), 0]
    assert ends[0]["numbers"] == ends[-1]["numbers"]
    one, other = (
        {f.relative_to(out): f for f in sorted(out.rglob("*.safetensors"))}
        for out in (tmp_path / "whole", tmp_path / "often")
    )
    assert list(one) == list(other) and len(one) == 3
    for name, path in one.items():
        for key, tensor in read_tensors(path).items():
            assert torch.equal(tensor, read_tensors(other[name])[key]), f"{name} {key}"
    histories = [(tmp_path / name / "history.jsonl").read_text() for name in ("whole", "often")]
    assert histories[0] == histories[1] and len(histories[0].splitlines()) == 2


def test_a_full_disk_is_said_and_costs_nothing(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = str(write_config(tmp_path / "config.yaml", tiny(world, out, optim__max_steps=3)))
    longer = str(write_config(tmp_path / "longer.yaml", tiny(world, out, optim__max_steps=5)))
    first, full, last = _run([{"config": config}], [{"config": longer, "file_bytes": 100_000}], [{"config": longer}])
    assert full["kind"] == "TrainingError" and "\n" not in full["error"]
    assert "cannot be written" in full["error"] and "make room" in full["error"]
    assert first["numbers"]["steps"] == 3 and last["numbers"]["steps"] == 5
    newest = Checkpoints(out / "checkpoints").newest()
    assert newest is not None and newest.name == "step-000000005"
    load_model(out)


def test_two_processes_train_one_model(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = str(write_config(tmp_path / "config.yaml", tiny(world, out, optim__max_steps=4)))
    env = {
        "ACCELERATE_USE_CPU": "true",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    jobs = [{"config": config, "env": {**env, "RANK": str(n), "LOCAL_RANK": str(n)}} for n in range(2)]
    main, second = _run(jobs)
    assert main["numbers"]["steps"] == 4 and second["numbers"] == {}
    load_model(out)
