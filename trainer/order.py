"""The order of training samples as a function of (seed, epoch) only: the same on any number of workers.

An epoch permutes the shards, cuts their concatenated rows into ``lanes`` equal ranges, cuts each range into windows
of about ``shuffle_shards`` shards, and shuffles inside a window. Step s takes the next ``batch_size / lanes`` rows of
every lane, lanes in order; a worker owns consecutive lanes, so it reads only its own shards and the workers' batches,
put side by side, are the global batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from common.seeding import rng

_ROW_BITS = 32


def split_places(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places (int64, any shape) -> their shards and their rows inside the shard."""
    return places >> _ROW_BITS, places & ((1 << _ROW_BITS) - 1)


@dataclass(frozen=True)
class Segment:
    """Consecutive steps ``first`` to ``stop`` (exclusive) of one window of one epoch, counted inside the window."""

    epoch: int
    window: int
    first: int
    stop: int


@dataclass(frozen=True)
class Order:
    """The order of all epochs over the eligible rows of some shards."""

    shards: tuple[int, ...]
    """Shard numbers, ascending."""
    rows: tuple[np.ndarray, ...]
    """For each shard, its eligible rows, ascending."""
    batch_size: int
    lanes: int
    shuffle_shards: int
    seed: int

    @property
    def eligible(self) -> int:
        """Rows that may be drawn."""
        return sum(len(rows) for rows in self.rows)

    @property
    def lane_batch(self) -> int:
        """Rows that each lane gives to a step."""
        return self.batch_size // self.lanes

    @cached_property
    def steps_per_epoch(self) -> int:
        """Full batches in an epoch; the remainder, another one each epoch, is left out."""
        return self.eligible // self.batch_size

    @cached_property
    def steps_per_window(self) -> int:
        """Steps after which every lane moves on to its next shards."""
        filled = sum(len(rows) > 0 for rows in self.rows)
        window_rows = self.shuffle_shards * self.eligible / max(filled, 1)
        return max(1, min(self.steps_per_epoch, round(window_rows / self.lane_batch)))

    def epoch_of(self, step: int) -> int:
        """The epoch that a step, counted from the start of training, belongs to."""
        return step // self.steps_per_epoch

    def segments(self, first_step: int, total_steps: int) -> Iterator[Segment]:
        """The windows between two steps, in order; the first and the last may be cut."""
        step = first_step
        while step < total_steps:
            epoch, in_epoch = divmod(step, self.steps_per_epoch)
            window, first = divmod(in_epoch, self.steps_per_window)
            left_in_epoch = self.steps_per_epoch - window * self.steps_per_window
            stop = min(self.steps_per_window, left_in_epoch, first + total_steps - step)
            yield Segment(epoch, window, first, stop)
            step += stop - first

    def segment_places(self, segment: Segment, lanes: range) -> np.ndarray:
        """The samples of a segment's steps, for some of the lanes.

        Returns:
            int64 places [steps, len(lanes) * lane_batch]; see :func:`split_places`.
        """
        columns = [self._lane_window(segment.epoch, segment.window, lane) for lane in lanes]
        return np.concatenate(columns, axis=1)[segment.first : segment.stop]

    def step_places(self, step: int) -> np.ndarray:
        """The global batch of a step, counted from the start of training: places [batch_size]."""
        (segment,) = self.segments(step, step + 1)
        places: np.ndarray = self.segment_places(segment, range(self.lanes))[0]
        return places

    def _lane_window(self, epoch: int, window: int, lane: int) -> np.ndarray:
        """One lane's rows in one window, shuffled: places [steps in window, lane_batch]."""
        lane_rows = self.steps_per_epoch * self.lane_batch
        first = window * self.steps_per_window * self.lane_batch
        stop = min(first + self.steps_per_window * self.lane_batch, lane_rows)
        # Skipping a random number of rows at the front makes the left-out remainder another one in each epoch.
        skipped = int(rng(self.seed, "front", epoch).integers(self.eligible - self.lanes * lane_rows + 1))
        places = self._places(epoch, skipped + lane * lane_rows + first, skipped + lane * lane_rows + stop)
        rng(self.seed, "window", epoch, lane, window).shuffle(places)
        return places.reshape(-1, self.lane_batch)

    def _places(self, epoch: int, first: int, stop: int) -> np.ndarray:
        """Rows ``first`` to ``stop`` of the concatenation of this epoch's permuted shards."""
        order = rng(self.seed, "shards", epoch).permutation(len(self.shards))
        ends = np.cumsum([len(self.rows[index]) for index in order])
        found = []
        for k in range(int(np.searchsorted(ends, first, side="right")), len(order)):
            rows = self.rows[order[k]]
            start = int(ends[k]) - len(rows)
            if start >= stop:
                break
            piece = rows[max(first - start, 0) : stop - start].astype(np.int64)
            found.append(piece + (self.shards[order[k]] << _ROW_BITS))
        return np.concatenate(found)


def worker_lanes(lanes: int, rank: int, workers: int) -> range:
    """The lanes that one of several workers reads; ``workers`` divides ``lanes``."""
    share = lanes // workers
    return range(rank * share, (rank + 1) * share)
