"""`miles-lite serve --model DIR|RUN[@STEP]`: the embedded engine in this process, or SGLang with
what the model wants of it. On a GPU it is SGLang unless told otherwise, on a CPU it is not."""

from __future__ import annotations

import argparse
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from miles_lite.cluster.network import is_loopback
from miles_lite.data.tokenizer import ChatTokenizer
from miles_lite.models.nemotron_h import NemotronH, context_length
from miles_lite.parallel import EngineDims
from miles_lite.rollout.sglang.options import ON_CPU
from miles_lite.weights.convert_command import model_folder

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
CHECK_S = 300.0  # for SGLang to say what it makes of its options
DEFAULT_CONTEXT = 4096  # on a CPU, where every slot of the cache is taken at once


def run(words: Sequence[str]) -> None:
    """Serves until it is stopped. Raises ValueError with the way out."""
    options = _parser().parse_args(words)
    api_key = _api_key(options)
    folder = model_folder(options.model)
    options.name = options.name or options.model.rstrip("/").rsplit("/", 1)[-1]
    device = _device(options.device)
    if options.engine == "auto":
        options.engine = "sglang" if device == "cuda" else "embedded"
    if options.engine == "sglang":
        _hand_over(folder, options, api_key, device)
    elif device == "cuda":
        raise ValueError("--engine embedded serves on a CPU only: --engine sglang, or --device cpu")
    else:
        _serve_here(folder, options, api_key)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="miles-lite serve")
    parser.add_argument("--model", required=True, help="HF folder, or RUN, or RUN@STEP")
    parser.add_argument("--name", default="", help="what clients call it; else the folder's name")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--api-key-env", default="", help="environment variable with the API key")
    parser.add_argument("--no-auth", action="store_true", help="serve the world without a key")
    parser.add_argument("--max-seq-len", type=int, default=0, help="tokens of prompt and answer")
    parser.add_argument("--max-running", type=int, default=16, help="answers drawn at once")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--threads", type=int, default=1, help="of CPU maths")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--engine", choices=["auto", "embedded", "sglang"], default="auto")
    parser.add_argument("--tp", type=int, default=1, help="devices, for SGLang")
    parser.add_argument("--python", default="", help="interpreter that has sglang, if not this one")
    parser.add_argument("--print-command", action="store_true", help="of SGLang, and end")
    return parser


def _api_key(options: argparse.Namespace) -> str:
    """From the environment only; "" for none. Refuses what the world could use unasked."""
    name = options.api_key_env
    key = os.environ.get(name, "").strip() if name else ""
    if name and not key:
        raise ValueError(f"--api-key-env {name}: the environment has no {name}, or an empty one")
    if not key and not options.no_auth and not is_loopback(options.host):
        raise ValueError(
            f"--host {options.host} can be reached by others, and there is no API key: give "
            "--api-key-env NAME, or say --no-auth"
        )
    return key


def _device(asked: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


def _serve_here(folder: Path, options: argparse.Namespace, api_key: str) -> None:
    try:
        import uvicorn

        from miles_lite.serve.limits import MAX_CONNECTIONS, Protocol
        from miles_lite.serve.server import Served, application
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is missing: pip install 'miles-lite[serve]'") from None
    import torch

    from miles_lite.rollout.embedded.options import EngineOptions
    from miles_lite.serve.live import LiveEngine

    torch.set_num_threads(options.threads)
    longest = context_length(folder)
    max_seq_len = options.max_seq_len or min(longest, DEFAULT_CONTEXT)
    if max_seq_len > longest:
        raise ValueError(f"--max-seq-len {max_seq_len} is more than the model's {longest}")
    sizes = EngineOptions(
        dtype=DTYPES[options.dtype], max_running=options.max_running, max_seq_len=max_seq_len
    )
    served = Served(options.name, ChatTokenizer.load(folder), LiveEngine(folder, sizes), api_key)
    where = f"[{options.host}]" if ":" in options.host else options.host
    print(
        f"serving {options.name} at http://{where}:{options.port}/v1: {max_seq_len} tokens, "
        f"{options.max_running} answers at once, {'with' if api_key else 'no'} API key",
        flush=True,
    )
    uvicorn.run(
        application(served),
        host=options.host,
        port=options.port,
        log_level="warning",
        http=Protocol,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=5,
    )


# ------------------------------------------------------------------ SGLang


def sglang_options(model: NemotronH, options: argparse.Namespace, device: str) -> dict[str, Any]:
    """ServerArgs of SGLang for a model that nobody trains meanwhile: besides place and size, how
    Nemotron 3 marks thinking and tool calls. All else is left to SGLang."""
    on_cpu: dict[str, Any] = {}
    if device == "cpu":
        length = options.max_seq_len or DEFAULT_CONTEXT
        on_cpu = {**ON_CPU, "max_total_tokens": options.max_running * length}
    return on_cpu | {
        "model_path": options.folder,
        "device": device,
        "served_model_name": options.name,
        "host": options.host,
        "port": options.port,
        "tp_size": options.tp,
        "ep_size": options.tp if model.num_experts else 1,
        "dtype": DTYPES[options.dtype],
        "context_length": options.max_seq_len or None,
        "max_running_requests": options.max_running,
        "reasoning_parser": "nemotron_3",
        "tool_call_parser": "qwen3_coder",
    }


def _hand_over(folder: Path, options: argparse.Namespace, api_key: str, device: str) -> None:
    """Start SGLang's server and stay until it ends. Run on a CPU, not on a GPU."""
    from miles_lite.rollout.sglang.check import check_all
    from miles_lite.rollout.sglang.launch import Launch, environment
    from miles_lite.rollout.sglang.model_folder import engine_folder
    from miles_lite.rollout.sglang.options import EngineSpec

    model = NemotronH.from_folder(folder)
    with TemporaryDirectory(prefix="miles-lite-serve-") as temporary:
        options.folder = str(engine_folder(folder, Path(temporary) / "model"))
        chosen = sglang_options(model, options, device)
        spec = EngineSpec(
            folder=Path(options.folder),
            dims=EngineDims(options.tp, 1, options.tp if model.num_experts else 1),
            dtype=options.dtype,
            device=device,
            max_seq_len=options.max_seq_len,
            max_running=options.max_running,
            prefill_tokens=0,
            seed=0,
            threads=options.threads,
            python=options.python,
        )
        nobodys = secrets.token_hex(32)
        launch = Launch.of(spec.python, environment(spec), chosen, api_key, nobodys)
        print(" ".join(launch.argv), "<<<", json.dumps(chosen), flush=True)
        if options.print_command:
            return
        (answer,) = check_all(spec, [chosen], CHECK_S, "--python")
        if "refused" in answer:
            raise ValueError(f"SGLang refuses: {answer['refused']}")
        process = launch.start()
        try:
            status = process.wait()
        except KeyboardInterrupt:
            assert process.stdin is not None
            process.stdin.close()  # its way to end, with all its children
            process.wait()
            raise
        if status:
            raise ValueError(f"SGLang ended with status {status}: see its last lines above")
