"""The contrastive loss: which rows count, and that several processes make one batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from models.contrastive import MAX_SCALE, START_TEMPERATURE, Contrast, likeness, same_rows
from models.losses import info_nce
from models.types import Inputs, Targets

REPOSITORY = Path(__file__).parents[3]


def _unit(rows: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed)), dim=1)


def _distinct(rows: int) -> torch.Tensor:
    return torch.arange(rows)[:, None]


def test_mean_over_the_pairs_that_rows_have() -> None:
    video, audio, text = _unit(6, 0), _unit(6, 1), _unit(6, 2)
    audio[:3] = 0.0  # Three windows have no sound.
    text[:] = 0.0  # None has text.
    got = Contrast()({"video": video, "audio": audio, "text": text}, _distinct(6))
    assert torch.allclose(got, info_nce(video[3:], audio[3:], 1 / START_TEMPERATURE), atol=1e-5)


def test_absent_rows_get_no_gradient() -> None:
    video, audio = _unit(4, 0).requires_grad_(), _unit(4, 1)
    audio[0] = 0.0
    Contrast()({"video": video, "audio": audio}, _distinct(4)).backward()
    assert video.grad is not None
    assert not video.grad[0].any() and video.grad[1:].any()


def test_nothing_to_compare_is_zero_and_can_be_trained_on() -> None:
    contrast = Contrast()
    loss = contrast({"video": _unit(1, 0).requires_grad_(), "audio": _unit(1, 1)}, _distinct(1))
    loss.backward()
    assert loss.item() == 0.0


def test_temperature_is_learned_within_its_bounds() -> None:
    contrast = Contrast()
    rows = _unit(8, 0)
    optimizer = torch.optim.SGD(contrast.parameters(), lr=50.0)
    for _ in range(20):  # Perfect matches want the temperature as low as it gets.
        optimizer.zero_grad()
        contrast({"video": rows, "text": rows}, _distinct(8)).backward()
        optimizer.step()
    contrast({"video": rows, "text": rows}, _distinct(8))
    assert 1 / START_TEMPERATURE < contrast.log_scale.exp().item() <= MAX_SCALE * 1.0001


def test_one_file_and_equal_captions_are_no_rivals() -> None:
    tokens = torch.tensor([[5, 6, 0], [5, 6, 0], [6, 5, 0], [0, 0, 0], [0, 0, 0]])
    targets = Targets(index=torch.tensor([0, 1, 2, 3, 2]))
    alike = same_rows(likeness(Inputs(tokens=tokens), targets))
    pairs = {(a, b) for a, b in alike.nonzero().tolist() if a < b}
    assert pairs == {(0, 1), (2, 4)}, "equal captions, one file; rows without text are not alike for that"


WORKER = """
import gc, json, sys
from pathlib import Path
import torch
import torch._dynamo  # Imported while DistributedDataParallel is made, it would keep the group for good.
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from models.contrastive import Contrast

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.video, self.audio, self.contrast = nn.Linear(5, 4), nn.Linear(5, 4), Contrast()
    def forward(self, x, heard, row):
        audio = F.normalize(self.audio(x), dim=1) * heard[:, None]
        return self.contrast({"video": F.normalize(self.video(x), dim=1), "audio": audio}, row[:, None])

def step(rank, world):
    torch.manual_seed(0)
    net = Net()
    x = torch.randn(6, 5)
    heard = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0])  # The processes have unequal numbers of pairs.
    row = torch.tensor([0, 1, 2, 3, 4, 2])
    model = DistributedDataParallel(net) if world > 1 else net
    part = slice(rank * 6 // world, (rank + 1) * 6 // world)
    loss = model(x[part], heard[part], row[part])
    loss.backward()
    if rank == 0:
        print(json.dumps({"loss": loss.item(), "grads": [p.grad.flatten().tolist() for p in net.parameters()]}))

rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
step(rank, world)
if world > 1:
    dist.destroy_process_group()
    # The model has held the group's threads, and one that still runs when the interpreter ends takes it down.
    gc.collect()
    alive = [Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    assert not [name for name in alive if "gloo" in name], alive
"""


def test_two_processes_give_the_loss_and_gradient_of_the_joined_batch(tmp_path: Path) -> None:
    def run(world: int) -> dict[str, object]:
        env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, str(rank), str(world), str(tmp_path / f"store{world}")],
                env=env,
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]
        outputs = [worker.communicate(timeout=500) for worker in workers]
        assert all(worker.returncode == 0 for worker in workers), "\n".join(error for _, error in outputs)
        result: dict[str, object] = json.loads(outputs[0][0].splitlines()[-1])
        return result

    alone, together = run(1), run(2)
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    for one, two in zip(alone["grads"], together["grads"], strict=True):  # type: ignore[call-overload]
        assert two == pytest.approx(one, rel=1e-4, abs=1e-6)
    assert any(abs(value) > 1e-3 for value in alone["grads"][0])  # type: ignore[index]
