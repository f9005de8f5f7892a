"""Run an mmkd command as a Ray job: the same code, the cluster's credentials, the job's logs and exit status here."""

from __future__ import annotations

import asyncio
import os
import shlex
import time
from typing import TYPE_CHECKING, Any

from common.errors import ClusterError
from common.logs import logger

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
AGENT_PATIENCE_SECONDS = 60
"""A head that has just started answers before the agent that runs jobs is up."""


def submit_job(command: list[str], address: str | None, working_dir: str, wait: bool) -> int:
    """Submit, follow, and report.

    The job gets the working directory's code (what git ignores stays behind) and no environment variable of this
    machine: storage credentials and hub tokens are the cluster's own.

    Returns:
        The exit code for this process: 0 when the job succeeded or was only submitted, else 1.

    Raises:
        ClusterError: No job server answers at the address.
    """
    import ray.exceptions
    from ray.job_submission import JobStatus, JobSubmissionClient

    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    try:
        client = JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterError(
            f"No Ray job server answers at {address} ({type(error).__name__}). Start one with `ray start --head`, "
            "or give the cluster's address with --address http://HEAD:8265."
        ) from error
    entrypoint = "python -m cluster.cli " + shlex.join(command)
    runtime_env = {"working_dir": working_dir} if working_dir else {}
    job = _submit(client, entrypoint, runtime_env, address)
    logger.info("submitted %s to %s: %s", job, address, entrypoint)
    if not wait:
        logger.info("follow it with: ray job logs --address %s --follow %s", address, job)
        return 0

    async def follow() -> None:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)

    asyncio.run(follow())
    status = client.get_job_status(job)
    while not status.is_terminal():  # the log can end a moment before the status is written
        time.sleep(0.5)
        status = client.get_job_status(job)
    info = client.get_job_info(job)
    logger.info("job %s: %s (exit code %s)", job, status.value, info.driver_exit_code)
    return 0 if status == JobStatus.SUCCEEDED else 1


def _submit(client: JobSubmissionClient, entrypoint: str, runtime_env: dict[str, Any], address: str) -> str:
    deadline = time.monotonic() + AGENT_PATIENCE_SECONDS
    while True:
        try:
            return client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env)
        except (RuntimeError, ValueError) as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise ClusterError(
                    f"The Ray job server at {address} did not take the job: {' '.join(str(error).split())[:500]}"
                ) from error
            logger.info("the cluster is still starting; trying again")
            time.sleep(2)
