"""What the driver's machine is doing right now: CPU, GPUs, memory, Ray's object store; unknown figures are None."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from typing import Any

GPU_QUERY = ("--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits")
GPU_PATIENCE_SECONDS = 10.0


@dataclass(frozen=True)
class HostSample:
    """One look at the machine.

    Attributes:
        at: Seconds since the run began.
        cpu_percent: Of all cores, since the look before.
        gpu_percent: Mean over the machine's GPUs.
        gpu_memory_bytes: In use on all of them together.
        rss_bytes: Memory of the driver's own process.
        memory_percent: Share of the machine's memory that is in use.
        object_store_bytes: Used of Ray's object store, in the whole cluster.
        object_store_limit: Its size.
    """

    at: float
    cpu_percent: float | None = None
    gpu_percent: float | None = None
    gpu_memory_bytes: int | None = None
    rss_bytes: int | None = None
    memory_percent: float | None = None
    object_store_bytes: int | None = None
    object_store_limit: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The sample as plain values, without what is not known."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class HostProbe:
    """Looks at the machine; each look takes milliseconds, since the GPUs are asked on a thread of its own."""

    def __init__(self) -> None:
        import psutil

        self._psutil = psutil
        self._process = psutil.Process()
        psutil.cpu_percent()  # the first call has nothing to compare with and returns 0
        self._smi = shutil.which("nvidia-smi")
        self._gpu: tuple[float, int] | None = None
        self._asking: threading.Thread | None = None
        self._ask_gpus()

    def look(self, at: float) -> HostSample:
        """One sample; the GPU figures are those of the question asked at the look before."""
        self._ask_gpus()
        gpu_percent, gpu_memory = self._gpu or (None, None)
        used, limit = object_store()
        rss: int | None = None
        memory: float | None = None
        cpu: float | None = None
        with contextlib.suppress(self._psutil.Error, OSError):
            rss = int(self._process.memory_info().rss)
            memory = float(self._psutil.virtual_memory().percent)
            cpu = float(self._psutil.cpu_percent())
        return HostSample(at, cpu, gpu_percent, gpu_memory, rss, memory, used, limit)

    def _ask_gpus(self) -> None:
        if self._smi is None or (self._asking is not None and self._asking.is_alive()):
            return
        self._asking = threading.Thread(target=self._read_gpus, args=(self._smi,), daemon=True, name="gpu-use")
        self._asking.start()

    def _read_gpus(self, command: str) -> None:
        try:
            done = subprocess.run(
                [command, *GPU_QUERY], capture_output=True, text=True, timeout=GPU_PATIENCE_SECONDS, check=True
            )
            self._gpu = parse_gpu_use(done.stdout)
        except (OSError, subprocess.SubprocessError):
            self._gpu = None


def parse_gpu_use(answer: str) -> tuple[float, int] | None:
    """Mean utilisation in percent and memory in bytes from nvidia-smi's lines; None where it does not say."""
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines() if line.strip()]
    try:
        use, memory = zip(*((float(a), float(b)) for a, b in rows), strict=True)
    except ValueError:  # "[N/A]" on a card that is split into instances, or no rows at all
        return None
    return sum(use) / len(use), int(sum(memory)) << 20


def object_store() -> tuple[int | None, int | None]:
    """Bytes used of the cluster's object store and its size; None where this process has no Ray or Ray does not say."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None, None
    try:
        limit = ray.cluster_resources().get("object_store_memory")
        free = ray.available_resources().get("object_store_memory", 0.0)
    except (ray.exceptions.RayError, RuntimeError, OSError):
        return None, None
    return (None, None) if limit is None else (int(limit - free), int(limit))
