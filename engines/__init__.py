"""Load and run packs. Holds no training code and needs no torch."""

import os

# From 1.29 on ONNX Runtime reports its use to its maker, unless this is set before it is first imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
