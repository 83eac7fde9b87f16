"""Train a model of one's own: `sightwire train config.yaml`.

Straight through: read and check the data; build the model; step by step draw a batch, take its loss, follow the
gradient; every epoch measure the averaged weights on the validation rows and keep the best; in the end calibrate
them, store them with all that is needed to use them, and write the report.

Nothing random is carried from step to step: what step n draws and drops comes from the seed and n. So the state of a
run is its tensors and a few numbers, and a run that was killed goes on to the same weights.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState  # type: ignore[import-untyped]
from accelerate.utils import DistributedDataParallelKwargs, broadcast  # type: ignore[import-untyped]
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter

from models.calibration import Calibration
from models.checkpoint import (
    BEST_FILE,
    TOKENIZER_FILE,
    Checkpoints,
    ModelCard,
    load_optimizer,
    load_weights,
    optimizer_tensors,
    part_of,
    read_tensors,
    replacing,
    save_model,
    save_tensors,
    start_from,
)
from models.config import TrainConfig, read_config
from models.data.dataset import ClipDataset
from models.ema import averaged
from models.errors import ConfigError, ModelError, TrainingError, WeightsError
from models.loading import Drawn, draws, find_tokenizer, load_data, read_rows
from models.modes import with_pseudo_labels
from models.network import FusionModel, build_model, parameter_groups
from models.objective import Batch, Objective
from models.predict import Answers, main_measures, predict
from models.progress import Report, console_progress
from models.report import HISTORY_FILE, write_report
from models.scored import RetrievalScores, Scored
from models.state import RunState, differences, pace, seed_step

LOG_STEPS = 10
"""Steps between entries of the TensorBoard log."""
CHECKPOINTS = "checkpoints"
LOGS = "logs"
_PLACES: Any = {"out": True, "data": {"cache", "workers", "cache_gb"}, "optim": {"checkpoint_steps"}}
"""Settings that a run may change without becoming another."""
_log = logging.getLogger(__name__)


def train(
    config_path: Path,
    *,
    data_dir: Path | None = None,
    out_dir: Path | None = None,
    resume: bool = True,
    report: Report | None = None,
) -> dict[str, float | None]:
    """Train by a configuration into its folder ``out``, and return the numbers of the report.

    ``data_dir`` and ``out_dir`` stand in for ``data.root`` and ``out``. An unfinished run in ``out`` goes on where
    its last checkpoint is, unless ``resume`` is off. ``out`` then holds ``model.safetensors``, ``model.json`` and
    ``tokenizer.json``, ``report.md`` with its pictures, ``metrics.json``, ``history.jsonl`` and TensorBoard's
    ``logs``. Under ``accelerate launch`` each process calls this.

    Raises ``ConfigError``, ``DataError``, ``WeightsError`` or ``TrainingError``, each one line with its remedy.
    """
    config = read_config(config_path, TrainConfig)
    if data_dir is not None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"root": data_dir})})
    if out_dir is not None:
        config = config.model_copy(update={"out": out_dir})
    accelerator = _accelerator(config)
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with console_progress() if report is None and accelerator.is_main_process else nullcontext() as console:
            return _Run(config, accelerator, report or console or _quiet, resume=resume).finish()
    except OSError as error:
        reason = error.strerror or error
        raise TrainingError(
            f"{config.out} cannot be written ({reason}); make room and start again, the last checkpoint is kept"
        ) from error
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


class _Run:
    """One training, from the configuration to the stored model."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, report: Report, *, resume: bool) -> None:
        self.config, self.accelerator, self.report = config, accelerator, report
        self.checkpoints = Checkpoints(config.out / CHECKPOINTS)
        manifest = read_rows(config)
        if not resume and accelerator.is_main_process:
            for stale in (self.checkpoints.folder, config.out / LOGS):
                shutil.rmtree(stale, ignore_errors=True)
        accelerator.wait_for_everyone()
        self.tokenizer = find_tokenizer(config, manifest, resumed=self.checkpoints.newest() is not None)
        accelerator.wait_for_everyone()
        if self.tokenizer is not None and accelerator.is_main_process:
            with replacing(config.out / TOKENIZER_FILE) as part:
                self.tokenizer.save(part)
        seed_step(config.seed, 0, 0)
        vocabulary = None if self.tokenizer is None else self.tokenizer.vocabulary
        self.model = build_model(config.model, vocabulary, spec_augment=config.data.augment.spec_augment)
        if config.init is not None and self.checkpoints.newest() is None:
            for line in start_from(self.model, config.init):
                _log.info(line)
        self.data = load_data(config, manifest, self.tokenizer, self.model)
        for line in self.data.train.skipped:
            _log.warning("left out: %s", line)
        self._prepare()

    def _prepare(self) -> None:
        """Optimiser, averages, and the state so far."""
        config, optim = self.config, self.config.optim
        objective = Objective(self.model, config, self.data.counts)
        groups = parameter_groups(objective, optim.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=optim.learning_rate)
        self.objective, self.optimizer = self.accelerator.prepare(objective, optimizer)
        self.plain: Objective = self.accelerator.unwrap_model(self.objective)
        self.parameters = [p for p in self.plain.parameters() if p.requires_grad]
        self.average = averaged(self.model, optim.ema) if optim.ema else None
        self.teacher = averaged(self.model, config.pseudo.ema) if config.mode == "semi-supervised" else None
        self.per_epoch = optim.epoch_steps or self.data.steps_per_epoch(optim.batch)
        self.total = min(optim.epochs * self.per_epoch, optim.max_steps or optim.epochs * self.per_epoch)
        self.state = RunState()
        newest = self.checkpoints.newest()
        if newest is not None:
            self._restore(newest)

    def finish(self) -> dict[str, float | None]:
        """Train what is left to train, then store and report the best."""
        main = self.accelerator.is_main_process
        if not self.state.stopped and self.state.step < self.total:
            with SummaryWriter(self.config.out / LOGS, purge_step=self.state.step) if main else nullcontext() as writer:
                self._learn(writer)
        return self._store() if main else {}

    def _learn(self, writer: SummaryWriter | None) -> None:
        state, total = self.state, self.total
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        self.objective.train()
        for drawn in draws(self.config, self.data, state.step, total, rank=rank, world=world):
            losses = self._step(drawn)
            state.add(losses)
            self.report("train", state.step, total, state.recent)
            if writer is not None and state.step % LOG_STEPS == 0:
                for name, value in losses.items():
                    writer.add_scalar(f"train/{name}", value, state.step)
            if state.step % self.per_epoch == 0 or state.step == total:
                self._validate(writer)
            if state.step % self.config.optim.checkpoint_steps == 0 or state.step == total or state.stopped:
                self._save()
            if state.stopped:
                break

    def _step(self, drawn: Drawn) -> dict[str, float]:
        """One batch's losses, followed. Raises ``TrainingError`` when one is no number."""
        accelerator, config = self.accelerator, self.config
        seed_step(config.seed, self.state.step + 1, accelerator.process_index)
        for group in self.optimizer.param_groups:
            group["lr"] = config.optim.learning_rate * pace(self.state.step, self.total, config.optim.warmup_steps)
        batch = self._batch(drawn)
        terms = self.objective(batch)
        self.optimizer.zero_grad(set_to_none=True)
        accelerator.backward(terms["loss"])
        norm = accelerator.clip_grad_norm_(self.parameters, config.optim.clip_norm or math.inf)
        names, values = list(terms), torch.stack([*(term.detach().float() for term in terms.values()), norm.float()])
        # With half precision's scaler an infinite gradient only means a smaller scale for the next step.
        counted = values if accelerator.scaler is None else values[:-1]
        self._check(bool(counted.isfinite().all()), dict(zip(names, values.tolist(), strict=False)), batch)
        self.optimizer.step()
        for average in (self.average, self.teacher):
            if average is not None:
                average.update_parameters(self.model)
        return dict(zip(names, values.tolist(), strict=False))

    def _batch(self, drawn: Drawn) -> Batch:
        """What was drawn, on the device, with the averaged model's labels for rows that have none."""
        device = self.accelerator.device
        labelled = drawn.inputs.to(device), drawn.targets.to(device)
        if drawn.weak is None or drawn.strong is None or self.teacher is None:
            return Batch(*labelled, teacher=Batch(*labelled, teacher=drawn.teacher).to(device).teacher)
        with torch.no_grad(), self.accelerator.autocast():
            logits = self.teacher.module(drawn.weak[0].to(device)).logits
        strong = drawn.strong[0].to(device), drawn.strong[1].to(device)
        return with_pseudo_labels(labelled, strong, logits, self.config.model.heads, self.config.pseudo.threshold)

    def _check(self, finite: bool, losses: Mapping[str, float], batch: Batch) -> None:
        """Raises ``TrainingError``, in all processes, when a loss or gradient of any is no number."""
        everywhere = finite
        if self.accelerator.num_processes > 1:
            flag = torch.tensor([float(finite)], device=self.accelerator.device)
            everywhere = float(self.accelerator.reduce(flag)) == self.accelerator.num_processes
        if everywhere:
            return
        step, index = self.state.step + 1, batch.targets.index
        numbers = sorted(set(() if index is None else index.tolist()) - {-1})
        lines = ", ".join(str(self.data.manifest.rows[n].line) for n in numbers[:8])
        more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
        odd = [name for name, value in losses.items() if not math.isfinite(value)] or ["gradient"]
        said = f"{odd[0]} is no number" if not finite else "a loss of another process is no number"
        raise TrainingError(
            f"step {step}: {said} on a batch of {self.data.manifest.path} lines {lines}{more}; look at these rows, or "
            "lower optim.learning_rate; the last checkpoint is kept"
        )

    def _validate(self, writer: SummaryWriter | None) -> None:
        """Measure the averaged weights, keep them when they are the best, and see whether to stop."""
        state, config = self.state, self.config
        epoch = math.ceil(state.step / self.per_epoch)
        score, measures = torch.zeros(1, device=self.accelerator.device), {}
        if self.accelerator.is_main_process:
            measures = self._measures(self._predict(self._evaluated(), self.data.val))
            score += float(np.mean(list(measures.values()))) if measures else math.nan
        score = broadcast(score)
        self.objective.train()
        if not math.isfinite(score):
            raise TrainingError(f"{self.data.manifest.path}: no val row tells anything of the heads; label some")
        better = state.end_epoch(epoch, float(score), measures)
        patience = config.optim.patience
        state.stopped = patience is not None and epoch - state.best_epoch >= patience
        if writer is None:
            return
        for name, value in {**measures, "score": float(score)}.items():
            writer.add_scalar(f"val/{name}", value, state.step)
        if better or config.optim.keep == "last":
            save_tensors(self.checkpoints.folder / BEST_FILE, self._evaluated().state_dict())
        self._write_history()

    def _predict(self, model: FusionModel, windows: ClipDataset) -> Answers:
        def advance(done: int, total: int) -> None:
            self.report("measure", done, total, None)

        batch, device = self.config.optim.batch, self.accelerator.device
        return predict(model, windows, self.tokenizer, batch=batch, device=device, advance=advance)

    def _measures(self, answers: Answers) -> dict[str, float]:
        """What validation is judged by. Without labels: how well the modalities of a row find each other."""
        if self.config.mode == "self-supervised":
            return {"agreement": answers.agreement()}
        return main_measures(answers.scored(answers.calibrated()))

    def _evaluated(self) -> FusionModel:
        if self.average is None:
            return self.model
        assert isinstance(self.average.module, FusionModel)
        return self.average.module

    def _save(self) -> None:
        """Keep the state. Only the first process writes."""
        if self.accelerator.is_main_process:
            tensors = {f"objective.{name}": tensor for name, tensor in self.plain.state_dict().items()}
            tensors |= {f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(self.optimizer).items()}
            for name, average in self._averages().items():
                tensors |= {f"{name}.{key}": tensor for key, tensor in average.state_dict().items()}
            scaler = self.accelerator.scaler
            progress = {
                "state": asdict(self.state),
                "windows": self._sizes(),
                "config": self._identity(),
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            self.checkpoints.write(self.state.step, tensors, progress)
        self.accelerator.wait_for_everyone()

    def _restore(self, path: Path) -> None:
        """Go on from a checkpoint. Raises ``WeightsError`` when it is not of this run."""
        tensors, progress = self.checkpoints.read(path)
        if progress["windows"] != self._sizes():
            raise WeightsError(
                f"{path} was written for {progress['windows']} windows, the manifest now gives {self._sizes()}; "
                "train with --fresh, or into another folder"
            )
        load_weights(self.plain, part_of(tensors, "objective."), path)
        load_optimizer(self.optimizer, part_of(tensors, "optimizer."))
        for name, average in self._averages().items():
            load_weights(average, part_of(tensors, f"{name}."), path)
        if self.accelerator.scaler is not None and progress["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(progress["scaler"])
        self.state = RunState(**progress["state"])
        changed = differences(progress["config"], self._identity())
        if changed:
            _log.warning("%s goes on with other settings than it began with: %s", path, ", ".join(changed))

    def _averages(self) -> dict[str, AveragedModel]:
        found = {"average": self.average, "teacher": self.teacher}
        return {name: average for name, average in found.items() if average is not None}

    def _sizes(self) -> list[int]:
        return [len(part) for part in (self.data.train, self.data.unlabelled) if part is not None]

    def _identity(self) -> dict[str, Any]:
        return self.config.model_dump(mode="json", exclude=_PLACES)

    def _write_history(self) -> None:
        with replacing(self.config.out / HISTORY_FILE) as part:
            part.write_text("".join(json.dumps(record) + "\n" for record in self.state.history), encoding="utf-8")

    def _store(self) -> dict[str, float | None]:
        """The weights to be kept, calibrated, with their card and report."""
        config, state, best = self.config, self.state, self.checkpoints.folder / BEST_FILE
        load_weights(self.model, read_tensors(best), best)
        last = state.history[-1]
        epoch, score = (last["epoch"], last["score"]) if config.optim.keep == "last" else (state.best_epoch, state.best)
        labelled = config.mode != "self-supervised"
        answers = self._predict(self.model, self.data.val)
        calibration = answers.calibrated() if labelled else Calibration()
        vocabulary = None if self.tokenizer is None else self.tokenizer.vocabulary
        training = {"mode": config.mode, "seed": config.seed, "steps": state.step, "epoch": epoch}
        card = ModelCard(
            name=config.name,
            model=config.model,
            window_s=config.data.window_s,
            hop_s=config.data.hop_s,
            vocabulary=vocabulary,
            tokenizer=None if self.tokenizer is None else TOKENIZER_FILE,
            calibration=calibration,
            training={**training, "score": score},
        )
        save_model(config.out, self.model, card, self.tokenizer)
        if self.data.test is not None:
            answers = self._predict(self.model, self.data.test)
        scored = answers.scored(calibration)
        if not labelled:
            scored = Scored(scored.rows, tuple(head for head in scored.heads if isinstance(head, RetrievalScores)))
        measured = "val (temperatures and thresholds were chosen on it)" if self.data.test is None else "test"
        about = {"training": config.mode, "manifest": str(config.data.manifest), "split": measured}
        facts = {"steps": str(state.step), "weights": f"of epoch {epoch:g}, validation score {score:.4f}"}
        numbers = write_report(
            config.out, scored, title=f"Model {config.name}", about={**about, **facts}, history=state.history
        )
        return {**numbers, "score": score, "epoch": float(epoch), "steps": float(state.step)}


def _accelerator(config: TrainConfig) -> Accelerator:
    """Raises ``ConfigError`` where the device cannot do what is asked."""
    # A batch may lack a modality, or labels of a head.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    try:
        accelerator = Accelerator(mixed_precision=config.optim.precision, kwargs_handlers=[unused])
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"optim.precision: {config.optim.precision} cannot be had here ({reason})") from error
    if config.optim.batch % accelerator.num_processes:
        raise ConfigError(
            f"optim.batch: {config.optim.batch} rows cannot be shared evenly by {accelerator.num_processes} processes"
        )
    return accelerator


def _quiet(stage: str, done: int, total: int, loss: float | None) -> None:
    """Tells nobody."""


if __name__ == "__main__":
    # For `accelerate launch -m models.train config.yaml`.
    if len(sys.argv) != 2:
        sys.exit("usage: accelerate launch -m models.train config.yaml")
    try:
        train(Path(sys.argv[1]))
    except ModelError as problem:
        sys.exit(f"error: {problem}")
    # Threads of processes that shared the work take the interpreter down if they are still there at its end.
    PartialState().destroy_process_group()
    gc.collect()
