"""Supervised warm start of the tiny model, and the sampling that measures it."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tiny_task import SPECIAL, Sum, demonstrate, score
from transformers import NemotronHForCausalLM, PreTrainedTokenizerFast

EOS, PAD = SPECIAL.index("<|im_end|>"), SPECIAL.index("<pad>")
MAX_NEW_TOKENS = 24

BATCH = 48  # demonstrations a step
BALANCE_RATE = 1e-3  # of e_score_correction_bias a step


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the warm start. It ends when accuracy on held-out sums lies within `aim`."""

    name: str
    spoiled: float  # of the demonstrations
    lr: float
    temperature: float  # at which accuracy is measured
    repeats: int  # answers per sum, for that
    aim: tuple[float, float]
    check_every: int  # steps
    min_steps: int
    usual_steps: int  # for the estimate of the time left
    max_steps: int


PARTS = (
    Part("clean", 0.0, 3e-3, 0.0, 1, (0.95, 1.0), 25, 0, 500, 2000),
    Part("spoiled", 0.44, 1e-3, 1.0, 4, (0.48, 0.54), 20, 100, 120, 400),
)


@dataclass(frozen=True, slots=True)
class Measured:
    """What sampling says of the model."""

    accuracy: float  # mean score
    median_len: float  # tokens of an answer, end of turn included
    unfinished: float  # share cut at MAX_NEW_TOKENS
    answers: tuple[str, ...]  # repeats of the first sum, then of the second, ...

    def __str__(self) -> str:
        return (
            f"accuracy {self.accuracy:.3f}, median length {self.median_len:.0f}, "
            f"unfinished {self.unfinished:.3f}, e.g. {self.answers[0]}"
        )


def disable_dt_clamp(model: NemotronHForCausalLM) -> None:
    """Undo a clamp of dt that transformers has in prefill only, and Nemotron 3 nowhere."""
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))  # type: ignore[assignment]


def encode_prompt(tokenizer: PreTrainedTokenizerFast, question: str) -> list[int]:
    """The question as the model sees it, think block opened."""
    chat = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(str(text), add_special_tokens=False)


@torch.no_grad()
def sample(
    model: NemotronHForCausalLM,
    prompts: list[list[int]],
    temperature: float,
    generator: torch.Generator,
) -> list[list[int]]:
    """One answer per prompt, end of turn included; 0 is greedy. Equal lengths run together."""
    answers: list[list[int]] = [[] for _ in prompts]
    for length in sorted({len(prompt) for prompt in prompts}):
        rows = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        out = model(torch.tensor([prompts[i] for i in rows]), use_cache=True, logits_to_keep=1)
        running = torch.ones(len(rows), dtype=torch.bool)
        for _ in range(MAX_NEW_TOKENS):
            logits = out.logits[:, -1].float()
            if temperature == 0:
                tokens = logits.argmax(-1)
            else:
                probs = (logits / temperature).softmax(-1)
                tokens = torch.multinomial(probs, 1, generator=generator)[:, 0]
            for row, token, on in zip(rows, tokens.tolist(), running.tolist(), strict=True):
                if on:
                    answers[row].append(token)
            running &= tokens != EOS
            if not running.any():
                break
            out = model(tokens[:, None], past_key_values=out.past_key_values, use_cache=True)
    return answers


def measure(
    model: NemotronHForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sums: list[Sum],
    temperature: float,
    repeats: int = 1,
) -> Measured:
    """Score `repeats` answers to every sum; the draws are the same each time."""
    asked = [task for task in sums for _ in range(repeats)]
    prompts = [encode_prompt(tokenizer, task.question) for task in asked]
    tokens = sample(model, prompts, temperature, torch.Generator().manual_seed(0))
    answers = tuple(str(tokenizer.decode(answer)) for answer in tokens)
    scores = [score(text, str(task.answer)) for text, task in zip(answers, asked, strict=True)]
    return Measured(
        accuracy=statistics.mean(scores),
        median_len=statistics.median(map(len, tokens)),
        unfinished=statistics.mean(answer[-1] != EOS for answer in tokens),
        answers=answers,
    )


class WarmStart:
    """Trains `model` in place through all parts."""

    def __init__(
        self,
        model: NemotronHForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        shown: list[Sum],  # demonstrations are drawn from these
        check: list[Sum],  # and these decide when to stop
        seed: int,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.shown, self.check = shown, check
        self.rng = random.Random(seed)
        self.loads = _watch_routers(model)
        self.started = time.monotonic()
        self.steps_done = 0

    def run(self) -> None:
        """RuntimeError when a part does not get where it should."""
        for part in PARTS:
            self._run_part(part)

    def _run_part(self, part: Part) -> None:
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=part.lr, betas=(0.9, 0.98), weight_decay=0.0
        )
        for step in range(1, part.max_steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = part.lr * min(1.0, step / 20, (300 / step) ** 1.5)
            loss = self._step(optimizer, *self._batch(part.spoiled))
            self.steps_done += 1
            if step % part.check_every:
                continue
            got = measure(self.model, self.tokenizer, self.check, part.temperature, part.repeats)
            self._report(part, step, loss, got)
            if step >= part.min_steps and part.aim[0] <= got.accuracy <= part.aim[1]:
                return
        raise RuntimeError(f"{part.name}: not within {part.aim}; try another --seed")

    def _step(
        self, optimizer: torch.optim.Optimizer, inputs: torch.Tensor, targets: torch.Tensor
    ) -> float:
        logits = self.model(inputs, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        optimizer.step()
        for router, load in self.loads.items():  # balances experts without an auxiliary loss
            bias = router.get_buffer("e_score_correction_bias")
            bias += BALANCE_RATE * (load.mean() - load).sign()
        return loss.item()

    def _batch(self, spoiled: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs [B, T] and targets [B, T]; targets are <pad> outside the response."""
        inputs, targets = [], []
        for task in self.rng.choices(self.shown, k=BATCH):
            prompt = encode_prompt(self.tokenizer, task.question)
            shown = demonstrate(task, spoiled, self.rng)
            response = self.tokenizer.encode(shown, add_special_tokens=False)
            inputs.append(torch.tensor([*prompt, *response])[:-1])
            targets.append(torch.tensor([PAD] * (len(prompt) - 1) + response))
        pad = torch.nn.utils.rnn.pad_sequence
        return pad(inputs, True, PAD), pad(targets, True, PAD)

    def _report(self, part: Part, step: int, loss: float, got: Measured) -> None:
        used = time.monotonic() - self.started
        later = sum(p.usual_steps for p in PARTS[PARTS.index(part) + 1 :])
        steps_left = max(part.usual_steps - step, part.check_every) + later
        left = used / self.steps_done * steps_left
        print(
            f"{part.name} step {step}: loss {loss:.3f}, {got}; "
            f"{used:.0f} s used, about {left:.0f} s left",
            flush=True,
        )


def _watch_routers(model: NemotronHForCausalLM) -> dict[torch.nn.Module, torch.Tensor]:
    """Router -> tokens per expert [E] of its latest forward pass, kept up to date by hooks."""
    loads: dict[torch.nn.Module, torch.Tensor] = {}

    def count(router: torch.nn.Module, args: object, output: tuple[torch.Tensor, ...]) -> None:
        *_, chosen = output  # [T, top_k]
        loads[router] = torch.bincount(chosen.flatten(), minlength=router.num_experts).float()  # type: ignore[arg-type]

    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.register_forward_hook(count)
    return loads
