"""`miles-lite replay RUN[@STEP] --reward FILE:FUNCTION`: saved samples by another reward."""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from miles_lite import compose
from miles_lite.build import reward_workers
from miles_lite.config import RewardConfig
from miles_lite.log import printable, say
from miles_lite.records import SampleRecord, read_mapping, read_samples
from miles_lite.rollout.rewards import RewardWorkers
from miles_lite.samples import sample_file, split_run
from miles_lite.types import Prompt, Verdict

KINDS = ("pass", "fail", "no verdict")
MAX_SHOWN = 200  # characters of an answer, from its end


def run(words: Sequence[str]) -> None:
    options = _parser().parse_args(words)
    file, colon, function = options.reward.rpartition(":")
    if not colon:
        raise ValueError(f"--reward {options.reward}: wanted FILE:FUNCTION")
    folder, step = split_run(options.run)
    path = sample_file(folder, step, options.set)
    config = read_mapping(folder / "config.yaml")
    if not isinstance(config.get("reward"), dict) or not isinstance(config.get("rollout"), dict):
        raise ValueError(f"{folder / 'config.yaml'} is missing, or is not that of a run")
    limits = compose.build(RewardConfig, config["reward"], "reward.")
    asked = {"file": file, "function": function, "options": _values(options.option), "others": {}}
    reward = compose.build(RewardConfig, config["reward"] | asked, "reward.")
    records = list(read_samples(path))
    size = group_size(records, config, options.set)
    with reward_workers(reward) as workers:
        verdicts = asyncio.run(regrade(records, workers, size))
    old = f"{limits.file.name}:{limits.function}"
    say(f"{path}: {len(records)} samples, {old} -> {Path(file).name}:{function}\n")
    say("\n".join(comparison(records, verdicts, options.pass_reward, options.examples)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="miles-lite replay")
    parser.add_argument("run", help="folder of a run, RUN or RUN@STEP; else its last step")
    parser.add_argument("--reward", required=True, metavar="FILE:FUNCTION")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--set", default="", help="of an evaluation set instead of training")
    parser.add_argument("--pass-reward", type=float, default=1.0, help="or more is a pass")
    parser.add_argument("--examples", type=int, default=5, help="changed verdicts shown")
    return parser


def _values(words: Sequence[str]) -> dict[str, Any]:
    """YAML, as in a config."""
    values = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"--option {word}: wanted KEY=VALUE")
        values[key] = yaml.safe_load(value)
    return values


def group_size(records: Sequence[SampleRecord], config: Mapping[str, Any], eval_set: str) -> int:
    """Samples of one prompt, which lie together."""
    size = config["rollout"]["samples_per_prompt"]
    if eval_set:
        own = config["eval"].get("sets", {}).get(eval_set, {}).get("samples_per_prompt")
        size = own or config["eval"]["samples_per_prompt"]
    uids = [record.prompt_uid for record in records]
    if len(uids) % size or any(uid != uids[i - i % size] for i, uid in enumerate(uids)):
        raise ValueError(f"{len(uids)} samples are not groups of {size}, as the config says")
    return size


async def regrade(
    records: Sequence[SampleRecord], workers: RewardWorkers, group: int
) -> list[Verdict]:
    """ValueError if the reward asks for what samples do not keep."""
    if "metadata" in workers.extras(""):
        raise ValueError(
            f"{workers.function('')} wants the metadata of the data row, which samples do not keep"
        )
    groups = [records[start : start + group] for start in range(0, len(records), group)]
    graded = await asyncio.gather(
        *(workers.grade_group(_prompt(one[0]), [r.response for r in one]) for one in groups)
    )
    return [verdict for verdicts in graded for verdict in verdicts]


def _prompt(record: SampleRecord) -> Prompt:
    return Prompt(record.prompt_uid, (), record.prompt, record.label, "", {})


def comparison(
    records: Sequence[SampleRecord],
    verdicts: Sequence[Verdict],
    pass_reward: float,
    num_examples: int,
) -> list[str]:
    """A matrix of verdicts, old by new; how many changed; some that did."""
    before = [Verdict(record.reward, record.invalid) for record in records]
    pairs = Counter(
        (_kind(old, pass_reward), _kind(new, pass_reward))
        for old, new in zip(before, verdicts, strict=True)
    )
    changed = [i for i, old in enumerate(before) if old != verdicts[i]]
    lines = [f"{'old / new':<12}" + "".join(f"{kind:>12}" for kind in KINDS)]
    lines += [f"{old:<12}" + "".join(f"{pairs[old, new]:>12}" for new in KINDS) for old in KINDS]
    crossed = sum(number for (old, new), number in pairs.items() if old != new)
    mean = [sum(v.reward for v in side) / len(side) for side in (before, verdicts)]
    lines += [
        "",
        f"{len(changed)} of {len(records)} verdicts change, {crossed} of them between the kinds "
        f"above; mean reward {mean[0]:.4f} -> {mean[1]:.4f}",
    ]
    for i in changed[:num_examples]:
        record = records[i]
        told = f"{_told(before[i])} -> {_told(verdicts[i])}"
        lines.append("\t" + printable(f"{record.prompt_uid}, label {record.label}: {told}"))
        lines.append("\t\t" + printable(record.response[-MAX_SHOWN:]))
    return lines


def _kind(verdict: Verdict, pass_reward: float) -> str:
    if not verdict.valid:
        return "no verdict"
    return "pass" if verdict.reward >= pass_reward else "fail"


def _told(verdict: Verdict) -> str:
    return f"{verdict.reward:g}" if verdict.valid else verdict.reason
