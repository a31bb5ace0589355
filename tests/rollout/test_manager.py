"""The rollout manager: same samples on any number of engines; nothing stale or late is used."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from miles_lite.config import compose
from miles_lite.data.prompts import load_prompts
from miles_lite.data.tokenizer import ChatTokenizer
from miles_lite.protocols import Phase
from miles_lite.rollout.manager import RolloutError, RolloutManager, derive_seed
from miles_lite.rollout.rewards import RewardWorkers
from miles_lite.types import Completion, Finish, Prompt, Request, Sampling

CFG = compose(["experiment=tiny"])
SAMPLING = Sampling(7, max_new_tokens=8, temperature=1.0, top_p=1.0, top_k=0, stop_token_ids=(3,))


class SeededEngine:
    """Answers with tokens that are a function of the request's seed alone; faults on demand."""

    def __init__(self, name: str, *, version: int = 5, finish: Finish = Finish.stop) -> None:
        self.name, self.version, self.finish = name, version, finish
        self.stuck = False
        self.num_served = 0

    async def generate(self, request: Request) -> Completion:
        self.num_served += 1
        if self.stuck:
            await asyncio.sleep(3600)
        await asyncio.sleep(0.001 * (request.sampling.seed % 5))
        tokens = tuple(4 + request.sampling.seed // 7**i % 7 for i in range(4))
        return Completion(tokens, (-1.0,) * 4, self.version, self.finish)

    async def abort(self) -> None: ...
    def enter(self, phase: Phase) -> None: ...
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
    return load_prompts(
        CFG.data.train + "@[:6]",
        tokenizer,
        prompt_key="prompt",
        label_key="label",
        template_kwargs={},
        max_prompt_len=64,
    )


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RewardWorkers]:
    file: Path = tmp_path_factory.mktemp("reward") / "length.py"
    file.write_text("def length(response, label):\n    return float(len(response))\n")
    with RewardWorkers(file, "length", 1) as workers:
        yield workers


def manager(
    engines: list[SeededEngine], rewards: RewardWorkers, tokenizer: ChatTokenizer, timeout_s: float
) -> RolloutManager:
    made = RolloutManager(engines, rewards, tokenizer, SAMPLING, 4, timeout_s)
    made.version = 5
    return made


def test_samples_do_not_depend_on_the_number_of_engines(
    rewards: RewardWorkers, tokenizer: ChatTokenizer, prompts: list[Prompt]
) -> None:
    one = manager([SeededEngine("a")], rewards, tokenizer, 30).generate(prompts)
    engines = [SeededEngine(name) for name in "abc"]
    three = manager(engines, rewards, tokenizer, 30).generate(prompts)
    assert one == three
    assert [engine.num_served for engine in engines] == [8, 8, 8]
    assert [len(group.samples) for group in one] == [4] * 6
    for prompt, group in zip(prompts, one, strict=True):
        assert {sample.prompt for sample in group.samples} == {prompt}
        assert len({sample.completion.tokens for sample in group.samples}) > 1
        for sample in group.samples:
            assert sample.text == tokenizer.decode(sample.completion.tokens)
            assert sample.verdict.reward == len(sample.text)


def test_a_stale_version_is_refused(
    rewards: RewardWorkers, tokenizer: ChatTokenizer, prompts: list[Prompt]
) -> None:
    engines = [SeededEngine("fresh"), SeededEngine("stale", version=4)]
    with pytest.raises(RolloutError, match=r"stale .* version 4; the policy is at version 5"):
        manager(engines, rewards, tokenizer, 30).generate(prompts)


def test_an_abort_nobody_asked_for_is_refused(
    rewards: RewardWorkers, tokenizer: ChatTokenizer, prompts: list[Prompt]
) -> None:
    with pytest.raises(RolloutError, match="aborted prompt"):
        manager([SeededEngine("a", finish=Finish.abort)], rewards, tokenizer, 30).generate(prompts)


def test_the_deadline_names_the_engine_that_is_late(
    rewards: RewardWorkers, tokenizer: ChatTokenizer, prompts: list[Prompt]
) -> None:
    slow = SeededEngine("slow")
    slow.stuck = True
    with pytest.raises(RolloutError, match=r"12 of 24 samples are missing .*: 12 on slow"):
        manager([SeededEngine("quick"), slow], rewards, tokenizer, 1.5).generate(prompts)


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
