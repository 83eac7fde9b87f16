"""Frames that stay on the device: each is uploaded once, and every batch that needs it gathers it by index there.

Frames of one size lie in one tensor. Each source has some rows of it, a ring: what is longest there makes way. A batch
over any number of sources is one ``index_select``. Uploads go through page-locked memory on a stream of their own;
events hold the order between them and the streams that read.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from engines.backends import first_line
from engines.device_colour import to_rgb
from engines.errors import BackendUnavailable, InferenceError
from engines.yuv import YuvFormat, YuvPicture, pack_all

Picture = NDArray[np.uint8] | YuvPicture
"""uint8 ``[H, W, 3]`` RGB at the size of its ring, or as a decoder left it, at any size. Known by identity."""

STAGED = 32
"""Pictures that are uploaded together at most."""


def ring_slots(samples: int, hop_samples: int, frames_per_sample: int, in_flight: int) -> int:
    """Slots that a ring needs to hold ``in_flight`` windows of one source, each a hop after the one before.

    ``frames_per_sample`` is 2 with look-back, else 1.
    """
    return frames_per_sample * (samples + (in_flight - 1) * hop_samples)


@dataclass(slots=True)
class FrameCounts:
    """What was done for the pictures of one size, since the beginning."""

    uploads: int = 0
    """Pictures copied to the device."""
    uploaded_bytes: int = 0
    """Bytes of them."""
    hits: int = 0
    """Pictures asked for that were there."""
    evictions: int = 0
    """Pictures that made way while somebody still held them."""

    def add(self, other: FrameCounts) -> None:
        """Add what was done elsewhere."""
        self.uploads += other.uploads
        self.uploaded_bytes += other.uploaded_bytes
        self.hits += other.hits
        self.evictions += other.evictions


class _Ring:
    """Which picture lies in which row; the host's memory is not kept for it."""

    def __init__(self, first: int, slots: int) -> None:
        self.first = first
        self.slots = slots
        self._order = deque(range(slots))
        self._held: list[weakref.ref[Picture] | None] = [None] * slots
        self._slot_of: dict[int, int] = {}

    def find(self, picture: Picture) -> int | None:
        """Row of a picture that is there."""
        slot = self._slot_of.get(id(picture))
        if slot is None or self._picture(slot) is not picture:
            return None
        return self.first + slot

    def place(self, picture: Picture, kept: Collection[int]) -> tuple[int, bool]:
        """A row for a new picture, and whether another made way that is still held; never one whose id is ``kept``.

        ``kept`` names fewer other pictures than there are slots.
        """
        while (old := self._picture(self._order[0])) is not None and id(old) in kept:
            self._order.rotate(-1)
        slot = self._order.popleft()
        self._order.append(slot)
        if old is not None:
            self._slot_of.pop(id(old), None)
        self._held[slot] = weakref.ref(picture)
        self._slot_of[id(picture)] = slot
        self._forget_dead()
        return self.first + slot, old is not None

    def _picture(self, slot: int) -> Picture | None:
        ref = self._held[slot]
        return None if ref is None else ref()

    def _forget_dead(self) -> None:
        """Ids of pictures that are gone may be those of others by now."""
        if len(self._slot_of) > self.slots:
            self._slot_of = {id(old): n for n in range(self.slots) if (old := self._picture(n)) is not None}


class DeviceFrames:
    """The frames of one size, of all sources. Safe to use from several threads."""

    def __init__(self, width: int, height: int, slots: int, device: str = "cuda") -> None:
        """``slots`` for each source: ``ring_slots``. Raises ``BackendUnavailable`` where there is no such device."""
        if slots < 2:
            raise ValueError(f"a ring needs at least 2 slots, not {slots}")
        self._width, self._height, self._slots = width, height, slots
        self._device = torch.device(device)
        if self._on_gpu and not torch.cuda.is_available():
            raise BackendUnavailable(f"torch {torch.__version__} has no CUDA device here; choose device cpu")
        self._lock = threading.Lock()
        self._copies = torch.cuda.Stream(self._device) if self._on_gpu else None  # type: ignore[no-untyped-call]
        self._uploaded: torch.cuda.Event | None = None
        self._reads: dict[int, torch.cuda.Event] = {}
        """By stream, the end of what was last queued there that reads rows."""
        self._rings: dict[str, _Ring] = {}
        self._free: list[int] = []
        # Row 0 stays black: what a missing frame looks like.
        try:
            self._pool = self._rows(1 + slots)
            self._settle()
        except RuntimeError as error:
            raise BackendUnavailable(f"{device} cannot hold frames ({first_line(error)}); choose device cpu") from error
        self._taken = 1
        self.counts = FrameCounts()
        """What was done so far."""

    @property
    def _on_gpu(self) -> bool:
        return self._device.type == "cuda"

    def _rows(self, count: int) -> torch.Tensor:
        return torch.zeros((count, self._height, self._width, 3), dtype=torch.uint8, device=self._device)

    @property
    def bytes_per_source(self) -> int:
        """Device memory of one ring."""
        return self._slots * self._width * self._height * 3

    @property
    def memory_bytes(self) -> int:
        """Device memory of all rings, those set aside for more sources with them."""
        return self._pool.numel()

    @property
    def sources(self) -> int:
        """Sources that have a ring."""
        return len(self._rings)

    def forget(self, source: str) -> None:
        """Let go of a source; the next one takes its rows."""
        with self._lock:
            if (ring := self._rings.pop(source, None)) is not None:
                self._free.append(ring.first)

    def gather(self, pictures: Sequence[tuple[str, Picture | None]], out: torch.Tensor | None = None) -> torch.Tensor:
        """uint8 ``[N, H, W, 3]`` of the pictures, each with its source; black where there is none.

        Those that are not there yet are uploaded. Work is queued on the caller's current stream; ``out`` is written
        where it is given. A batch with more pictures of one source than its ring has slots is gathered in parts.
        Raises ``InferenceError`` where the device fails or is full, ``ValueError`` for a picture of another size.
        """
        with self._lock:
            try:
                return self._gathered(pictures, out)
            except RuntimeError as error:  # torch's OutOfMemoryError is one too.
                self._forget_all()
                raise InferenceError(
                    f"{self._device} cannot take up frames ({first_line(error)}); use fewer sources, or device cpu"
                ) from error

    def _gathered(self, pictures: Sequence[tuple[str, Picture | None]], out: torch.Tensor | None) -> torch.Tensor:
        for _, picture in pictures:
            self._check(picture)
        if out is None:
            out = torch.empty((len(pictures), *self._pool.shape[1:]), dtype=torch.uint8, device=self._device)
        for first, last in self._parts(pictures):
            rows = self._resident(pictures[first:last])
            self._after_uploads()
            torch.index_select(self._pool, 0, self._indices(rows), out=out[first:last])
            self._note_read()
        return out

    def _forget_all(self) -> None:
        """Rows may not hold what the rings say."""
        self._free += [ring.first for ring in self._rings.values()]
        self._rings.clear()

    def _parts(self, pictures: Sequence[tuple[str, Picture | None]]) -> Iterator[tuple[int, int]]:
        """Ranges that need no more slots of any ring than it has."""
        first = 0
        needed: dict[str, set[int]] = {}
        for n, (source, picture) in enumerate(pictures):
            if picture is None:
                continue
            ids = needed.setdefault(source, set())
            if id(picture) not in ids and len(ids) == self._slots:
                yield first, n
                first = n
                needed = {source: (ids := set())}
            ids.add(id(picture))
        if first < len(pictures):
            yield first, len(pictures)

    def _resident(self, pictures: Sequence[tuple[str, Picture | None]]) -> list[int]:
        """Rows of the pictures, after queueing the uploads of those that were not there."""
        kept: dict[str, set[int]] = {}
        for source, picture in pictures:
            kept.setdefault(source, set()).add(id(picture))
        rows: list[int] = []
        new: list[tuple[int, Picture]] = []
        for source, picture in pictures:
            if picture is None:
                rows.append(0)
                continue
            ring = self._ring(source)
            row = ring.find(picture)
            if row is None:
                row, evicted = ring.place(picture, kept[source])
                self.counts.evictions += evicted
                new.append((row, picture))
            else:
                self.counts.hits += 1
            rows.append(row)
        self._upload(new)
        return rows

    def _check(self, picture: Picture | None) -> None:
        if isinstance(picture, np.ndarray) and picture.shape != (self._height, self._width, 3):
            raise ValueError(f"a picture is {list(picture.shape)}, must be {[self._height, self._width, 3]}")

    def _ring(self, source: str) -> _Ring:
        ring = self._rings.get(source)
        if ring is None:
            if self._free:
                first = self._free.pop()
            else:
                first, self._taken = self._taken, self._taken + self._slots
                if self._taken > len(self._pool):
                    self._grow()
            ring = self._rings[source] = _Ring(first, self._slots)
        return ring

    def _grow(self) -> None:
        """Room for twice as many sources."""
        self._settle()
        larger = self._rows(1 + 2 * (len(self._pool) - 1))
        larger[: len(self._pool)] = self._pool
        self._pool = larger
        self._settle()

    def _settle(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self._device)

    def _upload(self, new: Sequence[tuple[int, Picture]]) -> None:
        """Queue the pictures to their rows on the stream for copies."""
        groups: dict[YuvFormat | None, list[tuple[int, Picture]]] = {}
        for row, picture in new:
            form = picture.format if isinstance(picture, YuvPicture) else None
            groups.setdefault(form, []).append((row, picture))
        with self._copying():
            for form, members in groups.items():
                for first in range(0, len(members), STAGED):
                    self._upload_group(form, members[first : first + STAGED])

    def _upload_group(self, form: YuvFormat | None, members: Sequence[tuple[int, Picture]]) -> None:
        size = self._width * self._height * 3 if form is None else form.size
        staged = torch.empty((len(members), size), dtype=torch.uint8, pin_memory=self._on_gpu)
        host = staged.numpy()
        if form is None:
            for line, (_, picture) in zip(host, members, strict=True):
                line.reshape(self._height, self._width, 3)[...] = picture
        else:
            pack_all([picture for _, picture in members if isinstance(picture, YuvPicture)], host)
        # torch keeps page-locked memory from being used again until the copy has been made.
        sent = staged.to(self._device, non_blocking=True)
        if form is not None:
            images = to_rgb(sent, form, self._width, self._height)
        else:
            images = sent.view(-1, *self._pool.shape[1:])
        self._pool.index_copy_(0, self._indices([row for row, _ in members]), images)
        self.counts.uploads += len(members)
        self.counts.uploaded_bytes += size * len(members)

    def _indices(self, rows: list[int]) -> torch.Tensor:
        found = torch.tensor(rows, dtype=torch.int64, pin_memory=self._on_gpu)
        return found.to(self._device, non_blocking=True)

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        """On the stream for copies, after everything that still reads rows that may be overwritten."""
        if self._copies is None:
            yield
            return
        for read in self._reads.values():
            self._copies.wait_event(read)
        self._reads.clear()
        with torch.cuda.stream(self._copies):
            yield
            self._uploaded = self._copies.record_event()

    def _after_uploads(self) -> None:
        """What the caller queues next comes after the uploads."""
        if self._uploaded is not None:
            torch.cuda.current_stream(self._device).wait_event(self._uploaded)

    def _note_read(self) -> None:
        """The rows may be overwritten after what the caller has queued."""
        if self._on_gpu:
            stream = torch.cuda.current_stream(self._device)
            self._reads[stream.cuda_stream] = stream.record_event()
