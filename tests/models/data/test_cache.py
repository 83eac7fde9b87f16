"""The cache is whole, bounded, and never the reason that something is lost."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from models.data.cache import ArrayCache, Arrays, cache_key, file_identity
from models.errors import DataError


def arrays(value: int, count: int = 1000) -> Arrays:
    return {"a": np.full(count, value, np.int64), "empty": np.zeros((0, 2), np.int64)}


def never() -> Arrays:
    raise AssertionError("made anew")


def test_what_is_kept_is_read_again(tmp_path: Path) -> None:
    cache = ArrayCache(tmp_path, 10**6)
    key = cache_key("clip", 1)
    assert cache.get(key, lambda: arrays(7))["a"][0] == 7
    again = ArrayCache(tmp_path, 10**6).get(key, never)
    assert again["a"].tolist() == [7] * 1000 and again["empty"].shape == (0, 2)
    assert not list(tmp_path.glob("part-*"))


def test_a_damaged_entry_is_made_again(tmp_path: Path) -> None:
    cache = ArrayCache(tmp_path, 10**6)
    key = cache_key("clip")
    cache.get(key, lambda: arrays(1))
    file = next(tmp_path.rglob("a.npy"))
    file.write_bytes(file.read_bytes()[:5000])
    assert cache.get(key, lambda: arrays(2))["a"][-1] == 2
    assert cache.get(key, never)["a"][-1] == 2


def test_the_oldest_go_first(tmp_path: Path) -> None:
    cache = ArrayCache(tmp_path, 100_000)
    for number in range(30):
        cache.get(cache_key(number), lambda number=number: arrays(number))  # type: ignore[misc]
        for entry in tmp_path.glob("??/*"):
            os.utime(entry, (entry.stat().st_mtime - 10,) * 2)
        if number:
            cache.get(cache_key(0), lambda: arrays(0))
        total = sum(file.stat().st_size for file in tmp_path.rglob("*.npy"))
        assert total <= 100_000 * 1.1
    assert cache.get(cache_key(0), never)["a"][0] == 0, "what is used stays"
    with pytest.raises(AssertionError, match="made anew"):
        cache.get(cache_key(1), never)


def test_an_entry_that_can_never_fit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"raise data\.cache_gb"):
        ArrayCache(tmp_path, 5000).get("k" * 32, lambda: arrays(1))


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """In a process whose files may not grow: the write fails as on a full disk, and nothing half-made stays."""
    script = (
        "import resource, signal, numpy as np\n"
        "from pathlib import Path\n"
        "from models.data.cache import ArrayCache\n"
        "from models.errors import DataError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        f"    ArrayCache(Path({str(tmp_path)!r}), 10**9).get('ab' * 16, lambda: {{'a': np.zeros(10**5)}})\n"
        "except DataError as error:\n"
        "    print(error)\n"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=True)
    assert "cannot be written" in done.stdout and "set data.cache elsewhere" in done.stdout
    assert done.stdout.count("\n") == 1
    assert not list(tmp_path.rglob("*.npy"))


def test_a_place_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be written") as caught:
        ArrayCache(tmp_path / "file", 10**6).get("ab" * 16, lambda: arrays(1))
    assert os.strerror(errno.ENOTDIR) in str(caught.value) or "exists" in str(caught.value)


def test_a_changed_file_has_another_key(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"one")
    before = file_identity(path)
    path.write_bytes(b"other")
    assert file_identity(path) != before
    with pytest.raises(DataError, match=r"absent\.mp4"):
        file_identity(tmp_path / "absent.mp4")
