"""The spool: order, durability, limits and damage, on real files."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stream.clock import NS_PER_S
from stream.errors import EventRejected, SpoolError
from stream.sinks.spool import Spool


@pytest.fixture
async def spool(tmp_path: Path, clock: Any) -> Any:
    made = Spool(tmp_path / "home" / "spool.db", clock=clock)
    await made.open()
    yield made
    await made.aclose()


async def _ids(spool: Spool) -> list[str]:
    return [entry.event.id for entry in await spool.peek(10_000)]


async def test_events_come_out_in_order_as_they_went_in(spool: Spool, make_event: Any) -> None:
    await spool.append([make_event(1, text="é\n"), make_event(2)])
    await spool.append([make_event(3)])
    first, second = await spool.peek(2)
    event = first.event
    want = make_event(1, text="é\n")
    assert {name: getattr(event, name) for name in event.__slots__} == {n: getattr(want, n) for n in want.__slots__}
    assert spool.count == 3
    await spool.remove(second.seq)
    assert await _ids(spool) == ["gate-action-3"]
    assert spool.count == 1


async def test_the_age_of_the_oldest_is_told(spool: Spool, clock: Any, make_event: Any) -> None:
    assert spool.oldest_age_s() == 0.0
    await spool.append([make_event(1)])
    clock.advance(5 * NS_PER_S)
    await spool.append([make_event(2)])
    assert spool.oldest_age_s() == 5.0
    await spool.remove((await spool.peek(1))[0].seq)
    assert spool.oldest_age_s() == 0.0


async def test_events_can_be_put_before_all_others(spool: Spool, make_event: Any) -> None:
    await spool.prepend([make_event(4)])
    await spool.append([make_event(5)])
    await spool.prepend([make_event(2), make_event(3)])
    await spool.prepend([make_event(1)])
    assert await _ids(spool) == [f"gate-action-{number}" for number in range(1, 6)]
    await spool.remove((await spool.peek(3))[-1].seq)
    assert await _ids(spool) == ["gate-action-4", "gate-action-5"]


async def test_places_are_never_given_twice(spool: Spool, make_event: Any) -> None:
    await spool.append([make_event(1)])
    (first,) = await spool.peek(1)
    await spool.remove(first.seq)
    await spool.append([make_event(2)])
    (second,) = await spool.peek(1)
    assert second.seq > first.seq


def _run_to_its_end(code: str, path: Path) -> int:
    return subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode


async def test_it_survives_a_kill_of_the_process(tmp_path: Path, clock: Any) -> None:
    path = tmp_path / "spool.db"
    writer = (
        "import asyncio, os, signal, sys\n"
        "from pathlib import Path\n"
        "from stream.clock import SystemClock\n"
        "from stream.sinks.spool import Spool\n"
        "from stream.types import Event\n"
        "async def main():\n"
        "    spool = Spool(Path(sys.argv[1]), clock=SystemClock())\n"
        "    await spool.open()\n"
        "    for n in range(50):\n"
        "        await spool.append([Event(f'e{n}', 't', 's', '', 'l', 'action', {}, 0, 0)])\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    assert _run_to_its_end(writer, path) == -signal.SIGKILL
    spool = Spool(path, clock=clock)
    await spool.open()
    assert await _ids(spool) == [f"e{number}" for number in range(50)]
    await spool.aclose()


async def test_a_second_process_is_kept_out(spool: Spool, clock: Any) -> None:
    second = Spool(spool.path, clock=clock)
    with pytest.raises(SpoolError, match="another Sightwire"):
        await second.open()
    await second.aclose()


async def test_it_is_bounded_and_takes_events_again_once_drained(tmp_path: Path, clock: Any, make_event: Any) -> None:
    spool = Spool(tmp_path / "spool.db", clock=clock, max_bytes=1 << 20)
    await spool.open()
    with pytest.raises(SpoolError, match="full at 1 MB; bring Redis back or raise"):
        for number in range(1000):
            await spool.append([make_event(number, blob="x" * 10_000)])
    kept = spool.count
    assert 50 < kept < 110
    assert await _ids(spool) == [f"gate-action-{number}" for number in range(kept)], "a refused event leaves no trace"
    await spool.remove((await spool.peek(kept))[-1].seq)
    await spool.append([make_event(2000)])
    assert await _ids(spool) == ["gate-action-2000"]
    await spool.aclose()
    assert spool.path.stat().st_size < 200_000, "a drained spool gives its space back"


async def test_a_batch_is_taken_whole_or_not_at_all(tmp_path: Path, clock: Any, make_event: Any) -> None:
    spool = Spool(tmp_path / "spool.db", clock=clock, max_bytes=1 << 20)
    await spool.open()
    with pytest.raises(SpoolError):
        await spool.append([make_event(number, blob="x" * 100_000) for number in range(20)])
    assert spool.count == 0
    assert await _ids(spool) == []
    await spool.aclose()


async def test_a_payload_that_is_not_json_is_rejected(spool: Spool, make_event: Any) -> None:
    with pytest.raises(EventRejected, match="not JSON"):
        await spool.append([make_event(1), make_event(2, bad=object())])
    assert spool.count == 0


async def test_quarantine_takes_an_event_out_and_requeue_puts_it_back(spool: Spool, make_event: Any) -> None:
    await spool.append([make_event(1), make_event(2)])
    entry = (await spool.peek(1))[0]
    await spool.quarantine(entry.event, "refused", entry.seq)
    await spool.quarantine(make_event(9), "refused")
    assert (spool.count, spool.quarantined) == (1, 2)
    assert await spool.requeue() == 2
    assert await _ids(spool) == ["gate-action-2", "gate-action-1", "gate-action-9"]
    assert spool.quarantined == 0


def _damaged(folder: Path) -> list[Path]:
    return list(folder.glob("spool.db.damaged-*"))


def _damage(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size * 3 // 4)
        file.write(b"\xa5" * 20_000)


async def _filled(path: Path, clock: Any, make_event: Any, count: int) -> None:
    spool = Spool(path, clock=clock)
    await spool.open()
    await spool.append([make_event(number, blob="x" * 2000) for number in range(count)])
    await spool.aclose()


async def test_a_file_that_is_no_database_is_moved_aside(
    tmp_path: Path, clock: Any, make_event: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "spool.db"
    path.write_bytes(b"this is not a database, but it is long enough to look at" * 100)
    spool = Spool(path, clock=clock)
    await spool.open()
    (aside,) = _damaged(tmp_path)
    assert aside.read_bytes().startswith(b"this is not")
    assert str(aside) in caplog.text
    await spool.append([make_event(1)])
    assert await _ids(spool) == ["gate-action-1"]
    await spool.aclose()


async def test_what_can_be_read_of_a_damaged_file_is_saved(
    tmp_path: Path, clock: Any, make_event: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "spool.db"
    await _filled(path, clock, make_event, 200)
    _damage(path)
    spool = Spool(path, clock=clock)
    await spool.open()
    saved = await _ids(spool)
    numbers = [int(name.rpartition("-")[2]) for name in saved]
    assert numbers == sorted(set(numbers)) and {0, 199} <= set(numbers), "what lies on either side of the damage"
    assert 150 < len(saved) < 200
    assert f"{len(saved)} events read from it" in caplog.text
    assert len(_damaged(tmp_path)) == 1
    await spool.aclose()


async def test_damage_found_while_events_are_taken_out_costs_no_others(
    spool: Spool, make_event: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await spool.append([make_event(number) for number in range(10)])
    await spool.remove((await spool.peek(4))[-1].seq)
    batch = await spool.peek(2)
    remove, found = spool._remove, []

    def remove_at_the_second_try(up_to: int) -> None:
        found.append(up_to)
        if len(found) == 1:
            error = sqlite3.DatabaseError("database disk image is malformed")
            error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
            raise error
        remove(up_to)

    monkeypatch.setattr(spool, "_remove", remove_at_the_second_try)
    await spool.remove(batch[-1].seq)
    assert len(_damaged(spool.path.parent)) == 1
    assert await _ids(spool) == [f"gate-action-{number}" for number in range(6, 10)]
    assert spool.count == 4


async def test_a_damaged_file_that_cannot_be_saved_now_is_saved_later(
    tmp_path: Path, clock: Any, make_event: Any
) -> None:
    path = tmp_path / "spool.db"
    await _filled(path, clock, make_event, 400)
    _damage(path)
    small = Spool(path, clock=clock, max_bytes=256 << 10)
    with pytest.raises(SpoolError, match=r"spool.max_mb|disk is full"):
        await small.open()
    await small.aclose()
    assert not _damaged(tmp_path), "the next start finds it where it was"
    spool = Spool(path, clock=clock)
    await spool.open()
    assert spool.count > 300
    await spool.aclose()


async def test_an_entry_that_is_no_event_counts_as_damage(tmp_path: Path, clock: Any, make_event: Any) -> None:
    path = tmp_path / "spool.db"
    spool = Spool(path, clock=clock)
    await spool.open()
    await spool.append([make_event(1)])
    spool._connection.execute("INSERT INTO events(added_ns, body) VALUES (0, ?)", (json.dumps({"id": "x"}),))
    spool._connection.commit()
    await spool.append([make_event(2)])
    assert await _ids(spool) == ["gate-action-1", "gate-action-2"]
    assert len(_damaged(tmp_path)) == 1
    await spool.aclose()


async def test_a_file_of_another_version_is_left_alone(tmp_path: Path, clock: Any, make_event: Any) -> None:
    path = tmp_path / "spool.db"
    spool = Spool(path, clock=clock)
    await spool.open()
    spool._connection.execute("PRAGMA user_version = 99")
    await spool.aclose()
    with pytest.raises(SpoolError, match=r"another version \(99\)"):
        await Spool(path, clock=clock).open()
    assert path.exists()


async def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path, clock: Any) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpoolError, match="check the disk"):
        await Spool(tmp_path / "file" / "spool.db", clock=clock).open()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
async def test_a_full_disk_is_a_spool_error(tmp_path: Path, clock: Any, make_event: Any) -> None:
    spool = Spool(tmp_path / "spool.db", clock=clock)
    await spool.open()
    await spool.aclose()
    (tmp_path / "spool.db-wal").symlink_to("/dev/full")
    spool = Spool(tmp_path / "spool.db", clock=clock)
    with pytest.raises(SpoolError):
        await spool.open()
        await spool.append([make_event(1)])
    await spool.aclose()
