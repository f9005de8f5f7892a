"""Which teachers are held by the same processes."""

from extractor.placement import TeacherPlacement
from extractor.pools import group_teachers

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
