"""What can go wrong before and during training."""

from __future__ import annotations


class ModelError(Exception):
    """Root; the message is one line with the cause and the remedy."""


class ConfigError(ModelError):
    """A training configuration does not validate; names the file and the key."""


class DataError(ModelError):
    """Training data is absent, broken or mislabelled; names the file and, for a table, the line."""


class WeightsError(ModelError):
    """A weights file is absent or is not of this architecture."""


class TrainingError(ModelError):
    """Training cannot go on (no number for a loss, a full disk); says what to do and what is kept."""
