"""Extraction, told on one screen: what is missing, who computes it, each shard to all teachers at once, the account."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from common.lake import open_lake, run_name
from common.lease import active_runs, hold_all
from common.logs import logger
from common.stopping import StopSignals
from extractor.account.report import close_killed
from extractor.config import ExtractConfig
from extractor.events import ExtractReport
from extractor.partitions import (
    check_partitions,
    describe_inputs,
    find_teachers,
    identity_of,
    plan_todo,
)
from extractor.teachers import Teacher
from extractor.terms import check_terms


def extract(
    lake_uri: str,
    config: ExtractConfig,
    kind: type = Teacher,
    session: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> ExtractReport:
    """Embed all pairs of a lake with the named teachers, computing only what is missing.

    What is missing is found out first: a mistake, or that there is nothing to do, costs no start of Ray.

    Args:
        lake_uri: The lake.
        config: Which teachers, and with what.
        kind: Class of the teachers' actors.
        session: Context in which Ray is initialised, entered when there is work; by default it must be already.

    Raises:
        LakeError: No lake, or a partition there was produced by something else.
        LeaseError: Another run is at work on one of the teachers.
        ModelError: A teacher is unknown or does not load, and nothing is done; or it cannot go on, and what the others
            could do is done.
        ClusterError: The cluster has less than what is asked for.
        StoppedError: SIGTERM or SIGINT came.
    """
    lake = open_lake(lake_uri)
    specs = find_teachers(config)
    accepted = check_terms(lake, specs, config.accept_terms)
    inputs = describe_inputs(specs, config)
    identities = {name: identity_of(teacher, config) for name, teacher in inputs.items()}
    check_partitions(lake, identities)
    run = run_name("extract")
    names = [f"teacher={name}" for name in inputs]
    with hold_all(lake.storage, names, run, config.lease_seconds) as leases, StopSignals() as stop:
        todo, pairs = plan_todo(lake, identities)
        files = sum(len(names) for names in todo.values())
        report = ExtractReport(skipped=len(pairs.rows) * len(inputs) - files)
        if not todo:
            logger.info("extract: all %d shards of %s are there; nothing to do", len(pairs.rows), ", ".join(inputs))
            return report
        logger.info("extract: %d of %d files to compute (%s)", files, len(pairs.rows) * len(inputs), ", ".join(inputs))
        report.run = run
        close_killed(lake, active_runs(lake.storage).__contains__)
        with session():
            from extractor.engine import Engine  # brings Ray with it, whose settings the session has made

            stop.catch()  # Ray has a handler of its own
            Engine(lake, config, inputs, identities, pairs, leases, stop, kind).work(todo, report, accepted)
    return report
