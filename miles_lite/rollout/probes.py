r"""Answers of which we know what a reward ought to say, written the way a model writes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from miles_lite.types import Prompt

OPEN, CLOSE = "<think>", "</think>"
FORMS = {
    "\\boxed{}": "\\boxed{{{label}}}",
    "Answer:": "Answer: {label}",
    "####": "#### {label}",
    "bare": "{label}",
}
MARKS = {"\\boxed{}": "\\boxed", "Answer:": "Answer:", "####": "####"}  # by which a prompt asks
_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "</s>")  # of a turn; answers keep them
_HOSTILE = {
    "empty box": "\\boxed{}",
    "every digit": " ".join(f"\\boxed{{{digit}}}" for digit in range(10)) + " \\boxed{}",
    "tower of powers": "\\boxed{9**9**9**9}",
    "factorial": "\\boxed{99999999!}",
    "code": "\\boxed{__import__('os').getpid()}",
    "open braces": "\\boxed{" * 2000,
    "long number": "\\boxed{" + "9" * 20_000 + "}",
    "control characters": "\\boxed{\x00\x1b[2J\u202e}",
    "not a number": "\\boxed{nan} Answer: nan",
}


class Kind(Enum):
    right = "right"
    wrong = "wrong"
    cut = "cut"  # by the length limit, within the answer or before thinking was over
    unmarked = "unmarked"  # right, in a sentence
    hostile = "hostile"


class Thinking(Enum):
    """What the end of a rendered prompt says of thinking."""

    opened = "opens a think block"  # the model closes it
    closed = "closes the think block"  # the model never writes a marker
    left = "leaves thinking to the model"  # it may write both markers, or none
    unknown = "knows no think block"

    @property
    def ways(self) -> tuple[bool, ...]:
        """Whether an answer can stand behind a closing marker that the model wrote."""
        by_name = {"opened": (True,), "left": (True, False)}
        return by_name.get(self.name, (False,))


def how_it_thinks(prompt_text: str, knows_thinking: bool) -> Thinking:
    """Read it from the end of the prompt; markers in a question or an example do not count.

    knows_thinking: the model's tokenizer or chat template has the markers.
    """
    tail = prompt_text.rstrip()
    if tail.endswith(OPEN):
        return Thinking.opened
    if tail.endswith(CLOSE):
        return Thinking.closed
    return Thinking.left if knows_thinking else Thinking.unknown


@dataclass(frozen=True, slots=True)
class Probe:
    kind: Kind
    form: str  # how the answer is marked, or what is the matter with it
    response: str
    thinks: bool  # stands behind a closing marker
    possible: bool  # with this template; the others tell why no possible one wins


def probes(prompt: Prompt, thinking: Thinking) -> Iterator[Probe]:
    """Answers of every kind to one prompt."""
    label, wrong = prompt.label, _another(prompt.label)
    opening = "" if thinking is Thinking.opened else OPEN
    end = next((end for end in _ENDS if end in prompt.text), "")
    for thinks in (True, False):
        before = f"{opening}So that is it.{CLOSE}\n\n" if thinks else ""
        for form, text in FORMS.items():
            right = before + text.format(label=label) + end
            yield Probe(Kind.right, form, right, thinks, thinks in thinking.ways)
    for thinks in thinking.ways:
        before = f"{opening}So that is it.{CLOSE}\n\n" if thinks else ""
        for form, text in FORMS.items():
            right, false = text.format(label=label), text.format(label=wrong)
            # what was right in a thought does not count
            weighed = f"{opening}Is it {right}? No.{CLOSE}\n\n" if thinks else ""
            yield Probe(Kind.wrong, form, weighed + false + end, thinks, True)
            if form != "bare":  # half of a bare answer may be right, 1.0
                yield Probe(Kind.cut, form, before + right[: len(right) // 2], thinks, True)
            if thinks:
                thought = f"{opening}It is {right}"
                yield Probe(Kind.cut, f"{form} in a thought", thought, False, True)
        yield Probe(Kind.unmarked, "sentence", f"{before}So we get {label}.{end}", thinks, True)
        for form, text in _HOSTILE.items():
            yield Probe(Kind.hostile, form, before + text + end, thinks, True)


def _another(label: str) -> str:
    """An answer that is not `label`, of the same type where that is a number."""
    try:
        return str(int(label) + 1)
    except ValueError:
        return f"{label}+1"
