"""OpenVINO, imported in the one way that is safe here. Nothing else imports it."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import numpy as np


def _import_runtime() -> ModuleType:
    """Import OpenVINO without its model converter.

    ``import openvino`` pulls the converter in, which sends usage data over the network and writes into the home
    folder. Nothing here needs it, and OpenVINO does without where it cannot be imported.
    """
    if "openvino" not in sys.modules:
        sys.modules["openvino.tools.ovc"] = None  # type: ignore[assignment]
        try:
            import openvino
        finally:
            del sys.modules["openvino.tools.ovc"]
    import openvino

    return openvino  # type: ignore[no-any-return]


ov = _import_runtime()
# OpenVINO's tables of types are set up at first use, and two threads that come to it at once wait for each other for
# ever: one has the table's lock, the other the interpreter's. So they are used once here.
ov.Tensor(np.zeros(1, ov.Type.f32.to_dtype()), shared_memory=True).data.sum()
ops = importlib.import_module("openvino.opset13")
"""Operations to build graphs of."""
passes = importlib.import_module("openvino.passes")
"""Rewriting of whole graphs."""
