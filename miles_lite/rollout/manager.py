"""Many engines, one policy: fans requests out, grades answers as they arrive, hands back groups."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import Counter
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from miles_lite.algo.routing import RouterSizes, choices
from miles_lite.cluster.actor import ask_each
from miles_lite.cluster.lease import total_bytes
from miles_lite.data.tokenizer import ChatTokenizer
from miles_lite.log import few
from miles_lite.protocols import (
    Engine,
    EngineError,
    Metrics,
    Phase,
    PromptStream,
    Rescored,
    RolloutResult,
    RunError,
)
from miles_lite.rollout.answer import answer_fault
from miles_lite.rollout.dispatch import Dispatch, Revive
from miles_lite.rollout.dynamic import fill
from miles_lite.rollout.rewards import RewardWorkers
from miles_lite.types import Completion, Group, Prompt, Request, Sample, Sampling, Verdict

log = logging.getLogger(__name__)

MAX_RESAMPLES = 3  # of one answer without a verdict
MAX_RESCORED = 1024  # tokens of an answer: their logits are in memory at once, fp32
ABORT_S = 30.0  # for an engine to end its requests

T = TypeVar("T")


class RolloutError(RunError):
    """Samples are missing at the deadline."""


@dataclass(frozen=True, slots=True)
class RolloutSettings:
    sampling: Sampling  # its seed is the run's: each sample's own follows from it
    vocab_size: int  # of the model: what a token may be
    routers: RouterSizes  # what the routing of an answer must look like, where it is wanted
    num_prompts: int  # a step
    samples_per_prompt: int
    dynamic_sampling: bool  # drop groups of equal rewards and draw others
    over_sampling: int  # prompts asked at once for that
    invalid: Literal["wrong", "drop", "resample"]  # config.RewardConfig.invalid
    timeout_s: float  # of a whole generate


@dataclass(slots=True)
class _Draw:
    """One call of generate, sample or rescore."""

    sampling: Sampling
    num_samples: int  # a prompt
    purpose: str  # mixed into the seeds, so that two uses of one prompt draw different samples
    resample: bool
    dispatch: Dispatch
    times_asked: Counter[str] = field(default_factory=Counter)  # by prompt: the 2nd, other seeds
    num_resampled: int = 0
    finished_prompts: int = 0
    wanted: int = 0  # samples begun
    finished: int = 0  # of them graded
    grading: int = 0  # of them being graded
    longest: int = 0  # tokens of an answer so far

    @property
    def owing(self) -> list[str]:
        """Who works on how many of the samples that are not finished."""
        shares = [*self.dispatch.unfinished.items(), ("rewards", self.grading)]
        return [f"{name} ({num})" for name, num in shares if num]

    @contextmanager
    def being_graded(self, num: int) -> Iterator[None]:
        self.grading += num
        try:
            yield
        finally:
            self.grading -= num
        self.finished += num


class RolloutManager:
    """Implements protocols.Rollout.

    A sample's seed follows from the run's seed, the version, its prompt and its place in the
    group: it does not depend on which engine draws it beside which others.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        rewards: RewardWorkers,
        tokenizer: ChatTokenizer,
        settings: RolloutSettings,
    ) -> None:
        self.engines = engines
        self.version = -1
        self.revive: Revive | None = None
        self._draw: _Draw | None = None  # the running call
        self._rewards = rewards
        self._tokenizer = tokenizer
        self._settings = settings
        self._next_uid = 0
        self._routing_seen: set[str] = set()  # engines whose routing was looked at in full

    def generate(self, prompts: PromptStream) -> RolloutResult:
        """See protocols.Rollout. Raises RolloutError after the deadline, naming the engines that
        owe samples; EngineError when one is lost for good; NothingToKeep if dynamic sampling finds
        no group to keep."""
        begin = time.perf_counter()
        settings = self._settings
        draw = self._new_draw(
            settings.sampling,
            settings.samples_per_prompt,
            f"v{self.version}",
            resample=settings.invalid == "resample",
        )
        filled = self._run(
            fill(
                prompts,
                lambda prompt: self._group(prompt, draw),
                wanted=settings.num_prompts,
                at_once=settings.over_sampling,
                filtered=settings.dynamic_sampling,
                invalid_is_wrong=settings.invalid == "wrong",
            ),
            draw,
        )
        metrics = _throughput(filled.kept, time.perf_counter() - begin)
        if settings.dynamic_sampling:
            metrics |= filled.metrics()
        if draw.resample:
            metrics["reward/resampled"] = float(draw.num_resampled)
        return RolloutResult(filled.kept, metrics)

    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, num_samples: int, purpose: str
    ) -> list[Group]:
        """`num_samples` scored completions of each prompt, whatever their rewards.

        purpose: two purposes draw different samples of a prompt. Raises RolloutError as generate.
        """
        draw = self._new_draw(sampling, num_samples, purpose, resample=False)

        async def all_of_them() -> list[Group]:
            tasks = [asyncio.ensure_future(self._group(prompt, draw)) for prompt in prompts]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        return self._run(all_of_them(), draw)

    def rescore(self, samples: Sequence[Sample]) -> Rescored:
        """See protocols.Rollout. The samples are spread over the engines."""
        policy = self._settings.sampling
        untempered = replace(policy, temperature=1.0)
        truncated = replace(policy, truncated=True)
        return Rescored(
            policy=self._score(samples, policy),
            untempered=self._score(samples, untempered) if untempered != policy else (),
            truncated=self._score(samples, truncated) if policy.truncates else (),
        )

    def _score(self, samples: Sequence[Sample], sampling: Sampling) -> Sequence[Completion]:
        """Nothing where an engine cannot tell."""
        if not samples or not all(engine.can_score(sampling) for engine in self.engines):
            return ()
        draw = self._new_draw(sampling, 1, "", resample=False)
        draw.wanted = len(samples)

        async def one(sample: Sample) -> Completion:
            answer = sample.completion.tokens[:MAX_RESCORED]
            scoring = replace(sampling, max_new_tokens=len(answer))
            completion = await self._complete(sample.prompt, scoring, draw, answer)
            draw.finished += 1
            return completion

        async def all_of_them() -> list[Completion]:
            return await asyncio.gather(*map(one, samples))

        return self._run(all_of_them(), draw)

    def _new_draw(
        self, sampling: Sampling, num_samples: int, purpose: str, resample: bool
    ) -> _Draw:
        dispatch = Dispatch(self.engines, self._check, self.revive)
        self._draw = _Draw(sampling, num_samples, purpose, resample, dispatch)
        return self._draw

    def progress(self) -> str:
        """See protocols.Rollout."""
        if (draw := self._draw) is None:
            return ""
        said = f"{draw.finished}/{draw.wanted} answers"
        if draw.times_asked:
            said = f"{draw.finished_prompts}/{draw.times_asked.total()} prompts, {said}"
        said += f", longest {draw.longest:,} tokens"
        return f"{said}, waiting for {few(draw.owing)}" if draw.owing else said

    def _run(self, work: Coroutine[Any, Any, T], draw: _Draw) -> T:
        """Do it by the deadline, and leave no request behind on any engine."""

        async def bounded() -> T:
            try:
                async with asyncio.timeout(self._settings.timeout_s) as limit:
                    watch = asyncio.ensure_future(draw.dispatch.watch(limit))
                    return await work
            except TimeoutError:
                raise self._late(draw) from None
            finally:
                watch.cancel()
                await self._release(draw)
                self._draw = None

        async def kept() -> None:
            found.append(await bounded())

        # not as what `run` returns: installing its handler of Ctrl-C, Python may spell the whole
        # result of the task out as text, minutes of it in a large run
        found: list[T] = []
        asyncio.run(kept())
        return found[0]

    async def _release(self, draw: _Draw) -> None:
        """Cancelled requests still run in the engines: end them. What goes wrong here is told but
        must not hide why we are here; an engine that is still busy refuses its next phase."""
        busy = draw.dispatch.owing
        aborts = [asyncio.wait_for(engine.abort(), ABORT_S) for engine in busy]
        outcomes = await asyncio.gather(*aborts, return_exceptions=True)
        for engine, outcome in zip(busy, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                log.warning(
                    "%s did not end its requests in %g s: %r", engine.name, ABORT_S, outcome
                )
        await draw.dispatch.close()

    def _late(self, draw: _Draw) -> RolloutError:
        return RolloutError(
            f"generate: {draw.wanted - draw.finished} of {draw.wanted} samples are missing after "
            f"{self._settings.timeout_s:g} s (rollout.timeout_s), waiting for "
            f"{', '.join(draw.owing) or 'nobody yet'}"
        )

    # ------------------------------------------------------------------ one group, one sample

    async def _group(self, prompt: Prompt, draw: _Draw) -> Group:
        draw.times_asked[prompt.uid] += 1
        draw.wanted += draw.num_samples
        again = draw.times_asked[prompt.uid] - 1
        seed_parts = (draw.purpose, prompt.uid, *([f"again{again}"] if again else []))
        tasks = [
            asyncio.ensure_future(self._sample(prompt, (*seed_parts, index), draw))
            for index in range(draw.num_samples)
        ]
        try:
            samples = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        if self._rewards.scores_groups(prompt.reward):
            with draw.being_graded(len(samples)):
                verdicts = await self._rewards.grade_group(prompt, [s.text for s in samples])
            samples = [replace(s, verdict=v) for s, v in zip(samples, verdicts, strict=True)]
        draw.finished_prompts += 1
        return Group(tuple(samples))

    async def _sample(
        self, prompt: Prompt, seed_parts: tuple[str | int, ...], draw: _Draw
    ) -> Sample:
        """One answer; again with another seed while it has no verdict, if the policy says so.
        Members of a group that is scored as one are not drawn again."""
        sample = await self._attempt(prompt, seed_parts, draw)
        if draw.resample and not self._rewards.scores_groups(prompt.reward):
            for attempt in range(1, MAX_RESAMPLES + 1):
                if sample.verdict.valid:
                    break
                draw.num_resampled += 1
                draw.finished -= 1
                sample = await self._attempt(prompt, (*seed_parts, f"retry{attempt}"), draw)
        return sample

    async def _attempt(
        self, prompt: Prompt, seed_parts: tuple[str | int, ...], draw: _Draw
    ) -> Sample:
        seed = derive_seed(draw.sampling.seed, *seed_parts)
        completion = await self._complete(prompt, replace(draw.sampling, seed=seed), draw)
        text = self._tokenizer.decode(completion.tokens)
        if self._rewards.scores_groups(prompt.reward):
            return Sample(prompt, completion, text, _NOT_YET)
        with draw.being_graded(1):
            return Sample(prompt, completion, text, await self._rewards.grade(prompt, text))

    async def _complete(
        self, prompt: Prompt, sampling: Sampling, draw: _Draw, scored: tuple[int, ...] = ()
    ) -> Completion:
        self._next_uid += 1
        request = Request(self._next_uid, prompt.tokens, sampling, scored)
        completion = await draw.dispatch.complete(request)
        draw.longest = max(draw.longest, len(completion.tokens))
        return completion

    def _check(self, engine: Engine, request: Request, completion: Completion) -> None:
        """What is stale or broken would be trained on as if it were the policy's. The routing: the
        shape of every one; the choices of an engine's first, as the trainer reads all."""
        fault = answer_fault(request, completion, self.version, self._settings.vocab_size)
        if not fault and request.sampling.wants_routing:
            routers, routing = self._settings.routers, completion.routing
            fault = routers.shape_fault(routing, len(request.tokens) + len(completion.tokens))
            if not fault and engine.name not in self._routing_seen:
                fault = routers.choice_fault(choices(routing))
                self._routing_seen.add(engine.name)
            if fault:
                fault = (
                    f"has a routing that cannot be replayed: {fault}; algo.routing_replay=false "
                    "does without"
                )
        if fault:
            raise EngineError(f"{engine.name}: its answer to request {request.uid} {fault}")

    # ------------------------------------------------------------------ memory

    def enter(self, phase: Phase) -> Mapping[str, int]:
        return total_bytes(ask_each(self.engines, lambda engine: engine.enter(phase)))

    def held_bytes(self) -> Mapping[str, int]:
        return total_bytes(ask_each(self.engines, lambda engine: engine.held_bytes()))

    def close(self) -> None:
        self._rewards.close()


_NOT_YET = Verdict(0.0, "not graded yet")  # while the group is incomplete; never leaves this file


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed, the same for the same parts on every machine."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 1


def _throughput(groups: Sequence[Group], seconds: float) -> Metrics:
    """perf/* of a rollout; tokens of groups that were not kept count as nothing."""
    lengths = [len(sample.completion.tokens) for group in groups for sample in group.samples]
    return {
        "perf/rollout_time": seconds,
        "perf/rollout_tokens_per_s": sum(lengths) / seconds,
        "perf/longest_sample_tokens_per_sec": max(lengths) / seconds,
    }
