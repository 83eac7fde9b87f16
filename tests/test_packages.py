"""The packages are this checkout's, and serving stays light."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["stream", "engines", "export", "models"])
def test_the_package_is_the_one_in_this_repository(name: str) -> None:
    assert Path(str(importlib.import_module(name).__file__)).is_relative_to(ROOT)


def test_serving_imports_neither_torch_nor_the_other_backend() -> None:
    code = (
        "import sys; import stream.runner, stream.cli, stream.tail, stream.doctor; "
        "print(sorted({'torch', 'onnx', 'openvino', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
