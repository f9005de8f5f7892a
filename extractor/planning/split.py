"""How many GPUs each teacher should get so that the slowest is as fast as can be: pure arithmetic, solved exactly."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from extractor.placement import TeacherPlacement

MAX_TRIES = 20_000
"""Ways of dealing out teachers that are looked at for one number of shared GPUs; beyond a dozen or so teachers the best
of these stands, which starts from "longest first onto the emptiest GPU"."""


@dataclass(frozen=True)
class Split:
    """GPUs dealt out to teachers.

    Attributes:
        whole: Teacher -> GPUs it has to itself.
        groups: Teachers that take turns on one GPU, one tuple for each such GPU.
        seconds: When the last of them is done.
    """

    whole: Mapping[str, int] = field(default_factory=dict)
    groups: tuple[tuple[str, ...], ...] = ()
    seconds: float = 0.0

    @property
    def per_gpu(self) -> int:
        """Places on each shared GPU."""
        return max((len(group) for group in self.groups), default=1)

    def finish(self, work: Mapping[str, float]) -> dict[str, float]:
        """Teacher -> seconds until its GPUs are done."""
        alone = {name: work[name] / gpus for name, gpus in self.whole.items()}
        return {**alone, **{name: sum(work[one] for one in group) for group in self.groups for name in group}}

    def placements(self) -> dict[str, TeacherPlacement]:
        """The actors to start, in this order: whole GPUs first, then the shared ones, one GPU after the other."""
        # Ray puts a fraction on the fullest GPU that has room, so that in this order a machine's GPUs fill as planned.
        found = {name: TeacherPlacement(actors=gpus, gpus=1.0) for name, gpus in self.whole.items()}
        share = TeacherPlacement(actors=1, gpus=1 / self.per_gpu)
        return {**found, **{name: share for group in self.groups for name in group}}


def split_gpus(
    work: Mapping[str, float], gpus: int, most: Mapping[str, int] | None = None, share: bool = False
) -> Split:
    """Deal GPUs out so that the last teacher is done as early as possible.

    With enough GPUs each teacher has whole ones of its own. With fewer than teachers (or with ``share``) the smallest
    teachers also take turns: those that share all hold equal fractions of a GPU, because Ray never lets a fraction
    span two GPUs and fractions of one size always fit together. The GPU with the most to do decides.

    Args:
        work: Teacher -> seconds that all its rows take on one GPU.
        gpus: How many there are, at least one.
        most: Teacher -> number of GPUs beyond which more do not help it (it has only so many shards).
        share: Let small teachers share although there are enough GPUs, where that makes the slowest faster.
    """
    # Sharing loads a GPU with a sum, so it is never the largest teachers that should: exchanging one of them with a
    # smaller teacher that has GPUs of its own makes neither side slower.
    ascending = sorted(work, key=lambda name: (work[name], name))
    must_share = gpus < len(work)
    best: Split | None = None
    for shared in range(len(work) + 1 if must_share or share else 1):
        small, large = ascending[:shared], ascending[shared:]
        for shared_gpus in range(1, min(shared, gpus) + 1) if shared else (0,):
            per_gpu = math.ceil(shared / shared_gpus) if shared else 0
            if gpus - shared_gpus < len(large) or (shared and math.ceil(shared / per_gpu) < shared_gpus):
                continue  # too few for the others, or Ray would fill fewer GPUs than these
            whole = _deal_whole({name: work[name] for name in large}, gpus - shared_gpus, most or {})
            slowest = max((work[name] / count for name, count in whole.items()), default=0.0)
            bound = max(slowest, sum(work[name] for name in small) / shared_gpus if shared else 0.0)
            if best is not None and bound >= best.seconds:
                continue
            sizes = [per_gpu] * (shared_gpus - 1) + [shared - per_gpu * (shared_gpus - 1)] if shared else []
            groups, fullest = _pack({name: work[name] for name in small}, sizes)
            seconds = max(slowest, fullest)
            if best is None or seconds < best.seconds:
                best = Split({name: whole[name] for name in work if name in whole}, groups, seconds)
    assert best is not None, "there is at least one GPU"
    return best


def _deal_whole(work: Mapping[str, float], gpus: int, most: Mapping[str, int]) -> dict[str, int]:
    """One GPU each, then each further one to the teacher that is the slowest at that moment.

    This is optimal: a teacher gets another GPU only while it is the slowest, that is, while it has fewer than any
    better split would have to give it.
    """
    counts = dict.fromkeys(work, 1)
    queue = [(-seconds, name) for name, seconds in work.items()]
    heapq.heapify(queue)
    for _ in range(gpus - len(work) if work else 0):
        name = queue[0][1]
        if counts[name] >= most.get(name, gpus):
            break  # nothing makes the slowest faster; the other GPUs would only stand idle
        counts[name] += 1
        heapq.heapreplace(queue, (-work[name] / counts[name], name))
    return counts


def _pack(work: Mapping[str, float], sizes: Sequence[int]) -> tuple[tuple[tuple[str, ...], ...], float]:
    """Put teachers into groups of given sizes so that the largest sum is smallest.

    Returns:
        The groups, those with most places first, and the largest sum.
    """
    names = sorted(work, key=lambda name: (-work[name], name))
    groups: list[list[str]] = [[] for _ in sizes]
    loads = [0.0] * len(sizes)
    floor = max([sum(work.values()) / max(len(sizes), 1), *work.values()], default=0.0)
    best: tuple[float, list[tuple[str, ...]]] = (math.inf, [])
    tries = 0

    def place(index: int) -> None:
        nonlocal best, tries
        if index == len(names):
            best = (max(loads, default=0.0), [tuple(group) for group in groups])
            return
        name, seen = names[index], set()
        for at in sorted(range(len(sizes)), key=lambda at: loads[at]):
            state = (loads[at], sizes[at] - len(groups[at]))
            if state[1] == 0 or state in seen or loads[at] + work[name] >= best[0]:
                continue
            if best[0] <= floor or (tries >= MAX_TRIES and best[1]):
                return
            seen.add(state)
            tries += 1
            groups[at].append(name)
            loads[at] = state[0] + work[name]
            place(index + 1)
            groups[at].pop()
            loads[at] = state[0]

    place(0)
    return tuple(best[1]), (0.0 if not sizes else best[0])
