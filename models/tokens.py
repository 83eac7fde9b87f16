"""Special tokens by id: beside the tokenizer, whose library only training needs."""

from __future__ import annotations

PAD, UNK, START, END = range(4)
SPECIAL = ("[pad]", "[unk]", "[start]", "[end]")
"""Special tokens by id."""
