import itertools
import math
import random

import pytest

from extractor.planning.split import split_gpus


def shares_of(gpus: int, teachers: int) -> list[tuple[int, ...]]:
    """Every way of giving at least one GPU to each teacher."""
    return [
        counts
        for counts in itertools.product(range(1, gpus + 1), repeat=teachers)
        if sum(counts) <= gpus or teachers == 0
    ]


def best_alone(work: list[float], gpus: int) -> float:
    return min(
        (max((w / n for w, n in zip(work, counts, strict=True)), default=0.0) for counts in shares_of(gpus, len(work))),
        default=math.inf,
    )


def best_shared(work: list[float], gpus: int) -> float:
    """The smallest largest sum over all ways to fill GPUs one after the other with equal fractions."""
    per_gpu = math.ceil(len(work) / gpus)
    if math.ceil(len(work) / per_gpu) != gpus:
        return math.inf  # Ray would leave one of them empty
    return min(
        max(sum(order[start : start + per_gpu]) for start in range(0, len(order), per_gpu))
        for order in itertools.permutations(work)
    )


def brute_force(work: list[float], gpus: int) -> float:
    """Any teachers may share any number of the GPUs; the others have whole ones."""
    best = best_alone(work, gpus) if gpus >= len(work) else math.inf
    for size in range(1, len(work) + 1):
        for chosen in itertools.combinations(range(len(work)), size):
            sharing = [work[index] for index in chosen]
            alone = [work[index] for index in range(len(work)) if index not in chosen]
            for shared_gpus in range(1, min(size, gpus) + 1):
                if gpus - shared_gpus >= len(alone):
                    both = best_shared(sharing, shared_gpus), best_alone(alone, gpus - shared_gpus)
                    best = min(best, max(both))
    return best


@pytest.mark.parametrize("seed", range(40))
def test_whole_gpus_are_dealt_out_as_well_as_can_be(seed):
    draw = random.Random(seed)
    work = [draw.uniform(0.1, 10) for _ in range(draw.randint(1, 4))]
    gpus = len(work) + draw.randint(0, 4)
    split = split_gpus({f"t{index}": seconds for index, seconds in enumerate(work)}, gpus)
    assert split.seconds == pytest.approx(best_alone(work, gpus))
    assert sum(split.whole.values()) <= gpus
    assert not split.groups


@pytest.mark.parametrize("seed", range(40))
def test_shared_gpus_are_filled_as_well_as_can_be(seed):
    draw = random.Random(100 + seed)
    work = [draw.uniform(0.1, 10) ** 2 for _ in range(draw.randint(2, 5))]
    gpus = draw.randint(1, len(work) + 1)
    names = {f"t{index}": seconds for index, seconds in enumerate(work)}
    split = split_gpus(names, gpus, share=True)
    assert split.seconds == pytest.approx(brute_force(work, gpus))
    assert split.seconds == pytest.approx(max(split.finish(names).values()))
    if gpus < len(work):
        assert split_gpus(names, gpus) == split


@pytest.mark.parametrize(("teachers", "gpus"), [(9, 4), (13, 5), (30, 7), (21, 7), (9, 1)])
def test_many_teachers_all_find_a_place_and_fractions_never_span_gpus(teachers, gpus):
    draw = random.Random(teachers)
    work = {f"t{index}": draw.uniform(1, 10) for index in range(teachers)}
    split = split_gpus(work, gpus)
    assert sorted([*split.whole, *(name for group in split.groups for name in group)]) == sorted(work)
    assert sum(split.whole.values()) + len(split.groups) <= gpus
    placements = split.placements()
    (fraction,) = {placements[name].gpus for group in split.groups for name in group}
    # All groups but the last are full, as Ray fills GPUs with fractions of one size.
    assert [len(group) for group in split.groups[:-1]] == [round(1 / fraction)] * (len(split.groups) - 1)
    assert len(split.groups[-1]) <= round(1 / fraction)
    # No split can beat an even spread, or finish before the longest teacher that does not have several GPUs.
    assert split.seconds >= sum(work.values()) / gpus - 1e-9
    assert split.seconds <= 4 / 3 * max(sum(work.values()) / gpus, max(work.values())) + 1e-9


def test_whole_gpus_start_first_and_then_the_shared_ones_in_order():
    split = split_gpus({"small": 1, "large": 9, "tiny": 0.5, "middle": 2}, 3)
    assert split.whole == {"large": 2}
    assert split.groups == (("middle", "small", "tiny"),)
    placements = split.placements()
    assert list(placements) == ["large", "middle", "small", "tiny"]
    assert [(placement.actors, placement.gpus) for placement in placements.values()] == [
        (2, 1.0),
        *[(1, pytest.approx(1 / 3))] * 3,
    ]


def test_a_teacher_gets_no_more_gpus_than_it_has_shards():
    split = split_gpus({"a": 10, "b": 1}, 8, most={"a": 3, "b": 5})
    assert split.whole == {"a": 3, "b": 1}
    assert split.seconds == pytest.approx(10 / 3)
