"""What is kept of each source from one window to the next: features in staged branches, states in stateful ones."""

from __future__ import annotations

from collections.abc import Sequence

from engines.manifest import Branch, TensorSpec
from stream.features import FeatureStore
from stream.samples import HostPictures, Pictures
from stream.stepping import BranchStates

MAX_STATE_BYTES = 2**30
"""Most memory for the states of one branch; beyond it the source heard of longest ago begins anew."""


class SourceMemory:
    """Features and states of one generation of a pack; shared by all its engine threads."""

    def __init__(self, max_state_bytes: int = MAX_STATE_BYTES, pictures: Pictures | None = None) -> None:
        """``pictures`` puts frames together where the engines want them, by default in host memory."""
        self.pictures = pictures or HostPictures()
        self.features = FeatureStore()
        self._states: dict[str, BranchStates] = {}
        self._max_state_bytes = max_state_bytes

    def states(self, branch: Branch, inputs: Sequence[TensorSpec]) -> BranchStates:
        """The states of a branch whose graph has these inputs."""
        found = self._states.get(branch.name)
        if found is None:
            found = self._states[branch.name] = BranchStates(branch, inputs, self._max_state_bytes)
        return found

    def forget(self, source_id: str) -> None:
        """Let go of a source."""
        self.pictures.forget(source_id)
        self.features.forget(source_id)
        for states in self._states.values():
            states.forget(source_id)

    @property
    def encoded(self) -> int:
        """Frames encoded."""
        return self.features.encoded

    @property
    def reused(self) -> int:
        """Frames whose features were there already."""
        return self.features.reused

    @property
    def state_bytes(self) -> int:
        """Memory of the states."""
        return sum(states.nbytes for states in self._states.values())

    @property
    def evicted(self) -> int:
        """Sources that lost their states to others."""
        return sum(states.evicted for states in self._states.values())

    @property
    def restarted(self) -> int:
        """Windows within an epoch that were computed from an empty past."""
        return sum(states.restarted for states in self._states.values())
