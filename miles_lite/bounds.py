"""What values of a configuration must hold, and how it is said when they do not."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any


class ConfigError(ValueError):
    """The configuration cannot run. Says which key, which value, and the way out."""


def derive_batch(cfg: Any) -> None:
    """Fill in the one of four sizes of a Config that is 0. What does not divide is an error."""
    names = {
        "rollout.num_prompts": cfg.rollout.num_prompts,
        "rollout.samples_per_prompt": cfg.rollout.samples_per_prompt,
        "train.global_batch": cfg.train.global_batch,
        "train.updates_per_step": cfg.train.updates_per_step,
    }
    told = ", ".join(f"{name} = {value}" for name, value in names.items())
    law = "num_prompts x samples_per_prompt = global_batch x updates_per_step"
    missing = [name for name, value in names.items() if value == 0]
    if min(names.values()) < 0 or len(missing) > 1:
        raise ConfigError(f"{told}: {law}, so at most one of them may stay 0, to be derived")
    prompts, samples, batch, updates = names.values()
    if missing:
        of_train = missing[0].startswith("train")
        whole = prompts * samples if of_train else batch * updates
        known = max(batch, updates) if of_train else max(prompts, samples)
        if whole % known:
            raise ConfigError(f"{told}: {law} leaves no whole number for {missing[0]}")
        section, name = missing[0].split(".")
        derived = replace(getattr(cfg, section), **{name: whole // known})
        object.__setattr__(cfg, section, derived)  # before anyone has seen the object
    elif prompts * samples != batch * updates:
        raise ConfigError(f"{told}: {law} does not hold; leave one of them out to have it derived")


def not_negative(section: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(section, name) < math.inf:
            raise ConfigError(f"{name} = {getattr(section, name)}: wanted 0 or more, and finite")


def positive(section: Any, *names: str) -> None:
    for name in names:
        if getattr(section, name) < 1:
            raise ConfigError(f"{name} = {getattr(section, name)}: wanted at least 1")


def above_0(section: Any, *names: str) -> None:
    for name in names:
        if not 0 < getattr(section, name) < math.inf:
            raise ConfigError(f"{name} = {getattr(section, name)}: wanted more than 0, and finite")


def below_1(section: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(section, name) < 1:
            raise ConfigError(f"{name} = {getattr(section, name)}: wanted 0 <= {name} < 1")
