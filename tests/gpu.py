"""Tests that need a GPU: skipped where there is none, unless ``SIGHTWIRE_REQUIRE_GPU=1`` says that there is one."""

from __future__ import annotations

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
WANTED = HAS_GPU or os.environ.get("SIGHTWIRE_REQUIRE_GPU") == "1"
"""Whether tests on a GPU run; where it is missing nevertheless, they fail."""
needs_gpu = pytest.mark.skipif(not WANTED, reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
"""For tests of what runs on either device."""
