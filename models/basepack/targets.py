"""What a window's labels are, and which of them its data set says anything about.

No data set annotates all twenty actions. Each label of a window is therefore positive, negative or
*unknown*, and no loss and no metric falls on what is unknown:

* A label that the data set annotates is positive where its span covers enough of the window, negative where
  it covers next to none, unknown between.
* A label that cannot well occur in a data set (nobody shakes hands in traffic) is negative there. Without
  these the heads would only tell data sets apart, and raise false alarms everywhere else.
* Anything that may occur without being annotated is unknown: people walk in surveillance clips of either
  kind, and a kick or a punch may well be called a fight.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from models.basepack.labels import ACTIONS
from models.basepack.tables import Recording, Span

POSITIVE, NEGATIVE, UNKNOWN = 1, 0, -1
MIN_OVERLAP_S = 0.75
"""A span this long inside the window makes its label positive …"""
MIN_SHARE = 0.6
"""… and so does this share of a shorter span, if it lasts at least …"""
MIN_SHORT_S = 0.4
"""… this long."""
MAX_TOUCH_S = 0.15
"""Up to this much overlap counts as none."""
FALL_S = 2.0
"""Spans of falls go on while the person lies; only their beginning is a fall."""

Targets = NDArray[np.int8]
"""int8 ``[20]``: 1 positive, 0 negative, -1 unknown."""


def window_targets(recording: Recording, start_s: float, end_s: float) -> Targets:
    """Targets of the window ``[start_s, end_s)`` of a recording."""
    return _RULES[recording.dataset](recording, start_s, end_s)


def nothing_happens() -> Targets:
    """Targets of a window without a picture: no action can be seen."""
    return _targets(positive={"other"}, unknown=set())


def _fights(recording: Recording, start_s: float, end_s: float) -> Targets:
    if recording.spans[0].label == "fight":
        hidden = {"fall", "stand", "walk", "run", "hug", "kick", "punch", "push"}
        return _targets(positive={"fight"}, unknown=hidden)
    return _targets(positive={"other"}, unknown={"sit", "stand", "walk", "run", "bend", "point"})


def _gmdcsa(recording: Recording, start_s: float, end_s: float) -> Targets:
    state = {label: NEGATIVE for label in ("fall", "sit", "stand", "walk", "other")}
    for span in recording.spans:
        if span.label == "fall":
            lying = _coverage(Span("fall", min(span.start_s + FALL_S, span.end_s), span.end_s), start_s, end_s)
            span = Span("fall", span.start_s, min(span.start_s + FALL_S, span.end_s))
            if lying != NEGATIVE and state["fall"] == NEGATIVE:
                state["fall"] = UNKNOWN
        state[span.label] = _strongest(state[span.label], _coverage(span, start_s, end_s))
    if all(state[label] == NEGATIVE for label in ("fall", "sit", "stand", "walk")):
        state["other"] = POSITIVE
    elif state["other"] == POSITIVE:
        state["other"] = UNKNOWN
    targets = _targets(positive={label for label, value in state.items() if value == POSITIVE}, unknown={"bend"})
    for label, value in state.items():
        targets[ACTIONS.index(label)] = value
    return targets


def _ut(recording: Recording, start_s: float, end_s: float) -> Targets:
    label = recording.spans[0].label
    violent = {"fight"} if label in ("kick", "punch", "push") else set()
    return _targets(positive={label}, unknown={"stand", "walk"} | violent)


_WEIZMANN: dict[str, set[str]] = {
    "bend": {"stand"},
    "jump": set(),
    "jump_in_place": set(),
    "jumping_jack": {"wave_two_hands"},
    "gallop_sideways": {"run", "jump", "other"},
    "run": set(),
    "walk": set(),
    "wave_one_hand": {"stand"},
    "wave_two_hands": {"stand"},
}
"""What may hold beside each of Weizmann's classes."""


def _weizmann(recording: Recording, start_s: float, end_s: float) -> Targets:
    label = recording.spans[0].label
    return _targets({label}, _WEIZMANN[label])


def _street(recording: Recording, start_s: float, end_s: float) -> Targets:
    return _targets(positive={"other"}, unknown={"walk", "stand"})


def _gestures(recording: Recording, start_s: float, end_s: float) -> Targets:
    """Sign language by one person who stands or sits: a sign may look like a wave or like pointing."""
    return _targets(positive={"other"}, unknown={"wave_one_hand", "wave_two_hands", "point", "sit", "stand"})


def _stills(recording: Recording, start_s: float, end_s: float) -> Targets:
    """Passers-by may be in the picture, but only the camera moves."""
    return _targets(positive={"other"}, unknown={"walk", "stand"})


def _everyday(recording: Recording, start_s: float, end_s: float) -> Targets:
    """Counted in events only."""
    return _targets(positive=set(), unknown=set(ACTIONS))


_RULES: dict[str, Callable[[Recording, float, float], Targets]] = {
    "fights": _fights,
    "gmdcsa24": _gmdcsa,
    "ut-interaction": _ut,
    "weizmann": _weizmann,
    "street": _street,
    "people": _street,
    "gestures": _gestures,
    "stills": _stills,
    "everyday": _everyday,
}


def _targets(positive: set[str], unknown: set[str]) -> Targets:
    return np.array(
        [POSITIVE if label in positive else UNKNOWN if label in unknown else NEGATIVE for label in ACTIONS], np.int8
    )


def _coverage(span: Span, start_s: float, end_s: float) -> int:
    overlap = min(span.end_s, end_s) - max(span.start_s, start_s)
    if overlap <= MAX_TOUCH_S:
        return NEGATIVE
    enough = overlap >= min(MIN_OVERLAP_S, max(MIN_SHORT_S, MIN_SHARE * (span.end_s - span.start_s)))
    return POSITIVE if enough else UNKNOWN


def _strongest(one: int, other: int) -> int:
    if POSITIVE in (one, other):
        return POSITIVE
    return UNKNOWN if UNKNOWN in (one, other) else NEGATIVE
