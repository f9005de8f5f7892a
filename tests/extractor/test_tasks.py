"""Tasks in threads of this process: what Ray would do, on a machine that has few cores and no cluster."""

import os
import threading
import time

import pytest

from common import processes
from common.errors import LakeError, SourceError, StorageError
from extractor.tasks import Workers, insist_on_going


def refuse():
    raise AssertionError("Ray was wanted")


@pytest.fixture(autouse=True)
def _few_cores(monkeypatch):
    monkeypatch.setattr(processes, "FEW_CORES", os.cpu_count())


def square(number):
    return number * number


def meet(number, barrier):
    barrier.wait(timeout=20)  # passed only when two are there at the same time
    return number


def fail(number):
    if number == 1:
        raise SourceError("Row 7 is not there.")
    if number == 2:
        raise FileNotFoundError(2, "No such file", "pairs.jsonl")
    if number == 3:
        raise LakeError("The lake is of another version.")
    return number


def go_on(number, begun, ended):
    if number == 0:
        return number
    begun.set()
    try:
        while True:
            time.sleep(0.01)
            insist_on_going()
    finally:
        ended.set()


def test_every_item_is_answered_and_ray_is_not_started():
    with Workers(refuse) as workers:
        found = dict(workers.run(list(range(20)), square, threads=True))
    assert found == {number: number**2 for number in range(20)}


@pytest.mark.skipif(processes.usable_cores() < 2, reason="one core runs one task at a time")
def test_they_work_side_by_side():
    with Workers(refuse) as workers:
        assert sorted(answer for _, answer in workers.run([0, 1], meet, threading.Barrier(2), threads=True)) == [0, 1]


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (1, SourceError, "Row 7 is not there"),
        (2, StorageError, "pairs.jsonl"),
        (3, LakeError, "The lake is of another version"),
    ],
)
def test_an_error_is_the_users_sentence(number, kind, words):
    with Workers(refuse) as workers, pytest.raises(kind, match=rf"{words}.*run the same command again"):
        list(workers.run([0, number], fail, threads=True))


def test_whoever_leaves_ends_the_tasks_that_are_at_work():
    begun, ended = threading.Event(), threading.Event()
    with Workers(refuse) as workers:
        answers = workers.run([0, 1], go_on, begun, ended, threads=True)
        assert next(answers) == (0, 0)
        assert begun.wait(20)
        answers.close()
    assert ended.is_set()
    insist_on_going()  # of this thread nobody wants to be rid


def test_a_large_machine_takes_ray(monkeypatch):
    monkeypatch.setattr(processes, "FEW_CORES", 0)
    with Workers(refuse) as workers, pytest.raises(AssertionError, match="Ray was wanted"):
        list(workers.run([0, 1], square, threads=True))


def test_a_cluster_is_joined(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with Workers(refuse) as workers, pytest.raises(AssertionError, match="Ray was wanted"):
        list(workers.run([0, 1], square, threads=True))
