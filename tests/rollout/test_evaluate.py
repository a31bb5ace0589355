"""What an evaluation tells of scored groups, and what a set may have of its own."""

from __future__ import annotations

import pytest

from miles_lite.build import _eval_sets, check
from miles_lite.compose import compose
from miles_lite.config import ConfigError
from miles_lite.evaluate import table
from miles_lite.rollout.evaluate import EvalSet, eval_metrics
from miles_lite.types import Completion, Finish, Group, Prompt, Sample, Sampling, Verdict

PROMPT = Prompt("x:1", (1,), "?", "7", "", {})
SAMPLING = Sampling(0, 8, 1.0, 1.0, 0, (3,))


def group(*rewards: float | str) -> Group:
    """A text instead of a reward is the reason for having none."""
    return Group(
        tuple(
            Sample(
                PROMPT,
                Completion((1, 2), (-1.0, -1.0), 0, Finish.length if r == -1 else Finish.stop),
                "",
                Verdict(0.0, r) if isinstance(r, str) else Verdict(float(r), ""),
            )
            for r in rewards
        )
    )


def test_metrics_have_the_names_of_the_field() -> None:
    groups = [group(1, 1, 1, 1), group(0.5, -1, 0, "timeout"), group(1, 0, 0, 0)]
    eval_set = EvalSet("gsm8k", [PROMPT] * 3, SAMPLING, 4)
    metrics = eval_metrics(eval_set, groups)
    assert metrics["eval/gsm8k"] == metrics["eval/gsm8k-mean@4"] == pytest.approx(4.5 / 12)
    assert metrics["eval/gsm8k-pass@1"] == pytest.approx((1 + 0 + 1 / 4) / 3)
    assert metrics["eval/gsm8k-pass@2"] == pytest.approx((1 + 0 + 1 / 2) / 3)
    assert metrics["eval/gsm8k-pass@4"] == pytest.approx(2 / 3)
    assert metrics["eval/gsm8k-truncated_ratio"] == pytest.approx(1 / 12)
    assert metrics["eval/gsm8k-none_reward_ratio"] == pytest.approx(1 / 12)
    for name in ("mean@4", "pass@1", "pass@2", "pass@4"):
        low, high = (metrics[f"eval/gsm8k-{name}{end}"] for end in ("-low", "-high"))
        assert low < metrics[f"eval/gsm8k-{name}"] < high
    easier = eval_metrics(EvalSet("gsm8k", [PROMPT] * 3, SAMPLING, 4, 0.5), groups)
    assert easier["eval/gsm8k-pass@4"] == 1.0
    lines = table({"gsm8k": metrics}, {"gsm8k": 3})
    assert [line.split()[2] for line in lines[1:5]] == ["mean@4", "pass@1", "pass@2", "pass@4"]
    assert "8.3% without a verdict" in lines[5]


def test_a_single_prompt_has_no_interval_of_its_mean() -> None:
    metrics = eval_metrics(EvalSet("x", [PROMPT], SAMPLING, 1), [group(1)])
    assert "eval/x-mean@1-low" not in metrics and metrics["eval/x-pass@1"] == 1


def test_a_set_may_have_its_own_sampling() -> None:
    cfg = compose(
        [
            "experiment=tiny",
            "data.eval.hard=${data.eval.eval}",
            "eval.sets.hard.samples_per_prompt=8",
            "eval.sets.hard.temperature=0.5",
            "eval.sets.hard.top_p=0.9",
            "eval.sets.hard.max_response_tokens=99",
        ]
    )
    assert cfg.max_seq_len == cfg.data.max_prompt_tokens + 99
    plain, hard = _eval_sets(cfg, check(cfg))
    assert (plain.name, plain.samples_per_prompt, plain.sampling.temperature) == ("eval", 1, 1.0)
    assert (hard.name, hard.samples_per_prompt) == ("hard", 8)
    assert (hard.sampling.temperature, hard.sampling.top_p) == (0.5, 0.9)
    assert (hard.sampling.max_new_tokens, plain.sampling.max_new_tokens) == (99, 24)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("eval.sets.evil.temperature=1", "eval.sets.evil: data.eval has no such set, but eval"),
        ("eval.sets.eval.temperatur=1", "did you mean eval.sets.eval.temperature?"),
        ("eval.sets.eval.top_p=0", "sets.eval: top_p = 0.0: wanted 0 < top_p <= 1"),
        ("eval.sets.eval.samples_per_prompt=0", "sets.eval: samples_per_prompt = 0"),
    ],
)
def test_what_no_set_can_have_is_refused(override: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["experiment=tiny", override])
    assert told in str(caught.value)
