"""What the base pack can say. The order is the order of the logits: never reorder, only a new pack may."""

from __future__ import annotations

ACTIONS = (
    "fight",
    "fall",
    "sit",
    "stand",
    "walk",
    "run",
    "jump",
    "jump_in_place",
    "jumping_jack",
    "gallop_sideways",
    "bend",
    "wave_one_hand",
    "wave_two_hands",
    "handshake",
    "hug",
    "kick",
    "punch",
    "push",
    "point",
    "other",
)
"""Labels of the action head; several may hold at once."""

SOUNDS = (
    "dog_bark",
    "rain",
    "sea_waves",
    "baby_cry",
    "clock_tick",
    "sneeze",
    "helicopter",
    "chainsaw",
    "rooster",
    "fire_crackling",
    "none",
)
"""Labels of the class head in the order of ESC-10's class numbers, then none of them."""

SCENE = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
"""Classes of the segmentation head, in CamVid's order."""

VOID = 11
"""CamVid's index for pixels without a class; no loss falls on them."""
