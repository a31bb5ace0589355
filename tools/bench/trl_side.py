"""TRL's side of `vs_trl.py`: some GRPO steps on a CPU, and what each phase of them took.

Runs in an environment of its own that has TRL and not this project; alone, or started by torchrun
in several processes. Writes to --out, as JSON, one object a step: seconds by phase, and tokens.
"""

# pyright: reportMissingImports=false
# (of TRL's environment)

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Timed(GRPOTrainer):
    """GRPOTrainer with a stopwatch around its own phases."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        super().__init__(*args, **kwargs)

    def _timed(self, phase: str, call: Any, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        result = call(*args, **kwargs)
        self.seconds[phase] += time.perf_counter() - begin
        return result

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        answers, logprobs = self._timed("rollout", super()._generate_single_turn, *args, **kwargs)
        self.seconds["tokens"] += sum(map(len, answers)) * int(os.environ.get("WORLD_SIZE", "1"))
        return answers, logprobs

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        return self._timed("reward", super()._calculate_rewards, *args, **kwargs)

    def _prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
        return self._timed("prepare", super()._prepare_inputs, *args, **kwargs)


class Steps(TrainerCallback):
    """Ends of steps, which is where the next one begins."""

    def __init__(self, progress: Path) -> None:
        """progress: a file that gets a line at the end of every step."""
        self.progress = progress
        self.rows: list[dict[str, float]] = []
        self.trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        seconds = self.trainer.seconds
        total, self.begin = now - self.begin, now
        self.rows.append(
            {
                "step": total,
                "rollout": seconds["rollout"],
                "reward": seconds["reward"],
                "log_probs": 0.0,  # with one update a step TRL takes those of the training pass
                "train": total - seconds["prepare"],
                "sync": 0.0,  # it samples from the weights that it trains
                "tokens": seconds["tokens"],
            }
        )
        seconds.clear()
        if self.trainer.accelerator.is_main_process:
            with self.progress.open("a") as sink:
                sink.write("step\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="jsonl with prompt and label")
    parser.add_argument("--reward", required=True, help="module:function")
    parser.add_argument("--prompts", type=int, required=True)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--response", type=int, required=True)
    parser.add_argument("--passes", type=int, required=True, help="forward passes of an update")
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--experts", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    module, _, function = options.reward.partition(":")
    sys.path[0] = str(Path(__file__).parents[2])  # not this folder, whose rewards.py would be found
    score = getattr(importlib.import_module(module), function)
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def reward(completion_ids: list[list[int]], label: list[str], **_: Any) -> list[float]:
        # TRL's own text has lost the special tokens, and with them the end of the thinking
        texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=False)
        return [score(text, truth) for text, truth in zip(texts, label, strict=True)]

    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    batch = options.prompts * options.samples
    config = GRPOConfig(
        output_dir=str(options.out.with_suffix("")),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=batch // num_processes // options.passes,
        gradient_accumulation_steps=options.passes,
        num_generations=options.samples,
        max_completion_length=options.response,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        epsilon=0.2,
        epsilon_high=0.28,
        loss_type="grpo",
        learning_rate=options.lr,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_steps=options.steps,
        model_init_kwargs={"dtype": "float32", "experts_implementation": options.experts},
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    steps = Steps(options.out.with_suffix(".steps"))
    trainer = Timed(
        model=options.model,
        args=config,
        reward_funcs=reward,
        train_dataset=load_dataset("json", data_files=options.data, split="train"),
        processing_class=tokenizer,
        callbacks=[steps],
    )
    steps.trainer = trainer
    trainer.train()
    if trainer.accelerator.is_main_process:
        options.out.write_text(json.dumps(steps.rows))
    trainer.accelerator.wait_for_everyone()
    time.sleep(1)  # who watches reads the last step's seconds of CPU
    os._exit(0)  # torch's threads now and then abort a process that ends


if __name__ == "__main__":
    main()
