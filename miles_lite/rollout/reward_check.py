r"""Before any training: can this reward ever be won with this chat template?

A reward that looks for an answer after </think> scores everything 0 when the template itself closes
the think block: no signal, no error. So right answers are written as the model would write them,
and graded; one of them must score more than saying nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from miles_lite.types import Verdict

THINK = ("<think>", "</think>")
_TAIL_LEN = 60  # characters of the prompt shown in messages
_FORMS = ("\\boxed{{{label}}}", "Answer: {label}", "#### {label}", "{label}")

Grade = Callable[[str, str], Verdict | float]


class Thinking(Enum):
    """How a rendered prompt leaves the model's think block."""

    opened = "opens a think block"  # the model closes it
    closed = "closes the think block"  # the model never writes a marker
    unsaid = "says nothing of thinking"  # the model may write both markers, or none


@dataclass(frozen=True, slots=True)
class Attempt:
    """One right answer, as the model might write it, and what it scored."""

    response: str
    thinks: bool  # the response holds the closing marker
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class RewardCheck:
    """What became of the attempts. An attempt wins if it scores more than an empty response."""

    thinking: Thinking
    attempts: tuple[Attempt, ...]
    floor: Verdict  # of the empty response

    @property
    def winners(self) -> tuple[Attempt, ...]:
        floor = self.floor.reward if self.floor.valid else 0.0
        return tuple(a for a in self.attempts if a.verdict.valid and a.verdict.reward > floor)

    @property
    def fires(self) -> bool:
        """Whether some answer that the model can write with this template wins."""
        return any(attempt.thinks in self._possible for attempt in self.winners)

    @property
    def needs_thinking(self) -> bool:
        """Whether answers win only behind the closing marker."""
        return bool(self.winners) and all(attempt.thinks for attempt in self.winners)

    @property
    def _possible(self) -> tuple[bool, ...]:
        by_thinking = {
            Thinking.opened: (True,),
            Thinking.closed: (False,),
            Thinking.unsaid: (True, False),
        }
        return by_thinking[self.thinking]


def how_it_thinks(prompt_text: str, think: tuple[str, str] = THINK) -> Thinking:
    """Read it from the end of the prompt; markers in a question or an example do not count."""
    tail = prompt_text.rstrip()
    if tail.endswith(think[0]):
        return Thinking.opened
    return Thinking.closed if tail.endswith(think[1]) else Thinking.unsaid


def check_reward_fires(
    grade: Grade, prompt_text: str, label: str, think: tuple[str, str] = THINK
) -> RewardCheck:
    """Grade right answers in several forms, with and without thinking before them."""
    opened, closed = think
    thinking = how_it_thinks(prompt_text, think)
    reasoning = "So that is it." if thinking is Thinking.opened else f"{opened}So that is it."
    attempts = []
    for form in _FORMS:
        answer = form.format(label=label)
        for response, thinks in ((f"{reasoning}{closed}{answer}", True), (answer, False)):
            attempts.append(Attempt(response, thinks, _verdict(grade(response, label))))
    return RewardCheck(thinking, tuple(attempts), _verdict(grade("", label)))


def preflight(
    grade: Grade,
    prompt_text: str,
    label: str,
    *,
    name: str = "",
    think: tuple[str, str] = THINK,
) -> RewardCheck:
    """Check one prompt of the data set. Raises ValueError if its right answer can never win.

    `needs_thinking` of the result is for the caller to warn of when the template says nothing of
    thinking: such a reward then depends on a model that writes the markers on its own.
    """
    check = check_reward_fires(grade, prompt_text, label, think)
    if not check.fires:
        raise ValueError(
            _refusal(check, name or getattr(grade, "__name__", "?"), prompt_text, label)
        )
    return check


def _refusal(check: RewardCheck, name: str, prompt_text: str, label: str) -> str:
    where = f"with this chat template (a prompt ends in {prompt_text[-_TAIL_LEN:]!r})"
    if check.winners:
        closed = check.thinking is Thinking.closed
        why = (
            "it looks for the answer behind </think>, which the prompt itself has already closed"
            if closed
            else "it does not find an answer that stands behind thinking"
        )
        return (
            f"reward {name} can never be won {where}: {why}. Use function math of rewards/math.py, "
            f"or a template with thinking {'on' if closed else 'off'} (data.template_kwargs)"
        )
    reasons = sorted({attempt.verdict.reason for attempt in check.attempts} - {""})
    why = f" (no verdict: {', '.join(reasons)})" if reasons else ""
    tried = ", ".join(form.format(label=label) for form in _FORMS)
    return (
        f"reward {name} gives a right answer no more than an empty one{why} {where}: tried {tried}"
        ". Check the labels of the data set (data.label_key) and the reward file"
    )


def _verdict(result: Verdict | float) -> Verdict:
    return result if isinstance(result, Verdict) else Verdict(float(result), "")
