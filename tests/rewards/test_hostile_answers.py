"""Answers that want to break a grader, through the workers that a run has: each gets a verdict or a
reason, none wins, nothing is executed, nothing reaches the terminal raw, and the workers are fit
afterwards."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from miles_lite.config import RewardFunction
from miles_lite.rollout.rewards import RewardLimits, RewardWorkers
from miles_lite.types import Prompt, Verdict

FOLDER = Path(__file__).parents[2] / "rewards"
LIMITS = RewardLimits(timeout_s=20.0, memory_bytes=2 << 30, response_len=5_000_000)
DEADLINE_S = 120.0  # of all of them together
NEVER = {"34": 0.0, "x+1": 0.0}  # what a wrong answer scores, by label
GRADERS = {"deepscaler": NEVER, "math": NEVER, "math_verify": NEVER, "dapo_math": {"34": -1.0}}

N = 1_000_000
CANARY = "CANARY"
CODE = f'open("{CANARY}","w")'
HOSTILE = {
    "a megabyte of braces": "{" * N,
    "a megabyte of closing braces": "}" * N,
    "a megabyte of pairs": "{" * (N // 2) + "}" * (N // 2),
    "a megabyte of digits": "9" * N,
    "a megabyte of spaces": " " * N + "x",
    "a megabyte of one letter": "a" * N,
    "a million parentheses": "(" * N + "1" + ")" * N,
    "parentheses of a formula": "(" * 200 + "x" + ")" * 200,
    "nested exponents": "x^{" * 150 + "2" + "}" * 150,
    "exponents": "^" * 490,
    "tower": "9**9**9**9",
    "tower in latex": "9^{9^{9^{9}}}",
    "tower of x": "x**x**x**x**x",
    "factorial": "99999999!",
    "factorials": "3" + "!" * 100,
    "polynomial": "(x+y+1)^{200}",
    "binomial": r"\binom{99999999}{4999999}",
    "sum": r"\sum_{n=1}^{99999999} \frac{1}{n^n}",
    "power of a half": "x^(1/9999999)",
    "exponent of ten": "1e999999999",
    "infinity": "1e400",
    "a fraction of nothing": "1/0",
    "fraction bomb": r"\frac" * 100_000,
    "fractions in fractions": r"\frac{" * 80 + "1" + "}{2}" * 80,
    "roots": r"\sqrt" * 100_000,
    "roots in roots": "sqrt(" * 60 + "x" + ")" * 60,
    "boxes": r"\boxed{" * 100_000 + "1" + "}" * 100_000,
    "texts": r"\text{" * 100_000,
    "commas": "1," * 200_000,
    "minuses": "-" * 490 + "x",
    "circles": "^ " * 100_000,
    "percents": "%" * 200_000,
    "matrix": r"\begin{matrix}" * 60,
    "verbatim": r"\verb|" * 100,
    "markers": "</think>" * 100_000,
    "half a marker": "<|" * 100_000,
    "labels": "Answer:" * 100_000,
    "import": f"__import__('os').system('touch {CANARY}')",
    "import in a function": f"frac(__import__('os').system('touch {CANARY}'))",
    "call": CODE,
    "call in octal": f'frac("{"".join(f"{chr(92)}{ord(c):03o}" for c in CODE)}")',
    "subclasses": "().__class__.__base__.__subclasses__()",
    "attribute": "x.__class__",
    "item": "x[0]",
    "condition": "x if x else x",
    "a long string": "'a'*9**9",
    "not a number": "nan",
    "infinite": "inf",
    "lambda": "lambda:x",
    "semicolon": f"x;{CODE}",
    "input": r"\input{/etc/passwd}",
    "write18": rf"\write18{{touch {CANARY}}}",
    "template": "{{7*7}}${7*7}#{7*7}",
    "shell": f"$(touch {CANARY})`touch {CANARY}`",
    "fullwidth digits": "３４",  # noqa: RUF001
    "arabic digits": "٣٤",
    "superscripts": "x²³",
    "roman": "ⅩⅩⅩⅣ",
    "nul": "3\x004",
    "nuls": "\x00" * 100_000,
    "bidi": "\u202e43\u202c",
    "zero width": "3\u200b4",
    "combining": "3" + "\u0301" * 100_000,
    "ansi": "\x1b[2J\x1b]0;owned\x07\x1b[31m35",
    "c1 controls": "\x9b31m35",
    "carriage returns": "35\r" * 1000,
    "html": "<script>alert(34)</script>",
    "lone surrogates": "\ud800\udfff",
    "surrogate after digits": "34\udc00",
    "not a character": "\ufffe\uffff",
    "beyond the planes": "\U0010ffff" * 1000,
}
# decimal digits of any script are digits to Python, which an honest model never writes
MAY_WIN = {"fullwidth digits", "arabic digits"}


@dataclass(frozen=True)
class Graded:
    name: str
    verdicts: dict[tuple[str, str], Verdict]  # by kind of answer and label
    stderr: bytes
    again: list[Verdict]  # of a right and a wrong answer, on every worker, afterwards
    canaries: list[Path]


def response(answer: str) -> str:
    """As every one of the graders looks for it."""
    return f"</think>\\boxed{{{answer}}}\nAnswer: {answer}"


@pytest.fixture(scope="module", params=GRADERS)
def graded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Graded]:
    name, folder = request.param, tmp_path_factory.mktemp("workers")
    here, own_stderr = Path.cwd(), os.dup(2)
    with (folder / "stderr").open("wb") as stderr:
        os.chdir(folder)  # where a canary would come to lie
        os.dup2(stderr.fileno(), 2)
        try:
            function = RewardFunction(file=FOLDER / f"{name}.py", function=name)
            # math-verify runs into it, the others never come near
            limits = replace(LIMITS, timeout_s=3.0) if name == "math_verify" else LIMITS
            workers = RewardWorkers({"": function}, 2, limits)
        finally:
            os.dup2(own_stderr, 2)
            os.close(own_stderr)
            os.chdir(here)
    with workers:
        asked = [(kind, label) for kind in HOSTILE for label in GRADERS[name]]
        verdicts = grade(workers, [(response(HOSTILE[kind]), label) for kind, label in asked])
        again = grade(workers, [(response(str(34 + n % 2)), "34") for n in range(8)])
    yield Graded(
        name,
        dict(zip(asked, verdicts, strict=True)),
        (folder / "stderr").read_bytes(),
        again,
        [*folder.glob(f"*{CANARY}*"), *here.glob(f"*{CANARY}*")],
    )


def grade(workers: RewardWorkers, asked: list[tuple[str, str]]) -> list[Verdict]:
    async def grades() -> list[Verdict]:
        async with asyncio.timeout(DEADLINE_S):
            pairs = ((Prompt("", (), "", label, "", {}), answer) for answer, label in asked)
            return await asyncio.gather(*(workers.grade(*pair) for pair in pairs))

    return asyncio.run(grades())


@pytest.mark.parametrize("kind", HOSTILE)
def test_each_has_a_verdict_or_a_reason_and_none_wins(graded: Graded, kind: str) -> None:
    for label, wrong in GRADERS[graded.name].items():
        verdict = graded.verdicts[kind, label]
        if not verdict.valid:
            # the guards of ours refuse by name, or what passes them is slow on a busy machine;
            # math-verify has none but the worker's limits
            allowed = "timeout|error: Too.*"
            if graded.name == "math_verify":
                allowed = "timeout|crash|error: .*"
            assert re.fullmatch(allowed, verdict.reason), verdict
        elif kind not in MAY_WIN:
            assert verdict.reward == wrong


def test_nothing_was_executed_and_the_workers_are_fit(graded: Graded) -> None:
    wrong = GRADERS[graded.name]["34"]
    assert graded.canaries == []
    assert graded.again == [Verdict(1.0, ""), Verdict(wrong, "")] * 4
    raw = re.findall(rb"[^\n\t\x20-\x7e]", graded.stderr)
    assert not raw, graded.stderr
