"""Options that the project owns, those it chooses, and what a server is started with."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from miles_lite import build
from miles_lite.compose import compose
from miles_lite.config import ConfigError
from miles_lite.parallel import EngineDims
from miles_lite.rollout.sglang.check import check
from miles_lite.rollout.sglang.launch import Place, launch
from miles_lite.rollout.sglang.options import CONTEXT_SLACK, EngineSpec, options

SPEC = EngineSpec(
    folder=Path("/models/ultra"),
    dims=EngineDims(tp=8, dp=4, ep=8),
    dtype="bf16",
    device="cuda",
    max_seq_len=4096,
    max_running=64,
    prefill_tokens=2048,
    seed=7,
)


def refusal(**extra: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        options(replace(SPEC, extra=extra))
    return str(caught.value)


def test_the_layout_and_the_sizes_are_derived() -> None:
    made = options(SPEC)
    layout = [made[name] for name in ("tp_size", "ep_size", "attn_dp_size", "dp_size", "pp_size")]
    assert layout == [8, 8, 4, 1, 1]
    # SGLang counts both over all DP groups
    assert (made["max_running_requests"], made["chunked_prefill_size"]) == (4 * 64, 4 * 2048)
    assert made["context_length"] == 4096 + CONTEXT_SLACK
    assert (made["model_path"], made["dtype"], made["device"]) == (
        "/models/ultra",
        "bfloat16",
        "cuda",
    )
    assert made["enable_memory_saver"] is True


@pytest.mark.parametrize(
    ("name", "value", "way_out"),
    [
        ("model_path", "/elsewhere", "model.path: set that"),
        ("tp_size", 4, "rollout.engine.tp: set that"),
        ("ep_size", 1, "rollout.engine.ep: set that"),
        ("attn_dp_size", 8, "rollout.engine.dp: set that"),
        ("dtype", "float16", "model.dtype: set that"),
        ("device", "cpu", "cluster.device: set that"),
        ("random_seed", 1, "it is seed: set that"),
        ("context_length", 131072, "data.max_prompt_tokens"),
        ("max_running_requests", 64, "rollout.engine.max_running x dp"),
        ("chunked_prefill_size", 4096, "rollout.engine.prefill_tokens x dp"),
        ("dp_size", 2, "refuses weight updates of replicas"),
        ("enable_dp_attention", True, "rollout.engine.dp: set that"),
        ("moe_dp_size", 2, "plain layout"),
        ("enable_eplb", True, "plain layout"),
        ("quantization", "fp8", "bf16 or fp32"),
        ("speculative_algorithm", "EAGLE", "the policy only"),
        ("tokenizer_worker_num", 2, "one server"),
        ("load_format", "auto", "come from the trainer"),
        ("enable_memory_saver", False, "take turns"),
        ("weight_version", "7", "leave it out"),
        ("enable_return_routed_experts", True, "routes are replayed"),
        ("delete_ckpt_after_loading", True, "model.path"),
    ],
)
def test_a_contradiction_names_both_values_and_the_way_out(
    name: str, value: Any, way_out: str
) -> None:
    message = refusal(**{name: value})
    owned = options(SPEC)[name]
    assert message.startswith(f"rollout.engine.sglang.{name} = {value!r}, but {name} = {owned!r}: ")
    assert way_out in message


def test_saying_what_is_so_anyway_is_fine() -> None:
    assert options(replace(SPEC, extra={"tp_size": 8, "enable_eplb": False})) == options(SPEC)


@pytest.mark.parametrize(
    "name", ["host", "port", "nnodes", "node_rank", "dist_init_addr", "base_gpu_id", "api_key"]
)
def test_a_place_cannot_be_asked_for(name: str) -> None:
    assert refusal(**{name: "x"}).startswith(f"rollout.engine.sglang.{name} = 'x': ")


@pytest.mark.parametrize("value", [1.5, 0, -1, 1, "0.8", True])
def test_a_memory_fraction_is_one(value: Any) -> None:
    assert f"mem_fraction_static = {value!r}: wanted a number between" in refusal(
        mem_fraction_static=value
    )


def test_what_is_only_chosen_can_be_changed() -> None:
    assert options(SPEC)["mem_fraction_static"] == 0.8
    assert options(SPEC)["cuda_graph_max_bs_decode"] == 64
    assert "disable_radix_cache" not in options(SPEC)  # samples of a prompt share its prefix
    extra = {"mem_fraction_static": 0.7, "attention_backend": "fa3"}
    changed = options(replace(SPEC, extra=extra))
    assert {name: changed[name] for name in extra} == extra


def test_a_cpu_needs_more() -> None:
    made = options(replace(SPEC, device="cpu", dims=EngineDims(2, 1, 2)))
    assert made["disable_radix_cache"] is True
    assert made["moe_runner_backend"] == "triton"
    assert made["max_total_tokens"] == 64 * (4096 + CONTEXT_SLACK)
    assert "mem_fraction_static" not in made
    started = launch(replace(SPEC, device="cpu", dtype="fp32"), Place(port=1), "key")
    assert started.env["SGLANG_USE_CPU_ENGINE"] == "1"
    assert started.env["SGLANG_MAMBA_CONV_DTYPE"] == "float32"
    assert len(started.env["SGLANG_CPU_OMP_THREADS_BIND"].split("|")) == 8
    for name in ("SGLANG_USE_CPU_ENGINE", "SGLANG_MAMBA_CONV_DTYPE"):
        assert name not in launch(SPEC, Place(port=1), "key").env


def test_the_key_is_read_and_not_seen() -> None:
    started = launch(SPEC, Place(port=1), "s3cret")
    assert "s3cret" not in " ".join([*started.argv, *started.env, *started.env.values()])
    assert json.loads(started.request)["keys"]["api_key"] == "s3cret"
    assert "\n" not in started.request


def test_a_node_of_several_knows_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("PYTHONPATH", "/of/this/interpreter")
    place = Place(port=30001, host="10.0.0.1", node_rank=1, rendezvous="10.0.0.1:5000", gpus=("3",))
    started = launch(replace(SPEC, num_nodes=2, python="/sgl/python"), place, "key")
    made = json.loads(started.request)["options"]
    got = [made[n] for n in ("nnodes", "node_rank", "dist_init_addr", "host", "port")]
    assert got == [2, 1, "10.0.0.1:5000", "10.0.0.1", 30001]
    assert started.argv[0] == "/sgl/python"
    assert started.env["CUDA_VISIBLE_DEVICES"] == "3"
    # another torch must not be found, nor an allocator that cannot give memory back
    assert "/of/this/interpreter" not in started.env["PYTHONPATH"]
    assert "PYTORCH_CUDA_ALLOC_CONF" not in started.env
    assert started.env["PATH"] == os.environ["PATH"]


# ------------------------------------------------------------------ whole configurations

SGLANG = ["experiment=tiny", "rollout.engine.backend=sglang"]


def test_the_configuration_becomes_a_spec() -> None:
    overrides = ["+rollout.engine.sglang.page_size=1", "eval.max_response_tokens=99"]
    cfg = compose([*SGLANG, *overrides, "rollout.engine.python=an/environment/bin/python"])
    spec = EngineSpec.of(cfg, Path("/view"), "cpu")
    assert (spec.dims, spec.dtype, spec.seed) == (EngineDims(2, 2, 2), "fp32", cfg.seed)
    assert spec.max_seq_len == cfg.data.max_prompt_tokens + 99
    assert spec.extra == {"page_size": 1}
    assert spec.python == f"{Path.cwd()}/an/environment/bin/python"


@pytest.mark.parametrize(
    "override", ["+rollout.engine.sglang.page_size=1", "rollout.engine.python=x"]
)
def test_options_of_an_engine_that_is_not_used_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=r"backend = embedded.*set backend = sglang"):
        compose(["experiment=tiny", override])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["parallel.dp=4", "rollout.engine.tp=4", "rollout.engine.dp=1"],
            r"tp / dp = 4 .* 2 Mamba groups",
        ),
        (
            ["parallel.dp=4", "rollout.engine.tp=4", "rollout.engine.ep=3"],
            r"ep = 3 does not divide tp = 4",
        ),
        (["rollout.engine.dp=4"], r"dp = 4 does not divide tp = 2"),
    ],
)
def test_layouts_that_cannot_be_served_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build.read(compose([*SGLANG, *overrides]))


def test_a_missing_interpreter_says_how_to_make_one() -> None:
    spec = replace(SPEC, python="/no/such/python")
    with pytest.raises(ConfigError, match=r"/no/such/python: there is no such.*setup-sglang-cpu"):
        check(spec, 10)


def test_an_interpreter_without_sglang_says_how_to_get_it() -> None:
    with pytest.raises(ConfigError, match=r"has no sglang; .*setup-sglang-cpu.*sglang=="):
        check(replace(SPEC, python=sys.executable), 100)


def test_an_engine_is_told_which_address_and_interface_is_its_own() -> None:
    two = replace(SPEC, num_nodes=2)
    place = Place(port=1, host="127.0.0.1", node_rank=1, rendezvous="10.0.0.1:2")
    started = launch(two, place, "key")
    asked = json.loads(started.request)["options"]
    assert (asked["nnodes"], asked["node_rank"], asked["dist_init_addr"]) == (2, 1, "10.0.0.1:2")
    assert started.env["SGLANG_HOST_IP"] == "127.0.0.1"
    assert started.env["GLOO_SOCKET_IFNAME"] == "lo"
    alone = launch(SPEC, Place(port=1), "key").env
    assert (alone["SGLANG_HOST_IP"], alone["GLOO_SOCKET_IFNAME"]) == ("127.0.0.1", "lo")
