"""`miles-lite drift RUN[@STEP]`: a checkpoint of a run in one engine and one trainer rank of this
process, and what they make of one answer."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from miles_lite.checkpoints import Checkpoint
from miles_lite.compose import build
from miles_lite.config import Config
from miles_lite.data.tokenizer import ChatTokenizer
from miles_lite.drift.causes import ROUNDING, Cause, Evidence, Recorded, attribute, gap
from miles_lite.drift.examine import Sides, control, examine, reread
from miles_lite.log import say
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.parallel import EngineDims, ParallelDims
from miles_lite.protocols import Phase
from miles_lite.records import SampleRecord, read_samples
from miles_lite.rollout.embedded.options import EngineOptions
from miles_lite.rollout.embedded.rank import EngineRank
from miles_lite.trainer.megatron.messages import WorkerSpec
from miles_lite.trainer.megatron.worker import MegatronWorker
from miles_lite.types import Sampling
from miles_lite.weights.convert_command import export_hf, find_checkpoint

MAX_ANSWER = 512  # tokens that are looked at: each has fp32 logits over the whole vocabulary
_TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16"}


def run(words: Sequence[str]) -> None:
    """Print it, and leave it in RUN/drift.json. Raises ValueError."""
    parser = argparse.ArgumentParser(
        prog="miles-lite drift",
        description="Why engine and trainer differ, on one answer. Uses the embedded engine and "
        "one trainer rank, whatever the run used, so the model must fit one device twice.",
    )
    parser.add_argument(
        "run", help="folder of a run, RUN or RUN@STEP; else the newest with samples of its weights"
    )
    found = _checkpoint(parser.parse_args(words).run)
    folder = found.folder.parent.parent
    told = look(found, folder)
    (folder / "drift.json").write_text(json.dumps(told, indent=2) + "\n")
    say("\n".join(lines(told)))


def _checkpoint(run: str) -> Checkpoint:
    """Step N's weights drew the samples of step N: the last checkpoint of a run has none."""
    names = [path.name for path in Path(run, "checkpoints").glob("step_*")]
    names = [name for name in names if _samples(Path(run), name).is_file()]
    return find_checkpoint(f"{run}@{max(names)}" if names else run)


def _samples(folder: Path, step: str) -> Path:
    return folder / "samples" / f"{step}.jsonl.gz"


def look(found: Checkpoint, folder: Path) -> dict[str, Any]:
    """All that is found, as plain values."""
    cfg = build(Config, found.state["config"], "")
    sample = worst_sample(folder, found.step)
    prompt = ChatTokenizer.load(cfg.model.path).encode(sample.prompt)
    with tempfile.TemporaryDirectory() as scratch:
        export_hf(found, Path(scratch) / "policy", workers=1)
        with _sides(cfg, Path(scratch) / "policy", found.step) as sides:
            sampling = Sampling(
                seed=cfg.seed,
                max_new_tokens=min(MAX_ANSWER, cfg.rollout.max_response_tokens),
                temperature=cfg.rollout.temperature,
                top_p=cfg.rollout.top_p,
                top_k=cfg.rollout.top_k,
                stop_token_ids=sides.engine.config.eos_token_ids,
                wants_routing=True,
            )
            evidence = examine(sides, prompt, sampling)
            answer = sample.tokens[:MAX_ANSWER]
            again, trained = reread(sides, prompt, answer, sampling, cfg.algo.routing_replay)
            recorded = Recorded(
                drift=_drift(sample),
                engine=(torch.tensor(sample.logprobs[:MAX_ANSWER]), torch.tensor(again.logprobs)),
                trainer=(torch.tensor(sample.trainer_logprobs[:MAX_ANSWER]), trained),
                step=sample.step,
                same_weights=sample.step == found.step,
                alarm=cfg.alarms.drift,
            )
            evidence = replace(evidence, recorded=recorded)
            moved = control(sides, prompt, again)
    causes = attribute(evidence, ROUNDING[cfg.model.dtype])
    return _plain(evidence, causes, moved) | {"step": found.step, "prompt": sample.prompt_uid}


def worst_sample(folder: Path, step: int) -> SampleRecord:
    """The answer of the largest drift of a step, or of the last one before it that trained any."""
    files = (_samples(folder, f"step_{n:06d}") for n in range(step, -1, -1))
    for file in filter(Path.is_file, files):
        if seen := [record for record in read_samples(file) if len(record.trainer_logprobs)]:
            return max(seen, key=_drift)
    raise ValueError(
        f"{folder / 'samples'} has no samples up to step {step} that the trainer saw: they are "
        "kept with log.samples=true"
    )


def _drift(record: SampleRecord) -> float:
    pairs = zip(record.logprobs, record.trainer_logprobs, strict=True)
    value = fmean(abs(a - b) for a, b in pairs)
    return value if value == value else float("inf")  # NaN is worth a look


@contextmanager
def _sides(cfg: Config, policy: Path, step: int) -> Iterator[Sides]:
    model = NemotronH.from_folder(policy)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = EngineOptions(
        dtype=_TORCH_NAMES[cfg.model.dtype], device=device, max_running=1,
        max_seq_len=cfg.max_seq_len, timeout_s=cfg.rollout.timeout_s,
        stall_s=cfg.rollout.engine.stall_s,
    )  # fmt: skip
    engine = EngineRank(model, EngineDims(1, 1, 1), 0, options)
    engine.connect("")
    engine.load_hf(policy)
    engine.set_version(step)
    engine.enter(Phase.generate)
    spec = WorkerSpec(
        model_path=policy,
        dtype=cfg.model.dtype,
        device=device,
        dims=ParallelDims(tp=1, pp=1, dp=1, ep=1, expert_tp=1),
        train=cfg.train,
        optim=replace(cfg.optim, lr=0.0, warmup_updates=0),
        algo=replace(cfg.algo, kl_coef=0.0, kl_loss_coef=0.0, routing_replay="E" in model.pattern),
        temperature=cfg.rollout.temperature,
        sync_timeout_s=cfg.sync.timeout_s,
        seed=cfg.seed,
    )
    worker = MegatronWorker(spec, 0)
    worker.setup(worker.listen("127.0.0.1"))
    worker.enter(Phase.train)
    from miles_lite.trainer.megatron import setup

    try:
        yield Sides(engine, worker, trainer_version=step)
        engine.close()  # not one that failed: it may hang, and its thread ends with this process
    finally:
        setup.destroy()


def _plain(seen: Evidence, causes: Sequence[Cause], moved: tuple[int, float]) -> dict[str, Any]:
    parts = {
        "decode against trainer": gap(seen.decoded, seen.trained),
        "decode against prefill": gap(seen.decoded, seen.prefilled),
        "prefill against trainer": gap(seen.prefilled, seen.trained),
        "the same with routes replayed": gap(seen.prefilled, seen.replayed),
        "trainer: packed against alone": gap(seen.packed, seen.trained),
        "mass cut by top-p and top-k": float(-seen.log_kept.mean()),
    }
    if run := seen.recorded:
        parts["run's answer: engine and trainer"] = run.drift
        parts["run's answer: the same here"] = gap(run.engine[1], run.trainer[1])
        parts[f"run's engine of step {run.step}: now"] = gap(*run.engine)
        parts[f"run's trainer of step {run.step}: now"] = gap(*run.trainer)
    return {
        "tokens": len(seen.decoded),
        "parts": parts,
        "causes": [asdict(cause) for cause in causes],
        "layers": [asdict(layer) for layer in seen.layers],
        "tensors": {"compared": seen.num_tensors, "differ": [asdict(t) for t in seen.tensors]},
        "control": {"tensors_moved": moved[0], "logprobs_moved": moved[1]},
    }


def lines(told: Mapping[str, Any]) -> list[str]:
    """The findings as a table for a terminal."""
    text = [f"step {told['step']}, {told['tokens']} tokens answering {told['prompt']}", ""]
    text += [f"{'part':<34}nats a token"]
    text += [f"{name:<34}{value:.3g}" for name, value in told["parts"].items()]
    text += ["", "layer  kind  mean      max       routes that flip"]
    for layer in told["layers"]:
        flips = "" if layer["flips"] is None else f"{layer['flips']:.2%}"
        numbers = f"{layer['mean']:<10.2g}{layer['max']:<10.2g}{flips}".rstrip()
        text.append(f"{layer['layer']:<7}{layer['kind']:<6}{numbers}")
    tensors, control_ = told["tensors"], told["control"]
    text += [
        "",
        f"weights: {len(tensors['differ'])} of {tensors['compared']} tensors differ",
        f"an update with lr 0 moved {control_['tensors_moved']} tensors and log-probs by "
        f"{control_['logprobs_moved']:.2g}",
        "",
    ]
    return text + [f"{c['name']}: {c['size']:.3g}. {c['evidence']}" for c in told["causes"]]
