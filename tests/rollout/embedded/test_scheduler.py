"""Admission, finishing and slots, without a model."""

from __future__ import annotations

from dataclasses import replace

from miles_lite.rollout.embedded.scheduler import Scheduler
from miles_lite.rollout.embedded.serve import Load
from miles_lite.types import Finish, Request
from tests.rollout.embedded.helpers import GREEDY


def request(uid: int, prompt_len: int, max_new_tokens: int = 3, first: int = 0) -> Request:
    sampling = replace(GREEDY, max_new_tokens=max_new_tokens, stop_token_ids=(9,))
    return Request(uid, (first + uid, *[1] * (prompt_len - 1)), sampling)


def test_prompts_are_read_within_slots_and_budget():
    scheduler = Scheduler(max_running=3, prefill_tokens=20)
    scheduler.add([request(0, 8), request(1, 8), request(2, 8), request(3, 50), request(4, 2)])
    plan = scheduler.plan()
    assert [s.request.uid for s in plan.sequences] == [0, 1]  # a third would be 24 with padding
    scheduler.advance(plan, [1, 1], [0.0, 0.0])
    plan = scheduler.plan()
    assert [s.request.uid for s in plan.sequences] == [2] and plan.first_slot == 2
    scheduler.advance(plan, [1], [0.0])
    plan = scheduler.plan()
    assert not plan.prompts and plan.num_tokens == 3  # no slot is free: decode
    finished, _ = scheduler.advance(plan, [9, 9, 9], [0.0] * 3)
    assert len(finished) == 3
    plan = scheduler.plan()
    assert [s.request.uid for s in plan.sequences] == [3]  # alone, though beyond the budget


def test_samples_of_a_group_read_their_prompt_once():
    scheduler = Scheduler(max_running=8, prefill_tokens=30)
    prompts = [(1, 2, 3), (4, 5), (1, 2, 3), (4, 5), (1, 2, 3)]
    scheduler.add([Request(uid, prompt, GREEDY) for uid, prompt in enumerate(prompts)])
    plan = scheduler.plan()
    assert plan.prompts == ((1, 2, 3), (4, 5)) and plan.source == [0, 1, 0, 1, 0]
    assert plan.num_tokens == 5


def test_the_last_sequence_moves_into_the_slot_of_one_that_ended():
    scheduler = Scheduler(max_running=8, prefill_tokens=100)
    scheduler.add([request(uid, 2) for uid in range(5)])
    finished, moves = scheduler.advance(scheduler.plan(), [1, 9, 1, 9, 1], [0.0] * 5)
    assert [s.request.uid for s in finished] == [1, 3]
    assert moves == [(4, 1)]
    assert [s.request.uid for s in scheduler.running] == [0, 4, 2]
    assert scheduler.plan().num_tokens == 3


def test_finishes():
    scheduler = Scheduler(max_running=2, prefill_tokens=100)
    scheduler.add([request(0, 2, max_new_tokens=1), request(1, 2, max_new_tokens=1)])
    finished, _ = scheduler.advance(scheduler.plan(), [9, 1], [-0.5, -0.25])
    assert [s.finish for s in finished] == [Finish.stop, Finish.length]
    assert finished[0].tokens == [9] and finished[0].logprobs == [-0.5]
    assert scheduler.idle and scheduler.plan() is None
    scheduler.add([request(uid, 2) for uid in range(3)])
    scheduler.advance(scheduler.plan(), [1, 1], [0.0, 0.0])
    given_up = scheduler.abort()
    assert [(s.request.uid, len(s.tokens), s.finish) for s in given_up] == [
        (0, 1, Finish.abort),
        (1, 1, Finish.abort),
        (2, 0, Finish.abort),
    ]
    assert scheduler.idle


def test_cancelled_requests_leave_no_holes():
    scheduler = Scheduler(max_running=4, prefill_tokens=100)
    scheduler.add([request(uid, 4) for uid in range(6)])
    plan = scheduler.plan()
    scheduler.advance(plan, [1] * 4, [0.0] * 4)
    given_up, moves = scheduler.cancel({0, 2, 5, 77})
    assert [(s.request.uid, s.finish, len(s.tokens)) for s in given_up] == [
        (0, Finish.abort, 1),
        (2, Finish.abort, 1),
        (5, Finish.abort, 0),
    ]
    assert moves == [(3, 0)]
    assert [s.request.uid for s in scheduler.running] == [3, 1]
    assert [s.request.uid for s in scheduler.waiting] == [4]


def test_a_group_reads_a_prompt_for_all_its_samples() -> None:
    load = Load({}, {}, [0, 0])
    asked = [Request(uid, (uid // 8,), GREEDY) for uid in range(32)]
    assert load.assign(asked) == [0] * 8 + [1] * 8 + [0] * 8 + [1] * 8
    assert load.total == [16 * (1 + GREEDY.max_new_tokens)] * 2
    for one in asked:
        load.release(one.uid)
    assert load.total == [0, 0] and not load.group_of and not load.cost_of
