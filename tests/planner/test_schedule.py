"""1F1B against its closed form, and against what it must do when passes differ."""

from __future__ import annotations

import pytest

from miles_lite.planner.schedule import order, simulate


def even(num_stages: int, num_micro_batches: int, seconds: float) -> list[list[float]]:
    return [[seconds] * num_micro_batches for _ in range(num_stages)]


@pytest.mark.parametrize(("stages", "passes"), [(1, 5), (2, 2), (4, 32), (4, 3), (8, 8)])
def test_even_passes_have_the_known_bubble(stages: int, passes: int) -> None:
    found = simulate(even(stages, passes, 1.0), even(stages, passes, 2.0), 0.0)
    assert found.seconds == pytest.approx(3 * (passes + stages - 1))
    assert found.bubble == pytest.approx((stages - 1) / (passes + stages - 1))
    assert found.in_flight == tuple(min(stages - s, passes) for s in range(stages))


def test_a_pass_without_gradients_fills_and_drains_once() -> None:
    found = simulate(even(4, 6, 2.0), None, 0.5)
    assert found.seconds == pytest.approx(2 * (6 + 3) + 3 * 0.5)
    assert found.in_flight == (1, 1, 1, 1)


def test_the_slowest_stage_sets_the_pace() -> None:
    forward = [[1.0] * 20, [3.0] * 20, [1.0] * 20]
    found = simulate(forward, forward, 0.0)
    assert found.busy == (40.0, 120.0, 40.0)
    assert 120 < found.seconds < 130


def test_hops_delay_the_first_and_the_last_pass() -> None:
    fast, slow = (simulate(even(3, 1, 1.0), even(3, 1, 1.0), hop) for hop in (0.0, 0.25))
    assert slow.seconds - fast.seconds == pytest.approx(4 * 0.25)


def test_every_pass_is_done_once_and_forward_comes_first() -> None:
    for stage in range(4):
        steps = order(stage, 4, 6)
        assert sorted(steps) == sorted((back, i) for back in (False, True) for i in range(6))
        assert all(steps.index((False, i)) < steps.index((True, i)) for i in range(6))
