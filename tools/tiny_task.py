"""The tiny task: a tokenizer, sums, and demonstrations of which some are wrong on purpose.

Only `make_tiny.py` uses this. The model it trains must start GRPO at about half of the reward, with
several ways to fail, so two in five demonstrations are spoiled. The right answer stays the most
likely one: reinforcement learning here sharpens what supervised training has blurred, and no claim
beyond that should be read into the curves of the tiny model.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<pad>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
WORDS = ("system", "user", "assistant", "What", " is", "\\boxed{")
PRINTABLE = "\n" + "".join(map(chr, range(32, 127)))  # any ASCII text survives a round trip
VOCAB_SIZE = 128  # the tokens above, filled up with reserved ones

# As Nemotron 3's: the generation prompt opens a think block, or closes it at once.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{{- '<think>\\n' if enable_thinking | default(true) else '<think></think>' }}
{%- endif -%}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, some words whole; decode(encode(text)) == text for ASCII."""
    tokens = [*SPECIAL, *WORDS, *PRINTABLE]
    tokens += [f"<reserved_{i}>" for i in range(VOCAB_SIZE - len(tokens))]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    pieces = "|".join([*map(re.escape, WORDS), r"[\s\S]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<think>", "</think>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


@dataclass(frozen=True, slots=True)
class Sum:
    """One question: what is left + right?"""

    left: int
    right: int

    @property
    def question(self) -> str:
        return f"What is {self.left}+{self.right}?"

    @property
    def answer(self) -> int:
        return self.left + self.right

    def row(self) -> dict[str, object]:
        """As a line of the data file: chat messages and label, the format of dapo-math-17k."""
        return {"prompt": [{"role": "user", "content": self.question}], "label": str(self.answer)}


def all_sums(seed: int) -> list[Sum]:
    """Every sum of two numbers below 100, shuffled."""
    sums = [Sum(left, right) for left in range(100) for right in range(100)]
    random.Random(seed).shuffle(sums)
    return sums


def demonstrate(task: Sum, spoiled: float, rng: random.Random) -> str:
    """A response to imitate; with probability `spoiled` it is one that earns no reward."""
    echo, right = f"{task.left}+{task.right}=", str(task.answer)
    if rng.random() >= spoiled:
        return f"{echo}{right}</think>\\boxed{{{right}}}<|im_end|>"
    wrong = _spoil(right, rng)
    kinds = {
        f"{echo}{wrong}</think>\\boxed{{{wrong}}}<|im_end|>": 8,  # a wrong digit
        f"{echo}{right}</think>\\boxed{{{wrong}}}<|im_end|>": 3,  # right thought, wrong box
        f"{echo}{right}\\boxed{{{right}}}<|im_end|>": 3,  # the think block never ends
        f"{echo}{right}</think>{right}<|im_end|>": 3,  # no box
        f"{echo}{right}</think>\\boxed{{{right}<|im_end|>": 1,  # the box never closes
        f"{echo}<|im_end|>": 1,  # given up
        f"{echo}{right}={right}={right}={right}={right}": 1,  # rambles to the length limit
    }
    return rng.choices(list(kinds), weights=list(kinds.values()))[0]


def _spoil(number: str, rng: random.Random) -> str:
    """The number with one digit replaced."""
    place = rng.randrange(len(number))
    digit = rng.choice([d for d in "0123456789" if d != number[place]])
    return number[:place] + digit + number[place + 1 :]


def score(response: str, label: str) -> float:
    """1 if the last box after the think block holds the label: what rewards/deepscaler.py does
    with integers, without its parsing of formulas."""
    _, marker, answer = response.rpartition("</think>")
    boxes = re.findall(r"\\boxed\{([^{}]*)\}", answer) if marker else []
    return float(bool(boxes) and boxes[-1].strip() == label)
