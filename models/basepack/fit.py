"""One optimisation that can be interrupted anywhere and goes on to the same result.

Nothing random is carried from step to step: every draw of step n comes from the seed and n. What is saved is
the parameters, the buffers and AdamW's moments, as safetensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models.basepack.config import Schedule
from models.errors import WeightsError
from models.progress import Report

WARMUP = 0.05
SAVE_EVERY = 100
StepLoss = Callable[[np.random.Generator], Tensor]
"""The loss of one batch, drawn with the generator it is given."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What is optimised, and under which name its state is kept."""

    name: str
    """Shown, and the name of the state file."""
    schedule: Schedule
    """Steps, batch, rates."""
    seed: int
    """Of this stage."""
    state: Path
    """File that an unfinished run goes on from."""


def fit(module: nn.Module, loss_of: StepLoss, stage: Stage, report: Report, *, stop_at: int | None = None) -> float:
    """Optimise ``module`` in place, from saved state where there is one; returns the mean loss of the last steps.

    ``stop_at`` ends early with the state saved, as an interruption would. Raises ``WeightsError`` when the saved
    state is of another architecture or damaged.
    """
    schedule = stage.schedule
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    begin, recent = _restore(module, optimizer, stage.state)
    module.train()
    end = min(schedule.steps, stop_at or schedule.steps)
    for step in range(begin, end):
        torch.manual_seed(stage.seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * pace(step, schedule.steps)
        loss = loss_of(np.random.default_rng([stage.seed, step]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        value = float(loss.detach())
        recent = value if recent is None else 0.95 * recent + 0.05 * value
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == end:
            _save(module, optimizer, stage.state, step + 1, recent)
        report(stage.name, step + 1, schedule.steps, recent)
    module.eval()
    return recent if recent is not None else math.nan


def pace(step: int, steps: int) -> float:
    """Share of the learning rate at a step."""
    warmup = max(1, int(steps * WARMUP))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _save(module: nn.Module, optimizer: torch.optim.Optimizer, path: Path, step: int, recent: float) -> None:
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in module.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={"step": str(step), "loss": repr(recent)})
    part.replace(path)


def _restore(module: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> tuple[int, float | None]:
    """Steps done and the loss of late, after loading what is there."""
    if not path.is_file():
        return 0, None
    model: dict[str, Tensor] = {}
    moments: dict[int, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                kind, _, name = key.partition(".")
                if kind == "model":
                    model[name] = file.get_tensor(key)
                else:
                    index, _, moment = name.partition(".")
                    moments.setdefault(int(index), {})[moment] = file.get_tensor(key)
            metadata = file.metadata()
        module.load_state_dict(model)
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise WeightsError(f"{path} cannot be continued ({reason}); delete it, or train without resuming") from error
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return int(metadata["step"]), float(metadata["loss"])
