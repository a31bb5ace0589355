"""Whether two runs of the same settings are the same, apart from the times they took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles_lite.intact import file_digest
from miles_lite.run import read_metrics, read_samples

LEARNT = ("rollout/raw_reward", "train/loss", "train/grad_norm")


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of a run with the one it is held against."""

    samples: int  # of the latter
    lost: int  # samples it has and the run has not; another answer or verdict is another sample
    doubled: int  # samples the run has more than it
    differing: Mapping[str, int]  # by metric of LEARNT, the first step at which it is another
    weights_equal: bool  # to the bit

    @property
    def same(self) -> bool:
        return self.weights_equal and not (self.lost or self.doubled or self.differing)

    def lines(self) -> list[str]:
        steps = ", ".join(f"{name} from step {step} on" for name, step in self.differing.items())
        samples = f"{self.lost:,} lost and {self.doubled:,} doubled of {self.samples:,}"
        return [
            f"samples            {samples}",
            f"metrics            {steps or 'equal'}",
            f"final weights      {'equal to the bit' if self.weights_equal else 'DIFFER'}",
        ]


def compare(run: Path, wanted: Path) -> Comparison:
    """Two run folders."""
    ours, theirs = _samples(run), _samples(wanted)
    first, second = read_metrics(run), read_metrics(wanted)
    differing = {
        name: step
        for name in LEARNT
        for step in sorted({*first, *second}, reverse=True)
        if first.get(step, {}).get(name) != second.get(step, {}).get(name)
    }
    weights = _weights(wanted)
    return Comparison(
        samples=theirs.total(),
        lost=(theirs - ours).total(),
        doubled=(ours - theirs).total(),
        differing=differing,
        weights_equal=bool(weights) and _weights(run) == weights,
    )


def _samples(run: Path) -> Counter[Any]:
    return Counter(
        (record.step, record.prompt_uid, tuple(record.tokens), record.reward, record.invalid)
        for file in sorted((run / "samples").glob("step_*.jsonl.gz"))
        for record in read_samples(file)
    )


def _weights(run: Path) -> dict[str, str]:
    return {file.name: file_digest(file) for file in (run / "hf").glob("*.safetensors")}
