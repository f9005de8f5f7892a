"""A run's name: what it stands for, who may go on under it, and how it is made longer."""

from __future__ import annotations

import uuid
from typing import Any

from common.config import differing_keys
from common.errors import FingerprintError, TrainError
from common.lake import now
from common.logs import logger
from common.storage import Storage
from trainer.checkpoint import newest_checkpoint
from trainer.optim import learning_rate
from trainer.record import RESULT, RUN, Job

EPOCHS = "config.epochs"


def check_run(storage: Storage, run: str, job: Job, extend: bool = False) -> bool:
    """Insist that a run's name stands for nothing else; writes nothing.

    Args:
        storage: The run's folder.
        run: Its name.
        job: What the run is to be.
        extend: Whether it may have more epochs than it was begun with.

    Returns:
        Whether there is something to record: the run is new, or becomes a longer one.

    Raises:
        FingerprintError: The name belongs to a run of another configuration or on other data.
        TrainError: There is no run to extend.
    """
    try:
        recorded = storage.read_json(RUN)
    except FileNotFoundError:
        if extend:
            raise TrainError(
                f"There is no run {run} to extend in {storage.uri}. Correct --run, or leave --extend out to begin it."
            ) from None
        return True
    differing = differing_keys(recorded["fingerprint"], job.identity)
    is_longer = set(differing) == {EPOCHS} and differing[EPOCHS][0] < differing[EPOCHS][1]
    if differing and not (extend and is_longer):
        raise FingerprintError(_refusal(storage, run, differing, is_longer, extend))
    return bool(differing)


def claim_run(storage: Storage, run: str, job: Job, extend: bool = False) -> dict[str, Any]:
    """Record what a run is, or insist that it is what is recorded; see :func:`check_run`.

    With ``extend``, a run of fewer epochs is recorded as the longer one.

    Returns:
        The content of ``run.json``.
    """
    is_news = check_run(storage, run, job, extend)
    if not storage.exists(RUN):
        facts = {"run": run, "id": uuid.uuid4().hex, "asked": job.asked, "created_at": now()}
        begun: dict[str, Any] = {"fingerprint": job.identity, **facts}
        storage.write_json(RUN, begun)
        return begun
    recorded = dict(storage.read_json(RUN))
    if is_news:
        differing = differing_keys(recorded["fingerprint"], job.identity)
        return _extended(storage, run, job, recorded, *differing[EPOCHS])
    return recorded


def _refusal(storage: Storage, run: str, differing: dict[str, tuple[Any, Any]], is_longer: bool, extend: bool) -> str:
    listing = "; ".join(f"{key}: recorded {a!r}, now {b!r}" for key, (a, b) in differing.items())
    advice = "To train on for more epochs give --extend. " if is_longer else ""
    if extend:
        advice = "--extend allows more epochs, and nothing else that differs. "
    return (
        f"Run {run} was begun with other settings, or on other data, than these ({storage.uri}/{RUN}). Differing: "
        f"{listing}. {advice}Choose another --run name, or delete runs/{run} to start it afresh."
    )


def _extended(
    storage: Storage, run: str, job: Job, recorded: dict[str, Any], before: int, now_wanted: int
) -> dict[str, Any]:
    saved = newest_checkpoint(storage)
    step = saved.step if saved else 0
    shorter = job.total_steps // now_wanted * before
    logger.info(
        "%s: run %s is extended from %d to %d epochs after step %d of %d. The learning rate goes on by the schedule of "
        "the new length: %.3g at the next step, where that of the old one is %.3g. So the result is not that of a run "
        "of %d epochs from the start.",
        *(job.stage, run, before, now_wanted, step, shorter),
        *(learning_rate(step, job.total_steps, job.optim), learning_rate(step, shorter, job.optim), now_wanted),
    )
    entry = {"from_epochs": before, "to_epochs": now_wanted, "after_step": step, "at": now()}
    longer = {**recorded, "fingerprint": job.identity, "extended": [*recorded.get("extended", []), entry]}
    # In this order: killed in between, the run is unfinished under its old length, and the old command finishes it.
    storage.remove(RESULT)
    storage.write_json(RUN, longer)
    return longer
