"""Tokens a second of the embedded engine against others that draw, in turns, on one core.

    python tools/bench/rollout.py [--models tiny 10m 50m] [--batches 1 8 16 64] [--rounds 3]
                                  [--sglang .venv-sglang/bin/python] [--json FILE]

Against transformers' `generate`, and with --sglang against SGLang's server on a CPU, with the
stand-ins in torch that this project has for its kernels of Mamba, experts and sampling, without
which it has no Nemotron-H on a CPU (and without its cache of prefixes). All draw at
temperature 1 and never end early, in fp32, after the same random prompts. "ragged" is 64 sequences
of 8 to 64 tokens, where transformers decodes all of them to the last one's end. The roofline is the
time it takes at least: of a decode step the bytes of the weights it reads (of the experts that many
random choices hit) and of its states, at the measured bandwidth of a sum, or its operations at the
measured speed of a matrix product, whichever is longer. Times are seconds of CPU of this process,
which neighbours disturb less than the clock; --wall takes the clock. SGLang is always held against
the engine by the clock: it has processes of its own, of one thread each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from models import SIZES, folder_of

from miles_lite.models.flops import forward_flops, output_flops
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.parallel import EngineDims
from miles_lite.protocols import Phase
from miles_lite.rollout.embedded.options import EngineOptions
from miles_lite.rollout.embedded.rank import EngineRank
from miles_lite.types import Request, Sampling

PROMPT_LEN, RESPONSE_LEN = 24, 32
RAGGED = "ragged"
START_S = 300.0  # of SGLang


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=tuple(SIZES), default=tuple(SIZES))
    parser.add_argument("--batches", nargs="+", default=["1", "8", "16", "64", RAGGED])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--wall", action="store_true")
    parser.add_argument("--sglang", default="", help="an interpreter that has it")
    parser.add_argument("--json", type=Path, help="all rounds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.perf_counter if options.wall else time.process_time
    bandwidth, peak = measured_bandwidth(clock), measured_peak(clock)
    print(f"one core: {bandwidth / 1e9:.1f} GB/s read, {peak / 1e9:.0f} GFLOP/s in fp32 products")
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for size in options.models:
            folder = folder_of(size, Path(scratch))
            model = NemotronH.from_folder(folder)
            with contextlib.ExitStack() as stack:
                sides = Sides(
                    stack.enter_context(contextlib.closing(engine(model, folder))),
                    transformers_model(folder),
                    stack.enter_context(contextlib.closing(SGLang(folder, options.sglang)))
                    if options.sglang
                    else None,
                )
                for batch in options.batches:
                    lengths = response_lens(batch)
                    times = measure(sides, lengths, options.rounds, clock)
                    floor_s = roofline_s(model, lengths, bandwidth, peak)
                    row = {"model": size, "batch": batch, "tokens": sum(lengths)}
                    found.append(row | {"floor_s": floor_s} | times)
                    print(line(found[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"load": os.getloadavg(), "rows": found}, indent=1))


def measure(
    sides: Sides, lengths: Sequence[int], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each side, in turns."""
    prompts, wall = random_prompts(len(lengths)), time.perf_counter
    times: dict[str, list[float]] = {"engine": [], "transformers": []}
    draw(sides.engine, prompts, lengths)  # warm
    if sides.sglang:
        times |= {"sglang": [], "engine_wall": []}
        sides.sglang.draw(prompts, lengths)
    for _ in range(rounds):
        times["engine"].append(timed(clock, draw, sides.engine, prompts, lengths))
        times["transformers"].append(timed(clock, generate, sides.transformers, prompts, lengths))
        if sides.sglang:
            times["engine_wall"].append(timed(wall, draw, sides.engine, prompts, lengths))
            times["sglang"].append(timed(wall, sides.sglang.draw, prompts, lengths))
    return times


def line(row: dict[str, Any]) -> str:
    own, theirs = (statistics.median(row[side]) for side in ("engine", "transformers"))
    spread = f"{min(row['engine']):.3f} to {max(row['engine']):.3f} s"
    told = (
        f"{row['model']:<5} batch {row['batch']:<7} engine {row['tokens'] / own:>8,.0f} tokens/s "
        f"({spread}), transformers {row['tokens'] / theirs:>7,.0f}, ratio {theirs / own:5.1f}, "
        f"{row['floor_s'] / own:4.0%} of the roofline"
    )
    if "sglang" not in row:
        return told
    own, sglang = (statistics.median(row[side]) for side in ("engine_wall", "sglang"))
    return f"{told}; SGLang {row['tokens'] / sglang:,.0f}, ratio {sglang / own:.1f} by the clock"


def response_lens(batch: str) -> list[int]:
    if batch == RAGGED:
        draw = random.Random(1)
        return [draw.randint(8, 64) for _ in range(64)]
    return [RESPONSE_LEN] * int(batch)


def random_prompts(num: int) -> list[tuple[int, ...]]:
    draw = random.Random(0)
    return [tuple(draw.randrange(4, 128) for _ in range(PROMPT_LEN)) for _ in range(num)]


# ------------------------------------------------------------------ the sides


@dataclass(frozen=True)
class Sides:
    engine: EngineRank
    transformers: Any
    sglang: SGLang | None


def engine(model: NemotronH, folder: Path) -> EngineRank:
    rank = EngineRank(model, EngineDims(1, 1, 1), 0, EngineOptions(max_seq_len=128))
    rank.load_hf(folder)
    rank.connect(rank.listen("127.0.0.1"))
    rank.set_version(0)
    rank.enter(Phase.generate)
    return rank


def draw(rank: EngineRank, prompts: Sequence[tuple[int, ...]], lengths: Sequence[int]) -> None:
    """Of every prompt an answer of that length, drawn at temperature 1."""
    requests = [
        Request(uid, prompt, Sampling(uid, length, 1.0, 1.0, 0, ()))
        for uid, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]
    rank.submit(requests)
    left = len(requests)
    while left:
        left -= len(rank.poll(5.0))


def transformers_model(folder: Path) -> Any:
    from transformers import NemotronHForCausalLM

    return NemotronHForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="grouped_mm"
    ).eval()


@torch.inference_mode()
def generate(model: Any, prompts: Sequence[tuple[int, ...]], lengths: Sequence[int]) -> None:
    longest = max(lengths)
    tokens = torch.tensor(prompts)
    model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=True,
        top_k=0,
        min_new_tokens=longest,
        max_new_tokens=longest,
        pad_token_id=1,
    )


class SGLang:
    """A server that is up, as `miles-lite serve` starts it."""

    def __init__(self, folder: Path, python: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._key = secrets.token_hex(16)
        words = ["serve", "--model", folder, "--engine", "sglang", "--python", python]
        words += ["--device", "cpu", "--max-seq-len", "128", "--max-running", "64"]
        words += ["--port", str(self._port), "--api-key-env", "BENCH_KEY"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "miles_lite.cli", *words],
            env=os.environ | {"BENCH_KEY": self._key, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until = time.monotonic() + START_S
        while True:
            if (code := self._process.poll()) is not None or time.monotonic() > until:
                self.close()
                why = f"ended with {code}" if code is not None else f"not up within {START_S:g} s"
                raise SystemExit(f"SGLang {why}: {' '.join(map(str, words))}")
            with contextlib.suppress(OSError):
                self._call("/health_generate", None)
                return
            time.sleep(1)

    def draw(self, prompts: Sequence[tuple[int, ...]], lengths: Sequence[int]) -> None:
        sampling = [
            {"max_new_tokens": length, "temperature": 1.0, "ignore_eos": True} for length in lengths
        ]
        answers = self._call("/generate", {"input_ids": prompts, "sampling_params": sampling})
        drawn = [answer["meta_info"]["completion_tokens"] for answer in answers]
        assert drawn == list(lengths), drawn

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()

    def _call(self, path: str, body: Mapping[str, Any] | None) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=START_S) as reply:
            return json.loads(reply.read() or b"null")


def timed(clock: Callable[[], float], work: Callable[..., object], *args: object) -> float:
    begin = clock()
    work(*args)
    return clock() - begin


# ------------------------------------------------------------------ the roofline


def measured_bandwidth(clock: Callable[[], float]) -> float:
    """Bytes a second that a sum reads from memory, beyond all caches."""
    values = torch.ones(64 << 20)
    return values.nbytes / min(timed(clock, values.sum) for _ in range(5))


def measured_peak(clock: Callable[[], float], size: int = 1536) -> float:
    a = torch.randn(size, size)
    return 2 * size**3 / min(timed(clock, torch.mm, a, a) for _ in range(5))


def roofline_s(model: NemotronH, lengths: Sequence[int], bandwidth: float, peak: float) -> float:
    """Seconds that the whole takes at least: the prompts by their operations, then step by step."""
    # of a prompt only the last token is followed by one that is drawn
    prompt = forward_flops(model, PROMPT_LEN) - output_flops(model, PROMPT_LEN - 1)
    total = prompt * len(lengths) / peak
    # one token at the end of a prompt: what a second one adds
    token_flops = forward_flops(model, PROMPT_LEN + 1) - forward_flops(model, PROMPT_LEN)
    for step in range(1, max(lengths)):
        running = sum(length > step for length in lengths)
        num_bytes = weight_bytes(model, running) + running * state_bytes(model, PROMPT_LEN + step)
        total += max(num_bytes / bandwidth, running * token_flops / peak)
    return total


def weight_bytes(model: NemotronH, num_tokens: int) -> float:
    """That so many tokens read, in fp32."""
    from miles_lite.weights.table import hf_tensors

    total = 0.0
    hit = 1 - (1 - model.top_k / model.num_experts) ** num_tokens if model.num_experts else 0.0
    for name, tensor in hf_tensors(model).items():
        if "embeddings" in name:
            total += num_tokens * model.hidden_size
            continue
        size = float(torch.Size(tensor.shape).numel())
        total += size * hit if ".experts." in name else size
    return 4 * total


def state_bytes(model: NemotronH, num_cached: int) -> float:
    """Of one sequence: states of Mamba read and written, keys and values read, in fp32."""
    kinds = model.pattern
    mamba = model.mamba_inner_size * model.ssm_state_size * 2
    cached = 2 * num_cached * model.num_kv_heads * model.head_dim
    return 4.0 * (kinds.count("M") * mamba + kinds.count("*") * cached)


if __name__ == "__main__":
    main()
