"""Forward passes of one shape: padded micro-batches, copies that overlap them, and what to do when one fails."""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy as np
import torch

Tower = Callable[[torch.Tensor], torch.Tensor]


class _Result(NamedTuple):
    """What a pass gave for rows ``begin`` to ``stop``: on the CPU, or on its way there until ``copied``."""

    begin: int
    stop: int
    unit_BD: torch.Tensor
    norm_B: torch.Tensor
    copied: torch.cuda.Event | None = None


MANY_ROWS = 8
"""So many rows never fail alike by themselves."""
MOST_LANES = 4
"""Each needs the working memory of a pass."""
_STAGES = 2
"""Pinned buffers: one is filled while the other is being copied to the GPU."""


@functools.cache
def lanes_of(threads: int) -> ThreadPoolExecutor:
    """The lanes among which a process splits its threads, whatever models it holds: each keeps memory of its own."""
    lanes = min(threads, MOST_LANES)
    # Threads that are left over go to the first lanes, one each.
    each = [threads // lanes + (lane < threads % lanes) for lane in range(lanes)]
    shares = iter(each)
    return ThreadPoolExecutor(lanes, "mmkd-lane", lambda: torch.set_num_threads(next(shares, each[-1])))


class MicroBatches:
    """Runs inputs through a tower, so many rows at a time, and counts the passes.

    Every pass has the same shape, whatever is left over, so that a vector does not depend on its neighbours. When the
    GPU runs out of memory the micro-batch is halved, for good, and the work goes on.

    On a CPU the threads are split into lanes, each with a pass of its own. Many threads in one pass meet at the end of
    each operation, and where another process has one of their cores, all wait for it.

    Args:
        device: Where the model lies.
        rows: Of a pass.
        autocast: Type of the forward pass on a GPU; a CPU always computes in float32.
        precision: What vectors are rounded to.
        threads: torch threads on a CPU, for all lanes together.
    """

    def __init__(
        self,
        device: str,
        rows: int,
        autocast: torch.dtype | None = None,
        precision: torch.dtype = torch.float16,
        threads: int = 1,
    ) -> None:
        self.device = device
        self.rows = rows
        self.precision = precision
        self.count = 0
        self._counting = threading.Lock()
        self.on_gpu = device.startswith("cuda")
        self.autocast = autocast if self.on_gpu else None
        self._copies = torch.cuda.Stream(device) if self.on_gpu else None
        self._lane_count = 1 if self.on_gpu else min(threads, MOST_LANES)
        self._lanes = lanes_of(threads) if self._lane_count > 1 else None

    @torch.inference_mode()
    def run(self, tower: Tower, inputs: np.ndarray, dim: int) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
        """Inputs [N, ...] through a tower of width ``dim``.

        Returns:
            Unit vectors rounded to ``precision``, float32 [N, dim]; their lengths before, float32 [N] (NaN where the
            tower failed on a row by itself); and row -> what the tower said, for those.

        Raises:
            torch.OutOfMemoryError: Not even one row fits.
            RuntimeError: The device is lost, or all rows of a pass fail alike: that is no row's fault.
        """
        vectors, norms = np.empty((len(inputs), dim), np.float32), np.full(len(inputs), np.nan, np.float32)
        failures: dict[int, str] = {}
        start = 0
        while start < len(inputs):
            try:
                self._stream(tower, inputs, start, vectors, norms)
                break
            except _PassError as failed:
                start = failed.start
                if isinstance(failed.cause, torch.OutOfMemoryError):
                    self._halve(failed.cause)
                    continue
            # Out here the traceback of the failed pass no longer holds its tensors.
            self._insist_on_device()
            first, start = start, self._one_by_one(tower, inputs, start, vectors, norms, failures)
            said = {failures.get(row) for row in range(first, start)}
            if start - first >= MANY_ROWS and len(said) == 1 and None not in said:
                raise RuntimeError(f"all {start - first} rows of a pass fail alike: {said.pop()}")
        vectors[~np.isfinite(norms)] = 0
        return vectors, norms, failures

    def _stream(self, tower: Tower, inputs: np.ndarray, start: int, vectors: np.ndarray, norms: np.ndarray) -> None:
        """Pass after pass; a result is fetched only when the next pass is on its way, so that the GPU never waits."""
        if self._lanes is not None and len(inputs) - start > (self._lane_count - 1) * self.rows:
            self._stream_in_lanes(self._lanes, tower, inputs, start, vectors, norms)
            return
        stages = [self._stage(inputs) for _ in range(_STAGES if self.on_gpu else 1)]
        waiting: _Result | None = None
        for number, begin in enumerate(range(start, len(inputs), self.rows)):
            stop = min(begin + self.rows, len(inputs))
            try:
                batch = self._load(stages[number % len(stages)], inputs[begin:stop])
                unit_BD, norm_B = self._forward(tower, batch)
                fetching = self._bring_back(begin, stop, unit_BD, norm_B)
            except Exception as error:  # which row it means, if it means a row, is found out one by one
                self._fetch(waiting, vectors, norms)
                raise _PassError(begin, error) from error
            self._fetch(waiting, vectors, norms)
            waiting = fetching
        self._fetch(waiting, vectors, norms)

    def _stream_in_lanes(
        self,
        lanes: ThreadPoolExecutor,
        tower: Tower,
        inputs: np.ndarray,
        start: int,
        vectors: np.ndarray,
        norms: np.ndarray,
    ) -> None:
        """Passes side by side; of those that failed the first counts, and those before it are done."""
        stages = [self._stage(inputs) for _ in range(self._lane_count)]
        waiting: deque[tuple[int, Future[_Result]]] = deque()

        def fetch_oldest() -> None:
            begin, future = waiting.popleft()
            try:
                result = future.result()
            except Exception as error:
                wait([later for _, later in waiting])  # they may use what is about to be looked at row by row
                raise _PassError(begin, error) from error
            self._fetch(result, vectors, norms)

        for number, begin in enumerate(range(start, len(inputs), self.rows)):
            if len(waiting) == self._lane_count:
                fetch_oldest()  # whose buffer is taken again now
            stage = stages[number % self._lane_count]
            waiting.append((begin, lanes.submit(self._pass, tower, inputs, begin, stage)))
        while waiting:
            fetch_oldest()

    @torch.inference_mode()  # a thread has a mode of its own
    def _pass(
        self, tower: Tower, inputs: np.ndarray, begin: int, stage: tuple[torch.Tensor, torch.cuda.Event | None]
    ) -> _Result:
        stop = min(begin + self.rows, len(inputs))
        return self._bring_back(begin, stop, *self._forward(tower, self._load(stage, inputs[begin:stop])))

    def _stage(self, inputs: np.ndarray) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        like = torch.from_numpy(np.zeros((self.rows, *inputs.shape[1:]), inputs.dtype))
        return (like.pin_memory(), torch.cuda.Event()) if self.on_gpu else (like, None)

    def _load(self, stage: tuple[torch.Tensor, torch.cuda.Event | None], chunk: np.ndarray) -> torch.Tensor:
        """A padded chunk on the device; on a GPU the copy runs beside the pass before it."""
        buffer, copied = stage
        if copied is not None:
            copied.synchronize()  # the copy that used this buffer last; at once if there was none
        array = buffer.numpy()
        array[: len(chunk)] = chunk
        array[len(chunk) :] = 0
        if self._copies is None or copied is None:
            return buffer
        with torch.cuda.stream(self._copies):
            batch = buffer.to(self.device, non_blocking=True)
            copied.record(self._copies)
        torch.cuda.current_stream(self.device).wait_stream(self._copies)
        batch.record_stream(torch.cuda.current_stream(self.device))
        return batch

    def _forward(self, tower: Tower, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cuda", dtype=self.autocast, enabled=self.autocast is not None):
            out_BD = tower(batch).float()
        with self._counting:
            self.count += 1
        norm_B = out_BD.norm(dim=1)
        return (out_BD / norm_B.clamp_min(1e-12)[:, None]).to(self.precision), norm_B

    def _bring_back(self, begin: int, stop: int, unit_BD: torch.Tensor, norm_B: torch.Tensor) -> _Result:
        if not self.on_gpu:
            return _Result(begin, stop, unit_BD, norm_B)
        # Queued now, ahead of the next pass: a copy that is asked for later runs only when that pass is over too.
        unit_BD, norm_B = unit_BD.to("cpu", non_blocking=True), norm_B.to("cpu", non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self.device))
        return _Result(begin, stop, unit_BD, norm_B, copied)

    def _fetch(self, result: _Result | None, vectors: np.ndarray, norms: np.ndarray) -> None:
        if result is None:
            return
        if result.copied is not None:
            result.copied.synchronize()
        rows = result.stop - result.begin
        vectors[result.begin : result.stop] = result.unit_BD[:rows].float().numpy()
        norms[result.begin : result.stop] = result.norm_B[:rows].numpy()

    def _one_by_one(
        self,
        tower: Tower,
        inputs: np.ndarray,
        start: int,
        vectors: np.ndarray,
        norms: np.ndarray,
        failures: dict[int, str],
    ) -> int:
        """Each row of a failed pass in a pass of its own; returns where the next pass begins."""
        row, stop = start, min(start + self.rows, len(inputs))
        while row < stop:
            try:
                self._alone(tower, inputs, row, vectors, norms, failures)
            except torch.OutOfMemoryError as error:
                self._halve(error)
            else:
                row += 1
        return stop

    def _alone(
        self,
        tower: Tower,
        inputs: np.ndarray,
        row: int,
        vectors: np.ndarray,
        norms: np.ndarray,
        failures: dict[int, str],
    ) -> None:
        try:
            unit_BD, norm_B = self._forward(tower, self._load(self._stage(inputs), inputs[row : row + 1]))
        except torch.OutOfMemoryError:
            raise  # says nothing about this row
        except Exception as error:  # noqa: BLE001 - whatever a model raises about one row is that row's reason
            self._insist_on_device()
            failures[row] = f"{type(error).__name__}: {str(error)[:300]}"
            return
        self._fetch(self._bring_back(row, row + 1, unit_BD, norm_B), vectors, norms)

    def _halve(self, error: BaseException) -> None:
        if self.rows == 1:
            raise error
        self.rows //= 2
        if self.on_gpu:
            torch.cuda.empty_cache()

    def _insist_on_device(self) -> None:
        """After some errors nothing runs in this process any more; then a new process must take over."""
        if self.on_gpu:
            torch.cuda.synchronize()


class _PassError(Exception):
    """A pass failed; those before it are done."""

    def __init__(self, start: int, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.start, self.cause = start, cause
