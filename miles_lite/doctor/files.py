"""Model, tokenizer, data and reward of an experiment, read as training reads them."""

from __future__ import annotations

from collections.abc import Iterator

from miles_lite import build
from miles_lite.build import Inputs
from miles_lite.config import Config
from miles_lite.data.tokenizer import ChatTokenizer
from miles_lite.doctor.finding import Finding, attempt, graded, skipped
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.planner.hardware import Hardware
from miles_lite.planner.plan import make_plan
from miles_lite.rollout.probes import Kind
from miles_lite.rollout.reward_audit import Section
from miles_lite.weights.conversion import (
    MANIFEST,
    check_hash,
    check_tensors,
    content_hash,
    read_manifest,
)
from miles_lite.weights.hf_files import HfFiles

MAX_HASHED = 50e9  # bytes; `miles-lite convert verify` compares more, on many hosts
TAIL_LEN = 40  # characters of a prompt that are shown


def plan(cfg: Config, model: NemotronH) -> Finding:
    """Does it fit what it is planned for?"""

    def work() -> Finding:
        planned = make_plan(cfg, model, Hardware.named(cfg.cluster.hardware))
        told = f"{planned.num_devices} devices on {planned.num_hosts} hosts of "
        told += planned.hardware.name
        way_out = "miles-lite plan tells the smallest change that fits"
        lacks = [f"{lack} -> {way_out}" for lack in planned.shortages[:1]]
        return graded("plan", told, lacks, [])

    return attempt("plan", work, "miles-lite plan with the same words")


def model_files(cfg: Config, model: NemotronH) -> Finding:
    """Every tensor of the model is there, whole and in its shape; its hash where one is known."""

    def work() -> str:
        files = HfFiles(cfg.model.path)
        check_tensors(files, model)
        num_bytes = sum(stored.num_bytes for stored in files.tensors.values())
        num_files = len({stored.file for stored in files.tensors.values()})
        told = f"{len(files.tensors)} tensors, {num_bytes / 1e9:,.3f} GB, in {num_files} files"
        manifest = read_manifest(cfg.model.path)
        if not manifest["tensors"]:
            return f"{told}; no {MANIFEST} to hold their contents against"
        if num_bytes > MAX_HASHED:
            return f"{told}; contents not hashed, `miles-lite convert verify` does"
        for name in files.tensors:
            with files.mapped(name) as tensor:
                check_hash(manifest, "hf", name, content_hash(tensor), cfg.model.path)
        return f"{told}; contents are what {MANIFEST} says"

    return attempt("model files", work, "download or convert the checkpoint again")


def tokenizer(cfg: Config, model: NemotronH) -> Finding:
    def work() -> Finding:
        found = ChatTokenizer.load(cfg.model.path)
        text = found.render([{"role": "user", "content": "1 + 1?"}], cfg.data.template_kwargs)
        tokens = found.encode(text)
        stops = " or ".join(found.decode([token]) for token in model.eos_token_ids)
        bad = []
        if not stops:
            bad.append("no eos_token_id: answers would never stop -> generation_config.json")
        if max(tokens) >= model.vocab_size:
            bad.append(
                f"token {max(tokens)} is beyond the model's {model.vocab_size} -> "
                "the tokenizer that belongs to the model"
            )
        told = f"a chat of {len(tokens)} tokens ends in {text[-TAIL_LEN:]!r}, answers in {stops}"
        return graded("tokenizer", told, bad, [])

    fix = "tokenizer files and chat_template.jinja of the model, in model.path"
    return attempt("tokenizer", work, fix)


def data(cfg: Config) -> tuple[Finding, Inputs | None]:
    """All that training reads before it starts, and all rules; the first prompt as an example."""
    inputs: list[Inputs] = []

    def work() -> str:
        inputs.append(build.read(cfg))
        (prompt, *_) = inputs[0].sources[0].sample(1)
        num_eval = sum(map(len, inputs[0].eval_prompts.values()))
        return (
            f"{sum(map(len, inputs[0].sources))} training and {num_eval} evaluation prompts; "
            f"{prompt.uid}: {len(prompt.tokens)} tokens, label {prompt.label!r}, ends in "
            f"{prompt.text[-TAIL_LEN:]!r}"
        )

    finding = attempt("data", work, "mend the key it names; miles-lite check says the same")
    return finding, next(iter(inputs), None)


def reward(cfg: Config, inputs: Inputs) -> Iterator[Finding]:
    """Synthetic answers to real prompts, graded by the experiment's own reward: a section each."""
    try:
        sections = build.audit_reward(cfg, inputs)
    except (ValueError, OSError, RuntimeError) as error:
        yield Finding("reward", "failed", str(error), "reward.file and reward.function")
        return
    fix = "miles-lite reward-audit shows every answer it graded; docs/rewards.md"
    for section in sections:
        bad = [f"{section.failure} -> {fix}"] if section.failure else []
        odd = [f"{warning} -> {fix}" for warning in section.warnings]
        yield graded("reward", "" if bad else _graded(section), bad, odd)


def _graded(section: Section) -> str:
    first = section.graded[0]
    return (
        f"{section.source}, {section.reward}: {len(section.graded)} prompts, a right answer as "
        f"{' or '.join(section.winning(Kind.right))} scores {first.best:g}, an empty one "
        f"{first.floor:g}; {section.false_positives:.1%} of wrong ones won"
    )


def check(cfg: Config, model: NemotronH) -> tuple[list[Finding], Inputs | None]:
    """All of them; the inputs for a live trial, unless one failed."""
    found = [plan(cfg, model), model_files(cfg, model), tokenizer(cfg, model)]
    finding, inputs = data(cfg)
    found.append(finding)
    if inputs is None:
        found.append(skipped("reward", "there are no prompts to answer: data failed"))
    else:
        found += reward(cfg, inputs)
    return found, inputs
