"""The math-verify reward: its own rules around the library, and the library undisturbed."""

from __future__ import annotations

import signal
import threading

import pytest

pytest.importorskip("math_verify")

from rewards.math_verify import MAX_ANSWER_LEN, math_verify


def boxed(answer: str) -> str:
    return f"\\boxed{{{answer}}}"


@pytest.mark.parametrize(
    ("response", "label", "verdict"),
    [
        (boxed("34"), "34", 1),
        (boxed("35"), "34", 0),
        (boxed("1,234"), "1234", 1),
        (boxed("2/4"), "1/2", 1),
        (boxed(r"\frac{2}{4}"), "0.5", 1),
        (boxed("x^2+2x+1"), "(x+1)^2", 1),
        (boxed("x^2+2x+2"), "(x+1)^2", 0),
        (boxed(r"\{3,1,2\}"), r"\{1,2,3\}", 1),
        (boxed("0.333333"), "1/3", 1),  # the library compares decimals to 6 places
        (boxed(r"12\text{ cm}"), "12", 1),
        (f"{boxed('2')} wait no {boxed('3')}", "3", 1),  # the library alone reads {2, 3}
        (f"{boxed('3')} wait no {boxed('2')}", "3", 0),
        (f"{boxed('3')}</think>{boxed('2')}", "3", 0),
        (f"{boxed('2')}</think>the answer is 3", "3", 1),
        ("The answer is 42.", "42", 1),
        ("The answer is 42." + " " * 1000, "42", 0),  # out of reach
        (boxed("34"), boxed("34"), 1),
        (boxed(""), "34", 0),
        ("", "34", 0),
    ],
)
def test_verdicts(response: str, label: str, verdict: float) -> None:
    assert math_verify(response, label) == verdict


def test_an_endless_answer_gives_no_verdict() -> None:
    with pytest.raises(ValueError) as refusal:
        math_verify(boxed("x+" * MAX_ANSWER_LEN + "1"), "34")
    assert type(refusal.value).__name__ == "AnswerTooLong"


@pytest.mark.parametrize("label", ["", " ", "'"])
def test_a_label_without_an_answer_gives_no_verdict(label: str) -> None:
    with pytest.raises(ValueError, match="finds no answer in label"):
        math_verify(boxed("34"), label)


def test_alarms_of_others_stay_set() -> None:
    """The library's own time-out would cancel them, and refuses to work in a thread."""
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 60)
        assert math_verify(boxed("a+b"), "b+a") == 1.0
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    verdicts: list[float] = []
    thread = threading.Thread(target=lambda: verdicts.append(math_verify(boxed("c+d+e"), "e+d+c")))
    thread.start()
    thread.join()
    assert verdicts == [1.0]


def test_plain_numbers_do_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [("34", "34"), ("35", "34"), ("0.25", "1/4"), ("2/4", "1/2"), ("1,234", "1234")]
    monkeypatch.setattr("rewards.math_verify.library", None)
    verdicts = [math_verify(f"\\boxed{{{a}}}", b) for a, b in pairs]
    assert verdicts == [1.0, 0.0, 1.0, 1.0, 1.0]
