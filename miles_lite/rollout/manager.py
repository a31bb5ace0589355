"""Many engines, one policy: fans requests out, grades answers as they arrive, hands back groups."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from miles_lite.data.tokenizer import ChatTokenizer
from miles_lite.protocols import Engine, Metrics, Phase
from miles_lite.rollout.rewards import RewardWorkers
from miles_lite.types import Completion, Finish, Group, Prompt, Request, Sample, Sampling


class RolloutError(RuntimeError):
    """Samples are missing, late, or not of the policy's version."""


class RolloutManager:
    """Implements protocols.Rollout.

    sampling: how training samples are drawn; its seed is the run's, from which each sample's own
    seed follows, so that a sample does not depend on which engine draws it beside which others.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        rewards: RewardWorkers,
        tokenizer: ChatTokenizer,
        sampling: Sampling,
        samples_per_prompt: int,
        timeout_s: float,
    ) -> None:
        self.engines = engines
        self.version = -1
        self.num_finished = 0  # samples of the running generate call: for the console
        self._rewards = rewards
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._samples_per_prompt = samples_per_prompt
        self._timeout_s = timeout_s
        self._next_uid = 0

    def generate(self, prompts: Sequence[Prompt]) -> list[Group]:
        return self.sample(prompts, self._sampling, self._samples_per_prompt, f"v{self.version}")

    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, num_samples: int, purpose: str
    ) -> list[Group]:
        """`num_samples` scored completions of each prompt.

        purpose: mixed into the seeds, so that two uses of one prompt draw different samples.
        Raises RolloutError after the deadline, naming the engines that owe samples.
        """
        return asyncio.run(self._sample(prompts, sampling, num_samples, purpose))

    async def _sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, num_samples: int, purpose: str
    ) -> list[Group]:
        self.num_finished = 0
        unfinished: Counter[str] = Counter()  # by engine
        tasks = []
        for prompt in prompts:
            for index in range(num_samples):
                seed = derive_seed(sampling.seed, purpose, prompt.uid, index)
                # least load first; all are assigned before any finishes, so always the same way
                engine = min(self.engines, key=lambda e: unfinished[e.name])
                unfinished[engine.name] += 1
                one = self._one(engine, prompt, replace(sampling, seed=seed), unfinished)
                tasks.append(asyncio.ensure_future(one))
        try:
            samples = await asyncio.wait_for(asyncio.gather(*tasks), self._timeout_s)
        except TimeoutError:
            missing = ", ".join(f"{n} on {name}" for name, n in unfinished.items() if n)
            raise RolloutError(
                f"generate: {len(tasks) - self.num_finished} of {len(tasks)} samples are missing "
                f"after {self._timeout_s:g} s (rollout.timeout_s): {missing}"
            ) from None
        finally:
            for task in tasks:
                task.cancel()
        return [
            Group(tuple(samples[start : start + num_samples]))
            for start in range(0, len(samples), num_samples)
        ]

    async def _one(
        self, engine: Engine, prompt: Prompt, sampling: Sampling, unfinished: Counter[str]
    ) -> Sample:
        self._next_uid += 1
        completion = await engine.generate(Request(self._next_uid, prompt.tokens, sampling))
        self._check(engine, prompt, completion)
        text = self._tokenizer.decode(completion.tokens)
        verdict = await self._rewards.grade(text, prompt.label)
        unfinished[engine.name] -= 1
        self.num_finished += 1
        return Sample(prompt, completion, text, verdict)

    def _check(self, engine: Engine, prompt: Prompt, completion: Completion) -> None:
        """A sample of stale weights or of none would be trained on as if it were the policy's."""
        if completion.version != self.version:
            raise RolloutError(
                f"{engine.name} answered prompt {prompt.uid} with weights of version "
                f"{completion.version}; the policy is at version {self.version}"
            )
        if completion.finish is Finish.abort:
            raise RolloutError(f"{engine.name} aborted prompt {prompt.uid}, which nobody asked for")

    # ------------------------------------------------------------------ memory

    def enter(self, phase: Phase) -> None:
        for engine in self.engines:
            engine.enter(phase)

    def held_bytes(self) -> Mapping[str, int]:
        total: Counter[str] = Counter()
        for engine in self.engines:
            total.update(engine.held_bytes())
        return total

    def close(self) -> None:
        self._rewards.close()


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed, the same for the same parts on every machine."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 1


def throughput(groups: Sequence[Group], begin: float) -> Metrics:
    """perf/* of a rollout that began at time.perf_counter() = begin."""
    seconds = time.perf_counter() - begin
    lengths = [len(sample.completion.tokens) for group in groups for sample in group.samples]
    return {
        "perf/rollout_time": seconds,
        "perf/rollout_tokens_per_s": sum(lengths) / seconds,
        "perf/longest_sample_tokens_per_sec": max(lengths) / seconds,
    }
