"""Where prompts come from."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from miles_lite.bounds import ConfigError, above_0, positive


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One data set: a .jsonl or .parquet file, a folder saved by `datasets`, or one of the hub."""

    path: str  # optionally with rows, path[0:100]; of the hub: hf:owner/name, ?name=...&split=...
    weight: float = 1.0  # share among the sources of a mixture
    prompt_key: str = "prompt"  # chat messages or text; a dot reaches into an object
    prompt_template: str = ""  # text around a prompt that is text, with {prompt} for it
    label_key: str = "label"  # string or number
    label_pattern: str = ""  # regular expression; its group 1 is the label, as in "#### (.+)"
    reward: str = ""  # a name in reward.others; a row's metadata may choose another

    def __post_init__(self) -> None:
        above_0(self, "weight")
        if self.prompt_template and "{prompt}" not in self.prompt_template:
            raise ConfigError(f"prompt_template = {self.prompt_template!r} has no {{prompt}}")
        try:
            num_groups = re.compile(self.label_pattern).groups
        except re.error as error:
            raise ConfigError(f"label_pattern = {self.label_pattern!r}: {error}") from None
        if self.label_pattern and not num_groups:
            raise ConfigError(f"label_pattern = {self.label_pattern!r} has no group ( )")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    # by name; a path alone stands for a source of defaults, named after the file
    train: dict[str, SourceConfig]
    eval: dict[str, SourceConfig] = field(default_factory=dict)  # held-out sets
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # e.g. enable_thinking: true
    max_prompt_tokens: int = 1024  # longer prompts are left out and counted
    max_too_long_ratio: float = 0.1  # more of them than this is an error

    def __post_init__(self) -> None:
        positive(self, "max_prompt_tokens")
        if not 0 <= self.max_too_long_ratio <= 1:
            raise ConfigError(f"max_too_long_ratio = {self.max_too_long_ratio}: wanted 0 to 1")
        if not self.train:
            raise ConfigError("train names no data set: set data.train=FILE")
