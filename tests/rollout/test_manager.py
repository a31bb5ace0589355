"""The rollout manager: same samples on any number of engines; nothing stale or late is used."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miles_lite.algo.routing import RouterSizes
from miles_lite.compose import compose
from miles_lite.config import RewardFunction
from miles_lite.data.tokenizer import ChatTokenizer
from miles_lite.protocols import EngineError, Phase, RolloutResult
from miles_lite.rollout.manager import (
    ABORT_S,
    MAX_RESAMPLES,
    MAX_RESCORED,
    RolloutError,
    RolloutManager,
    RolloutSettings,
    derive_seed,
)
from miles_lite.rollout.rewards import RewardWorkers
from miles_lite.stop import Stopped, StopRequest
from miles_lite.types import Completion, Finish, Prompt, Request, Sample, Sampling, Verdict

CFG = compose(["experiment=tiny"])
Draw = Callable[..., RolloutResult]
SAMPLING = Sampling(7, max_new_tokens=4, temperature=1.0, top_p=1.0, top_k=0, stop_token_ids=(3,))
ROUTERS = RouterSizes(num_layers=2, top_k=3, num_experts=8)


class SeededEngine:
    """Answers with tokens that are a function of the request's seed alone; faults on demand."""

    def __init__(self, name: str, *, version: int = 5, finish: Finish = Finish.length) -> None:
        self.name, self.version, self.finish = name, version, finish
        self.experts: tuple[int, ...] = ()  # of every token in every layer with experts
        self.forgotten = 0  # tokens of the last answers whose routing is missing
        self.stuck = False
        self.num_served = self.num_aborts = 0
        self.prompts: Counter[tuple[int, ...]] = Counter()
        self.stall_s = 60.0

    def restart(self) -> None: ...

    async def generate(self, request: Request) -> Completion:
        self.num_served += 1
        self.prompts[request.tokens] += 1
        if self.stuck:
            await asyncio.sleep(3600)
        await asyncio.sleep(0.001 * (request.sampling.seed % 5))
        tokens = tuple(4 + request.sampling.seed // 7**i % 7 for i in range(4))
        completion = Completion(tokens, (-1.0,) * 4, self.version, self.finish)
        if not self.experts:
            return completion
        num_tokens = len(request.tokens) + 3 - (self.num_served > 3) * self.forgotten
        routing = np.broadcast_to(self.experts, (num_tokens, ROUTERS.num_layers, ROUTERS.top_k))
        return replace(completion, routing=ROUTERS.pack(routing))

    def can_score(self, sampling: Sampling) -> bool:
        return False

    async def abort(self) -> None:
        self.num_aborts += 1

    def enter(self, phase: Phase) -> dict[str, int]:
        return {}

    def held_bytes(self) -> dict[str, int]:
        return {}

    def layout(self) -> Sequence[Any]:
        return []

    def receivers(self) -> Sequence[Any]:
        return []


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer.load(CFG.model.path)


@pytest.fixture(scope="module")
def prompts(tokenizer: ChatTokenizer) -> list[Prompt]:
    return [
        Prompt(f"sums:{i}", tokenizer.encode(text), text, str(2 * i), "", {})
        for i, text in enumerate(f"{i}+{i}=" for i in range(6))
    ]


REWARDS = """
import time

def asleep(response, label):
    time.sleep(60)
    return 1.0

def length(response, label):
    return float(len(response))

def moody(response, label, *, share):
    "No verdict on a share of all answers, which ones only the answer decides."
    if sum(map(ord, response)) % 100 < 100 * share:
        raise RuntimeError("no idea")
    return 1.0

def rank(responses, label):
    order = sorted(range(len(responses)), key=lambda i: responses[i])
    return [order.index(i) for i in range(len(responses))]
"""


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RewardWorkers]:
    file: Path = tmp_path_factory.mktemp("reward") / "length.py"
    file.write_text(REWARDS)
    functions = {
        "": RewardFunction(file=file, function="length"),
        "often": RewardFunction(file=file, function="moody", options={"share": 0.5}),
        "never": RewardFunction(file=file, function="moody", options={"share": 1.0}),
        "rank": RewardFunction(file=file, function="rank"),
        "asleep": RewardFunction(file=file, function="asleep"),
    }
    with RewardWorkers(functions, 1) as workers:
        yield workers


class Stream:
    """Deals a list of prompts once."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts, self.position = list(prompts), 0

    def take(self, n: int) -> list[Prompt]:
        self.position += n
        assert self.position <= len(self.prompts), "all are dealt"
        return self.prompts[self.position - n : self.position]

    def put_back(self, n: int) -> None:
        self.position -= n


SETTINGS = RolloutSettings(
    routers=ROUTERS,
    vocab_size=4096,
    sampling=SAMPLING,
    num_prompts=6,
    samples_per_prompt=4,
    dynamic_sampling=False,
    over_sampling=0,
    invalid="drop",
    timeout_s=30,
)


@pytest.fixture
def draw(rewards: RewardWorkers, tokenizer: ChatTokenizer, prompts: list[Prompt]) -> Draw:
    def one_step(
        engines: Sequence[SeededEngine], reward: str = "", **changes: Any
    ) -> RolloutResult:
        settings = replace(SETTINGS, **changes)
        manager = RolloutManager(engines, rewards, tokenizer, settings)
        manager.version = 5
        return manager.generate(Stream([replace(p, reward=reward) for p in prompts]))

    return one_step


def all_samples(result: RolloutResult) -> list[Sample]:
    return [sample for group in result.groups for sample in group.samples]


def test_samples_do_not_depend_on_the_number_of_engines(
    draw: Draw, tokenizer: ChatTokenizer, prompts: list[Prompt]
) -> None:
    one = draw([SeededEngine("a")])
    engines = [SeededEngine(name) for name in "abc"]
    three = draw(engines)
    assert one.groups == three.groups
    assert [engine.num_served for engine in engines] == [8, 8, 8]
    assert [len(group.samples) for group in one.groups] == [4] * 6
    for prompt, group in zip(prompts, one.groups, strict=True):
        assert all(sample.prompt == prompt for sample in group.samples)
        assert len({sample.completion.tokens for sample in group.samples}) > 1
        for sample in group.samples:
            assert sample.text == tokenizer.decode(sample.completion.tokens)
            assert sample.verdict.reward == len(sample.text)


def test_an_engine_reads_a_prompt_for_all_its_samples(draw: Draw, prompts: list[Prompt]) -> None:
    """Unless the others would have little to do."""
    engines = [SeededEngine(name) for name in "ab"]
    draw(engines)
    assert [sorted(engine.prompts.values()) for engine in engines] == [[4, 4, 4]] * 2
    engines = [SeededEngine(name) for name in "ab"]
    draw(engines, num_prompts=1, samples_per_prompt=32)
    assert [sum(engine.prompts.values()) for engine in engines] == [16, 16]


def test_a_prompt_dealt_twice_in_a_step_draws_other_samples(
    rewards: RewardWorkers, tokenizer: ChatTokenizer, prompts: list[Prompt]
) -> None:
    manager = RolloutManager([SeededEngine("a")], rewards, tokenizer, SETTINGS)
    manager.version = 5
    first, *_, again = manager.generate(Stream([*prompts[:5], prompts[0]])).groups
    assert first.samples[0].prompt == again.samples[0].prompt
    assert {s.completion.tokens for s in first.samples} != {
        s.completion.tokens for s in again.samples
    }


def test_answers_without_a_verdict_are_drawn_again(draw: Draw) -> None:
    plain = draw([SeededEngine("a")], "often")
    again = draw([SeededEngine("a")], "often", invalid="resample")
    missing = [not sample.verdict.valid for sample in all_samples(plain)]
    assert 4 < sum(missing) < 20
    for before, after in zip(all_samples(plain), all_samples(again), strict=True):
        assert before == after or (not before.verdict.valid and before.text != after.text)
    assert sum(not sample.verdict.valid for sample in all_samples(again)) < sum(missing)
    assert again.metrics["reward/resampled"] >= sum(missing)


def test_answers_that_count_as_wrong_make_a_group_worth_keeping(draw: Draw) -> None:
    """All verdicts that "often" reaches are equal: only the missing ones make a difference."""
    kept = draw([SeededEngine("a")], "often", dynamic_sampling=True, invalid="wrong", num_prompts=2)
    for group in kept.groups:
        assert {s.verdict.valid for s in group.samples} == {True, False}


def test_drawing_again_ends(draw: Draw) -> None:
    engine = SeededEngine("a")
    result = draw([engine], "never", invalid="resample")
    assert engine.num_served == 24 * (1 + MAX_RESAMPLES)
    assert {sample.verdict.reason for sample in all_samples(result)} == {"error: RuntimeError"}


def test_a_group_reward_sees_the_whole_group(draw: Draw) -> None:
    for group in draw([SeededEngine("a"), SeededEngine("b")], "rank").groups:
        texts = [sample.text for sample in group.samples]
        for sample in group.samples:
            assert sample.verdict.valid
            assert texts[texts.index(sample.text)] == sorted(texts)[int(sample.verdict.reward)]


def test_a_stale_version_is_refused(draw: Draw) -> None:
    with pytest.raises(EngineError, match=r"stale: .* version 4; the policy is at version 5"):
        draw([SeededEngine("fresh"), SeededEngine("stale", version=4)])


def test_an_abort_nobody_asked_for_is_refused(draw: Draw) -> None:
    with pytest.raises(EngineError, match=r"a: its answer to request \d+ was abo"):
        draw([SeededEngine("a", finish=Finish.abort)])


def test_a_routing_that_cannot_be_replayed_is_refused_at_the_first_answer(draw: Draw) -> None:
    wanted = replace(SAMPLING, wants_routing=True)
    good, silent, wrong, forgetful = (SeededEngine(name) for name in "abcd")
    good.experts, wrong.experts, forgetful.experts = (0, 5, 3), (2, 0, 0), (0, 5, 3)
    forgetful.forgotten = 2
    assert all(s.completion.routing.known for s in all_samples(draw([good], sampling=wanted)))
    with pytest.raises(EngineError, match=r"b: its answer .*: there is no routing; expected"):
        draw([good, silent], sampling=wanted)
    with pytest.raises(EngineError, match=r"c: .*: token 0 has experts \[2, 0, 0\] in lay"):
        draw([good, wrong], sampling=wanted)
    with pytest.raises(EngineError, match=r"d: .* shape \[\d+, 2, 3\]; expected \[\d+, 2"):
        draw([good, forgetful], sampling=wanted)
    draw([silent, wrong, forgetful])  # nobody asks


def test_the_deadline_names_the_engine_that_is_late(draw: Draw) -> None:
    slow = SeededEngine("slow")
    slow.stuck = True
    with pytest.raises(RolloutError, match=r"12 of 24 samples are missing .* for slow \(12\)$"):
        draw([SeededEngine("quick"), slow], timeout_s=1.5)
    assert slow.num_aborts == 1  # its requests are not left behind


class Struck(SeededEngine):
    """A signal comes while it makes an answer, in a task for which nobody waits."""

    async def generate(self, request: Request) -> Completion:
        os.kill(os.getpid(), signal.SIGTERM)
        return await super().generate(request)


def test_a_signal_in_the_event_loop_ends_the_call(draw: Draw) -> None:
    engine = Struck("a")
    with StopRequest(), pytest.raises(Stopped, match="SIGTERM, at once"):
        draw([engine], timeout_s=5)
    assert engine.num_served == 0 and engine.num_aborts == 1


class DeafEngine(SeededEngine):
    async def generate(self, request: Request) -> Completion:
        if self.stuck:
            return await super().generate(request)
        raise EngineError(f"{self.name} does not answer")

    async def abort(self) -> None:
        await asyncio.sleep(3600)


def test_engines_that_hang_are_not_waited_for_a_second_time(draw: Draw) -> None:
    """The first loss ends the command: neither its abort is waited for nor that of another."""
    lost, silent = DeafEngine("lost"), DeafEngine("silent")
    silent.stuck = True
    begin = time.monotonic()
    with pytest.raises(EngineError, match="lost does not answer"):
        draw([lost, silent])
    assert time.monotonic() - begin < ABORT_S / 3


def told_of(manager: RolloutManager, prompts: Sequence[Prompt]) -> set[str]:
    """All that it said of a rollout that does not come to an end; "" before and after."""
    said: set[str] = set()
    over = threading.Event()

    def listen() -> None:
        while not over.wait(0.02):
            said.add(manager.progress())

    assert manager.progress() == ""
    listener = threading.Thread(target=listen)
    listener.start()
    with pytest.raises(RolloutError):
        manager.generate(Stream(prompts))
    over.set()
    listener.join()
    assert manager.progress() == ""
    return said


def test_progress_tells_what_is_there_and_who_owes_the_rest(
    rewards: RewardWorkers, tokenizer: ChatTokenizer, prompts: list[Prompt]
) -> None:
    slow = SeededEngine("slow")
    slow.stuck = True
    settings = replace(SETTINGS, timeout_s=3)
    manager = RolloutManager([SeededEngine("quick"), slow], rewards, tokenizer, settings)
    manager.version = 5
    said = told_of(manager, prompts)
    told = [text for text in said if text.startswith("3/6 prompts, 12/24 answers, longest ")]
    assert told and told[0].endswith(" tokens, waiting for slow (12)"), said


def test_progress_names_rewards_that_do_not_come(
    rewards: RewardWorkers, tokenizer: ChatTokenizer, prompts: list[Prompt]
) -> None:
    settings = replace(SETTINGS, timeout_s=3)
    manager = RolloutManager([SeededEngine("quick")], rewards, tokenizer, settings)
    manager.version = 5
    last = replace(prompts[5], reward="asleep")
    said = told_of(manager, [*prompts[:5], last])
    assert "5/6 prompts, 20/24 answers, longest 4 tokens, waiting for rewards (4)" in said, said


class ScoringEngine(SeededEngine):
    """Scores the tokens that it is given, and remembers them."""

    asked: tuple[Sampling, ...] = ()

    def can_score(self, sampling: Sampling) -> bool:
        return True

    async def generate(self, request: Request) -> Completion:
        self.scored, self.asked = request.scored, (*self.asked, request.sampling)
        assert request.sampling.max_new_tokens == len(request.scored)
        logprobs = (-2.0,) * len(request.scored)
        return Completion(request.scored, logprobs, self.version, Finish.length)


def test_of_a_long_answer_only_the_beginning_is_scored_again(
    rewards: RewardWorkers, tokenizer: ChatTokenizer, prompts: list[Prompt]
) -> None:
    engine = ScoringEngine("scores")
    manager = RolloutManager([engine], rewards, tokenizer, SETTINGS)
    manager.version = 5
    tokens = tuple(range(MAX_RESCORED + 7))
    long = Completion(tokens, (-1.0,) * len(tokens), 5, Finish.stop)
    again = manager.rescore([Sample(prompts[0], long, "", Verdict(1.0, ""))])
    assert len(again.policy[0].logprobs) == MAX_RESCORED
    assert again.untempered == () == again.truncated  # nothing else than the policy here
    assert engine.scored == tokens[:MAX_RESCORED]


def test_the_policy_is_held_against_what_sampling_makes_of_it(
    rewards: RewardWorkers, tokenizer: ChatTokenizer, prompts: list[Prompt]
) -> None:
    engine = ScoringEngine("scores")
    sampling = replace(SETTINGS.sampling, temperature=0.7, top_p=0.9)
    manager = RolloutManager([engine], rewards, tokenizer, replace(SETTINGS, sampling=sampling))
    manager.version = 5
    answer = Completion((1, 2), (-1.0, -1.0), 5, Finish.stop)
    again = manager.rescore([Sample(prompts[0], answer, "", Verdict(1.0, ""))])
    assert [len(kind) for kind in (again.policy, again.untempered, again.truncated)] == [1, 1, 1]
    asked = [(s.temperature, s.top_p, s.truncated) for s in engine.asked]
    assert sorted(asked) == [(0.7, 0.9, False), (0.7, 0.9, True), (1.0, 0.9, False)]


def test_a_result_is_never_spelt_out(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python does, unasked, with what the main task of an event loop returns."""

    spelt: list[Completion] = []
    monkeypatch.setattr(Completion, "__repr__", lambda self: spelt.append(self) or "")
    assert all_samples(draw([SeededEngine("only")])) and not spelt


def test_seeds_differ_by_every_part() -> None:
    seeds = {
        derive_seed(seed, purpose, uid, index)
        for seed in (0, 1)
        for purpose in ("v0", "v1", "eval/x")
        for uid in range(20)
        for index in range(8)
    }
    assert len(seeds) == 2 * 3 * 20 * 8
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "v0", 1, 2) == derive_seed(0, "v0", 1, 2)
