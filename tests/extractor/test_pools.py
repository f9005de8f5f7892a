"""Which teachers are held by the same processes, and which of them is at work."""

import time

from extractor.placement import TeacherPlacement
from extractor.pools import WorkQueue, group_teachers

CPU = TeacherPlacement(actors=1, gpus=0.0)


def test_teachers_share_only_when_asked_to():
    assert group_teachers({"a": CPU, "b": CPU}, share=False) == [["a"], ["b"]]


def test_those_share_that_have_no_gpu_and_are_placed_alike():
    placements = {
        "a": CPU,
        "gpu": TeacherPlacement(actors=1, gpus=0.5),
        "b": CPU,
        "twice": TeacherPlacement(actors=2, gpus=0.0),
        "elsewhere": TeacherPlacement(actors=1, gpus=0.0, labels={"pool": "big"}),
        "gpu2": TeacherPlacement(actors=1, gpus=0.5),
    }
    assert group_teachers(placements, share=True) == [["a", "b"], ["gpu"], ["twice"], ["elsewhere"], ["gpu2"]]


def test_of_a_shared_process_the_oldest_shard_is_at_work():
    queue = WorkQueue()
    assert queue.at_work() is None
    queue.begins("a")
    queue.begins("b")
    time.sleep(0.05)
    name, seconds = queue.at_work()
    assert name == "a"
    assert seconds >= 0.05
    queue.ends("a")
    name, less = queue.at_work()
    assert name == "b"
    assert less < seconds
    queue.ends("b")
    queue.ends("b")  # told twice
    assert queue.at_work() is None
