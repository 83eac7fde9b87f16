"""Which groups are held out together, and the action heads that have not seen them.

Fold n holds out the n-th group of every data set at once (a subject, a sequence; of fights a tenth of the sources), so
one head serves all of them: sixteen heads for all groups, and one more for the harder split of UT-Interaction, whose
second place no window of training shows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.basepack.tables import Recording
from models.basepack.window import WindowHead
from models.errors import WeightsError

FOLDS_FILE = "folds-action.safetensors"
FIGHT_FOLDS = 10
SET2 = "set2"
"""Name of the head that has not seen UT-Interaction's second place."""
_PARTS = ("centre", "prior", "see.weight", "see.bias", "hear.weight", "hear.bias")
_SECOND_PLACE = 11
"""Sequences from this one on were filmed there."""


def folds_of(recordings: Sequence[Recording]) -> list[int]:
    """The fold that each recording is held out in."""
    places: dict[tuple[str, str], int] = {}
    for dataset in sorted({recording.dataset for recording in recordings}):
        sizes = Counter(recording.group for recording in recordings if recording.dataset == dataset)
        if dataset == "fights":
            places |= {(dataset, group): fold for group, fold in _balanced(sizes).items()}
        else:
            ordered = sorted(sizes, key=lambda group: (len(group), group))
            places |= {(dataset, group): number for number, group in enumerate(ordered)}
    widest = 1 + max((fold for (dataset, _), fold in places.items() if dataset in _LABELLED), default=0)
    return [places[recording.dataset, recording.group] % widest for recording in recordings]


_LABELLED = ("fights", "gmdcsa24", "ut-interaction", "weizmann")


def _balanced(sizes: Mapping[str, int]) -> dict[str, int]:
    """Groups dealt to folds of about one size, the largest first."""
    filled = [0] * FIGHT_FOLDS
    places = {}
    for group in sorted(sizes, key=lambda group: (-sizes[group], group)):
        places[group] = filled.index(min(filled))
        filled[places[group]] += sizes[group]
    return places


def held_out(recordings: Sequence[Recording]) -> dict[str, list[bool]]:
    """By name of each head, which recordings it is not to see."""
    folds = folds_of(recordings)
    by_fold = {str(fold): [other == fold for other in folds] for fold in sorted(set(folds))}
    return {**by_fold, SET2: [in_second_place(recording) for recording in recordings]}


def in_second_place(recording: Recording) -> bool:
    """Whether a recording is of UT-Interaction's second place."""
    number = re.search(r"\d+", recording.group) if recording.dataset == "ut-interaction" else None
    return number is not None and int(number[0]) >= _SECOND_PLACE


def save_heads(heads: Mapping[str, WindowHead], folder: Path) -> None:
    """Store what the heads of the folds do not share, in half precision."""
    state: dict[str, Tensor] = {}
    for name, head in heads.items():
        own = head.state_dict()
        state |= {f"{name}.{part}": own[part].half().contiguous() for part in _PARTS}
    path = folder / FOLDS_FILE
    save_file(state, path)
    path.chmod(0o644)


def load_heads(folder: Path, shipped: WindowHead) -> dict[str, WindowHead]:
    """The heads by fold, sharing what is not theirs with the shipped one. Raises ``WeightsError``."""
    path = folder / FOLDS_FILE
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} cannot be read ({error}); run `sightwire train models/configs/base.yaml`"
        ) from error
    heads = {}
    for name in sorted({key.partition(".")[0] for key in state}):
        head = WindowHead(shipped.ear.trunk)
        own = {part: state[f"{name}.{part}"].float() for part in _PARTS if f"{name}.{part}" in state}
        try:
            missing = set(head.load_state_dict(own, strict=False).missing_keys) & set(_PARTS)
        except RuntimeError as error:
            raise WeightsError(f"{path} is of another architecture; train again") from error
        if missing:
            raise WeightsError(f"{path}: head {name} has no {sorted(missing)[0]}; train again")
        head.sound = shipped.sound
        heads[name] = head.eval().requires_grad_(False)
    return heads
