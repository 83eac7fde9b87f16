"""What loading an engine brings into the process: memory is what one pays for at each camera box."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_PROBE = """
import json, socket, sys
calls = []
socket.socket.connect = lambda self, address: calls.append(str(address))
from pathlib import Path
from engines.open import open_pack
open_pack(Path(sys.argv[1]), backend=sys.argv[2], require_parity=True)
names = ("torch", "onnx", "onnxruntime", "openvino", "openvino_telemetry", "openvino.tools.ovc")
print(json.dumps({"modules": [n for n in names if n in sys.modules], "calls": calls}))
"""


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_backend_loads_only_its_own_library_and_calls_nobody(tiny_master: Path, tmp_path: Path, backend: str) -> None:
    pytest.importorskip(backend)
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, str(tiny_master), backend],
        env={**os.environ, "PYTHONPATH": root, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert json.loads(done.stdout) == {"modules": [backend], "calls": []}
    assert list(tmp_path.iterdir()) == []
