"""What the base pack is shown: sizes, rates and lengths of its windows."""

from __future__ import annotations

WATCH_SIZE = 160
"""Side of the frames that actions are seen in."""
WATCH_FPS = 8
WATCH_SAMPLES = 16
"""Samples of a window."""
WATCH_WINDOW_NS = 2_000_000_000
WATCH_HOP_NS = 500_000_000
LOOKBACK_NS = 60_000_000
AUDIO_SAMPLES = 32_000
"""Samples of sound in a window at 16 kHz."""
SCENE_WIDTH, SCENE_HEIGHT = 320, 240
SCENE_WINDOW_NS = 1_000_000_000
