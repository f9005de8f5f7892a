"""Ray, started or joined once per command, and shut down with it."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from cluster.reaching import home_fault, insist_on_answer
from common.errors import ClusterError
from common.logs import logger

# Decode tasks and training workers are counted in whole CPUs; a small machine still needs room for both kinds.
MIN_LOGICAL_CPUS = 4
IDLE_WORKER_LIFE_MS = "600000"
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Processes that serve a raylet (2.60) and outlive one whose driver was killed, for a minute."""
STREAM_THREADS = ("StreamingExecutor", "iter_threaded")
"""So Ray Data (2.60) names the threads of a stream that ask Ray for something, in the process that reads it."""
STREAMS_END_SECONDS = 10.0


def set_environment() -> None:
    """Say by environment variables what Ray and torch read when they are imported: to be called before that."""
    # Spinning OpenMP threads starve the decode tasks beside them: on two busy cores, training was ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    # Without this, whatever still runs while a command ends would start another Ray, or join one that somebody else
    # has on this machine.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "WARNING")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # For the raylet of a local Ray: it ends workers that were idle for a second when there are more of them than free
    # CPUs. Extraction leaves none free, so each shard's write, and a prepare that had to wait, would start Python anew.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", IDLE_WORKER_LIFE_MS)


@contextmanager
def ray_session(num_gpus: int | None = None) -> Iterator[None]:
    """Join the cluster named by ``RAY_ADDRESS`` (a submitted job has it), else start a local Ray for this command.

    Args:
        num_gpus: Logical GPUs of a local Ray; None lets Ray look.

    Raises:
        ClusterError: The named cluster does not answer, or a local Ray does not start.
    """
    set_environment()
    # Advice about pools that are larger than a small lake needs, and about progress bars we switch off.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"ray\.data\..*")
    for name in ("ray.data._internal.progress", "ray._private.authentication"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": True, "configure_logging": True}
    restore = _end_orderly_on_sigterm()
    try:
        if address and address != "local":
            logger.info("joining the Ray cluster at %s", address)
            insist_on_answer(address)
            ray.init(**quiet)
        else:
            _need_no_home()
            _end_orphans()
            cpus = max(os.cpu_count() or 1, MIN_LOGICAL_CPUS)
            logger.info("starting a local Ray (%d logical CPUs)", cpus)
            ray.init(address="local", num_cpus=cpus, num_gpus=num_gpus, include_dashboard=False, **quiet)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        restore()
        raise ClusterError(
            f"Ray could not be reached or started (RAY_ADDRESS={address or 'not set'}): {error}. "
            "Unset RAY_ADDRESS to run on this machine, or check that the cluster is up with `ray status`."
        ) from error
    _end_orderly_on_sigterm()  # Ray has put its own handler there, which ends with status 15
    try:
        yield
    finally:
        _let_streams_end()
        ray.shutdown()
        restore()


def _end_orderly_on_sigterm() -> Callable[[], object]:
    """Let SIGTERM leave this process by its context managers, with status 143; whoever wants more takes it over.

    Returns:
        What puts the handler back that was there.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    before = signal.getsignal(signal.SIGTERM)

    def leave(number: int, _: object) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    return lambda: signal.signal(signal.SIGTERM, before)


def _let_streams_end() -> None:
    """Wait for what a stream that was closed early still asks of Ray: without Ray, the answer is the process's end."""
    deadline = time.monotonic() + STREAMS_END_SECONDS
    for thread in threading.enumerate():
        if thread.name.startswith(STREAM_THREADS):
            thread.join(max(0.0, deadline - time.monotonic()))


def _end_orphans() -> None:
    """End what drivers that were killed left of their local Rays: this user's agents whose raylet is gone."""
    for process in psutil.process_iter():
        try:
            if process.name() in AGENTS and process.uids().real == os.getuid():
                parent = process.parent()
                if parent is None or parent.name() != "raylet":
                    process.kill()
        except psutil.Error:  # gone meanwhile
            continue


def _need_no_home() -> None:
    """Give a local Ray its token by the environment where it could not keep one below the home folder."""
    if (fault := home_fault()) is not None:
        logger.debug("Ray's token of this command is kept nowhere: %s", fault)
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # as Ray draws it
