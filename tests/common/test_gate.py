"""Who may pass a gate, in whatever order it hears of it."""

import asyncio

from common.gate import Gate


def answers(calls, places) -> list:
    """What holders of places are told after some calls; None for those that still wait."""

    async def ask():
        gate = Gate()
        asked = [asyncio.ensure_future(gate.passes(place)) for place in places]
        for name, limit in calls:
            await getattr(gate, name)(limit)
        await asyncio.wait(asked, timeout=0.05)
        found = [future.result() if future.done() else None for future in asked]
        for future in asked:
            future.cancel()
        return found

    return asyncio.run(ask())


def test_those_below_the_limit_pass_and_the_others_wait():
    assert answers([], [0]) == [None]
    assert answers([("allow", 2)], [0, 1, 2]) == [True, True, None]
    assert answers([("allow", 3), ("allow", 1)], [2]) == [True]


def test_a_closed_gate_sends_home_only_those_who_were_never_let_in():
    assert answers([("allow", 1), ("close", 2)], [0, 1, 2]) == [True, True, False]


def test_the_order_in_which_a_gate_hears_does_not_matter():
    assert answers([("close", 2), ("allow", 1)], [0, 1, 2]) == [True, True, False]
