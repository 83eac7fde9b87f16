"""Which training a configuration asks for: a model of one's own, or a recipe that comes with Sightwire."""

from __future__ import annotations

from pathlib import Path

from models.config import read_yaml
from models.errors import ConfigError

RECIPES = ("base",)
"""Values of the key ``recipe``; without it a configuration is a ``models.config.TrainConfig``."""


def recipe_of(path: Path) -> str | None:
    """The recipe that a configuration names; ``None`` for the general training.

    Raises ``ConfigError`` when the file cannot be read or names a recipe that there is not.
    """
    values = read_yaml(path)
    recipe = values.get("recipe") if isinstance(values, dict) else None
    if recipe is not None and recipe not in RECIPES:
        raise ConfigError(
            f"{path}: recipe: there is no {recipe!r}, only {', '.join(RECIPES)}; leave it out for your own"
        )
    return recipe
