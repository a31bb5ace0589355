"""Run folders written by the run's own code, with figures that are known."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np

from miles_lite.compose import compose
from miles_lite.protocols import Metrics, StepResult
from miles_lite.run import Run
from miles_lite.types import Completion, Finish, Group, Prompt, Sample, TrainSequence, Verdict

PROMPT = "<|im_start|>user\nWhat is 2+2?<|im_end|>\n"
TOKENS = (30, 31, 28, 5, 6)  # of the tiny model's vocabulary


def metrics(step: int) -> Metrics:
    """Of a step of 10 s: 4 to generate, 5 to train, 0.5 to sync, 0.3 to enter phases."""
    wave = math.sin(step / 7)
    return {
        "rollout/raw_reward": 0.5 + 0.3 * wave,
        "rollout/response_len/mean": 20.0,
        "rollout/response_len/max": 40.0,
        "rollout/truncated_ratio": 0.1,
        "rollout/zero_advantage_ratio": 0.25,
        "rollout/not_counted_ratio": 0.05,
        "rollout/prompts_per_kept": 2.0,
        "rollout/prompts_put_back": 3.0,
        "reward/invalid_ratio": 0.02,
        "train/train_rollout_logprob_abs_diff": 1e-3 * (1.1 + wave),
        "drift/decode_vs_prefill": 2e-7,
        "train/token_entropy": 0.7 - wave / 3,
        "train/grad_norm": math.nan if step == 3 else 1 + wave / 2,
        "train/nonfinite_logprobs": 0.0,
        "perf/step_time": 10.0,
        "perf/rollout_time": 4.0,
        "perf/rollout_tokens_per_s": 100.0,
        "perf/log_probs_time": 1.0,
        "perf/actor_train_time": 3.5,
        "perf/train_time": 5.0,
        "perf/actor_train_tok_per_s": 200.0,
        "perf/update_weights_time": 0.5,
        "perf/enter_generate_time": 0.1,
        "perf/enter_train_time": 0.1,
        "perf/enter_sync_time": 0.1,
        "perf/imbalance": 1.25,
        "perf/spared_ratio": 0.0,
        "memory/train/trainer_weights_bytes": 2e9,
        "memory/train/trainer_optimizer_bytes": 6e9,
        "memory/train/trainer_device_bytes": 8.5e9,
        "memory/train/trainer_resident_bytes": 3e9,
        "memory/generate/rollout_cache_bytes": 4e9 + step,
        "plan/memory/train/trainer_weights_bytes": 1.0,
        "plan/perf/step_time": 2.0,
        **{f"rollout/other/{i}": math.cos(step * i) for i in range(60)},  # as many as a run has
    }


def group(
    step: int,
    answers: Sequence[tuple[str, Verdict]],
    tokens: Sequence[int] = TOKENS,
    prompt: str = PROMPT,
    label: str = "4",
) -> Group:
    asked = Prompt(f"set:{step}", (1, 2), prompt, label, reward="", metadata={})
    samples = []
    for number, (text, verdict) in enumerate(answers):
        mine = tuple(tokens) * (1 + number % 3)
        chance = random.Random(step * 1000 + number)
        logprobs = tuple(-0.5 - 0.1 * chance.random() for _ in mine)
        finish = Finish.length if number % 5 == 4 else Finish.stop
        samples.append(Sample(asked, Completion(mine, logprobs, step, finish), text, verdict))
    return Group(tuple(samples))


def trained(groups: Sequence[Group]) -> tuple[StepResult, list[TrainSequence]]:
    """All but the last sample of each group was seen; the first token of each drifts by 0.25."""
    sequences, logprobs, entropies = [], {}, {}
    for index, each in enumerate(groups):
        for sample in each.samples:
            number, answer = len(sequences), sample.completion
            counts = sample is not each.samples[-1]
            sequences.append(
                TrainSequence((1, 2, *answer.tokens), 2, answer.logprobs, number, index,
                              sample.verdict.reward, 0.5 - number % 2, counts)
            )  # fmt: skip
            if counts:
                first, *rest = answer.logprobs
                said = [first + 0.25, *(v + 1e-3 * (v * 1e4 % 1) for v in rest)]
                logprobs[number] = np.array(said, np.float32)
                entropies[number] = np.array(answer.logprobs, np.float32) ** 2 / 2
    return StepResult({}, logprobs, entropies), sequences


VERDICTS = (Verdict(1.0, ""), Verdict(0.0, ""), Verdict(0.5, ""), Verdict(0.0, "timeout"))


def answers(count: int) -> list[tuple[str, Verdict]]:
    return [(f"answer {i}", VERDICTS[i % len(VERDICTS)]) for i in range(count)]


def plant(
    folder: Path,
    name: str,
    num_steps: int,
    groups_of: Mapping[int, Sequence[Group]] | None = None,
    troubles: Mapping[int, Metrics] | None = None,
    overrides: Sequence[str] = (),
    samples_of_step: int = 4,
) -> Path:
    cfg = compose(["experiment=tiny", *overrides])
    cfg = replace(cfg, log=replace(cfg.log, folder=folder, name=name))
    with Run.open(cfg, datetime(2025, 1, 2)) as run:
        for step in range(num_steps):
            held = {"eval/held": step / num_steps, "eval/held-truncated_ratio": 0.0}
            extra = held if step % 50 == 0 else {}
            run.log(step, metrics(step) | extra | (troubles or {}).get(step, {}))
            groups = (groups_of or {}).get(step) or [group(step, answers(samples_of_step))]
            run.save_samples(step, groups, *trained(groups))
        run.save_eval(num_steps, "held", [group(num_steps, answers(2))])
        run.finish({})
    return run.folder


def looked_at(**values: float) -> Metrics:
    """Of a step that alarms look at, which all others here are not: they have no loss."""
    drift = "train/train_rollout_logprob_abs_diff"
    return {"train/loss": 0.1, drift: 1e-9} | {
        name.replace("__", "/"): v for name, v in values.items()
    }


def drift_found(cause: str) -> dict[str, object]:
    """As `miles-lite drift` leaves it in a run's folder."""
    return {
        "step": 4,
        "causes": [{"name": cause, "size": 0.35, "evidence": "log-probs of the kept tokens"}],
        "parts": {"decode against trainer": 0.4},
        "layers": [{"layer": 1, "kind": "E", "mean": 1e-6, "max": 2e-6, "flips": 0.25}],
    }
