"""Every recipe is planned; what does not fit says so, and the way out that it names does fit."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from miles_lite import cli
from miles_lite.compose import CONFIGS, compose
from miles_lite.config import Config, ConfigError
from miles_lite.models.flops import forward_flops, output_flops, train_flops
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.planner import search
from miles_lite.planner import time as seconds
from miles_lite.planner.hardware import Hardware
from miles_lite.planner.memory import sizes
from miles_lite.planner.plan import Expected, Plan, make_plan, read_model, with_devices

EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))


def plan(*overrides: str, gpu: str = "") -> Plan:
    cfg = compose(list(overrides))
    return make_plan(cfg, read_model(cfg)[0], Hardware.named(gpu or cfg.cluster.hardware))


# ------------------------------------------------------------------ recipes


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_recipe_fits_and_is_planned_quickly(experiment: str) -> None:
    begin = time.process_time()
    found = plan(f"experiment={experiment}")
    assert time.process_time() - begin < 10
    assert found.fits and not found.warnings
    for phase in found.step.phases:
        assert 0 <= phase.floor_s <= phase.estimate_s, phase
        assert sum(phase.parts.values()) == pytest.approx(phase.estimate_s)
    assert found.engine.running <= found.engine.capacity
    cfg = compose([f"experiment={experiment}"])
    assert found.longest_trained >= cfg.train.max_tokens_per_micro_batch


def test_ultra_is_the_published_recipe() -> None:
    cfg = compose(["experiment=nemotron3_ultra"])
    dims, engine, optim = cfg.parallel.dims, cfg.rollout.engine, cfg.optim
    assert (dims.tp, dims.pp, dims.dp, dims.ep, dims.expert_tp, dims.expert_dp) == (
        8,
        4,
        4,
        32,
        1,
        1,
    )
    assert (engine.num_engines, engine.tp, engine.dp, engine.ep) == (4, 32, 4, 32)
    assert engine.sglang == {"mem_fraction_static": 0.7}
    assert (cfg.rollout.num_prompts, cfg.rollout.samples_per_prompt) == (32, 8)
    assert (cfg.rollout.max_response_tokens, cfg.rollout.temperature) == (8192, 1.0)
    assert (cfg.train.global_batch, cfg.train.updates_per_step) == (128, 2)
    assert cfg.train.megatron["recompute_granularity"] == "full"
    assert (optim.lr, optim.weight_decay, optim.beta1, optim.beta2) == (1e-6, 0.1, 0.9, 0.98)
    assert optim.cpu_offload and optim.clip_grad == 1.0 and optim.warmup_updates == 0
    assert (cfg.algo.eps_clip, cfg.algo.eps_clip_high) == (0.2, 0.28)
    assert not cfg.algo.needs_reference and cfg.algo.entropy_coef == 0
    assert cfg.reward.function == "deepscaler" and "dapo" in cfg.data.train
    assert cfg.checkpoint.every > 0  # and a checkpoint always has the optimizer: it resumes


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_counts_are_those_of_live_modules_of_every_role_of_all_recipes() -> None:
    """Megatron-core builds them on the meta device; one process, since it keeps global state."""
    code = """
import sys
from miles_lite.compose import compose
from miles_lite.planner.plan import read_model
from miles_lite.planner.verify import ranks_of_every_role, verify
for name in sys.argv[1:]:
    cfg = compose([f"experiment={name}"])
    print(name, *(v.rank for v in verify(cfg, read_model(cfg)[0], ranks_of_every_role(cfg))))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *EXPERIMENTS],
        cwd=CONFIGS.parent,
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    verified = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert sorted(verified) == EXPERIMENTS
    assert verified["nemotron3_ultra"] == ["0", "31", "32", "63", "64", "95", "96", "127"]


def test_a_wrong_count_is_found_by_live_modules() -> None:
    """A router that is planned a column too wide is named, with its rank."""
    code = """
from miles_lite.compose import compose
from miles_lite.planner import verify
from miles_lite.planner.plan import read_model
cfg = compose(["experiment=tiny"])
tensors = verify.hf_tensors
def wrong(model):
    found = dict(tensors(model))
    name = "backbone.layers.1.mixer.gate.weight"
    found[name] = type(found[name])(name, (8, 65), 0)
    return found
verify.hf_tensors = wrong
verify.verify(cfg, read_model(cfg)[0], [1])
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=CONFIGS.parent,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    said = "rank 1: decoder.layers.1.mlp.router.weight has shape [8, 64], the plan says [8, 65]"
    assert said in done.stderr, done.stderr[-2000:]


# ------------------------------------------------------------------ time


def test_operations_of_a_sequence_are_a_polynomial() -> None:
    """Which the planner evaluates where the packer of a run counts layer by layer."""
    for name in ("nemotron3_ultra", "nemotron3_nano_4b"):
        model = NemotronH.from_folder(CONFIGS / "model" / name)
        a, b = seconds._polynomial(lambda n, model=model: train_flops(model, n))
        for n in (1, 7, 10_240):
            assert a * n + b * n * (n + 1) // 2 == train_flops(model, n)


def test_decoding_reads_the_weights_of_a_device_once_a_token() -> None:
    """Ultra, all experts met, no caches: 42.2 GB at 4.8 TB/s, the input embedding aside."""
    cfg = compose(["experiment=nemotron3_ultra"])
    found = sizes(cfg, read_model(cfg)[0], Hardware.named("h200"))
    table = 131072 // 8 * 8192 * 2
    many = replace(found, engine=replace(found.engine, kv_token_bytes=0, state_bytes=0))
    assert seconds._decode_bytes(many, 1e4, 0) == pytest.approx(42_189_514_752 - table, rel=1e-6)
    few = seconds._decode_bytes(many, 16, 0)  # 64 sequences meet 94 % of the experts
    assert (few - 42_189_514_752 + table) / 32.2e9 == pytest.approx(-0.06, abs=0.005)


def test_the_training_floor_is_all_devices_at_their_peak() -> None:
    cfg = compose(["experiment=nemotron3_nano_4b", "optim.cpu_offload=false"])
    model, hardware = read_model(cfg)[0], Hardware.named("h200")
    found = make_plan(cfg, model, hardware).step
    (train,) = [phase for phase in found.phases if phase.phase == "train"]
    mean = found.num_tokens // cfg.rollout.num_samples
    prompt_len = int(hardware.assumed.mean_prompt_tokens)
    needed = forward_flops(model, mean) - output_flops(model, prompt_len)
    flops = 3 * cfg.rollout.num_samples * needed
    assert train.floor_s > flops / (8 * 989e12)
    slower = replace(hardware, assumed=replace(hardware.assumed, train_mfu=0.125))
    (other,) = [p for p in make_plan(cfg, model, slower).step.phases if p.phase == "train"]
    assert other.floor_s == train.floor_s
    assert other.parts["computing"] == pytest.approx(2 * train.parts["computing"])


def test_even_stages_wait_as_the_published_bubble_says() -> None:
    """PP4 with 32 micro-batches of one length: 3 of 35."""
    cfg = compose(["experiment=nemotron3_ultra", "train.max_tokens_per_micro_batch=10240"])
    hardware = Hardware.named("h200")
    steady = replace(hardware.assumed, mean_response_share=1.0, mean_prompt_tokens=2048)
    network = replace(hardware.facts, network_bytes_s=1e15, nvlink_bytes_s=1e15)
    calm = replace(hardware, assumed=steady, facts=network)
    step = make_plan(cfg, read_model(cfg)[0], calm).step
    assert step.num_micro_batches == 64 and step.in_flight == (4, 3, 2, 1)
    # and a little more: the output layer makes the last stage longer
    assert 3 / 35 < step.bubble < 3 / 35 + 0.05


# ------------------------------------------------------------------ the command


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.run(["plan", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_shows_and_writes_everything(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    files = [tmp_path / "plan.json", tmp_path / "plan.html"]
    code, out, _ = run(
        capsys, "experiment=nemotron3_ultra", "--json", str(files[0]), "--html", str(files[1])
    )
    assert code == 0 and "549,308,968,960" in out and "nemotron3_ultra fits" in out
    assert all(f"{word} " in out for word in ("generate", "score", "train", "sync", "save"))
    hardware = Hardware.named("h200")
    for section, name, value, meaning in hardware.lines():
        assert name in out and f"{value:,g}" in out and meaning in out
        assert section in ("facts", "assumed")
    assert out.count("ASSUMPTION") == len(Hardware.named("h200").assumed.__dataclass_fields__)
    written: dict[str, Any] = json.loads(files[0].read_text())
    assert written["fits"] and written["num_params"] == 549_308_968_960
    assert written["roles"][0]["num_params"] == 5_549_973_632
    assert written["step"]["estimate_s"] > written["step"]["floor_s"] > 0
    assert "5,549,973,632" in files[1].read_text()


def test_it_needs_no_torch() -> None:
    code = """
import sys
from miles_lite import cli
cli.run(["plan", "experiment=nemotron3_super"])
print("heavy:", *sorted({"torch", "megatron", "ray", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CONFIGS.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1].strip() == "heavy:"


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=nemotron3_nano_30b", "parallel.ep=2"],
        ["experiment=nemotron3_nano_4b", "rollout.engine.sglang.mem_fraction_static=0.97"],
        [
            "experiment=nemotron3_nano_4b",
            "train.megatron.recompute_granularity=null",
            "train.max_tokens_per_micro_batch=65536",
        ],
        [
            "experiment=tiny",
            "rollout.max_response_tokens=2048",
            "rollout.engine.max_running=4096",
            "data.max_prompt_tokens=2048",
        ],
    ],
)
def test_the_change_that_is_named_makes_it_fit(
    capsys: pytest.CaptureFixture[str], overrides: list[str]
) -> None:
    code, _, err = run(capsys, *overrides)
    assert code == 2 and "does not fit" in err and "GB missing" in err
    way_out = err.strip().splitlines()[-1].removeprefix("it fits with ").split()
    assert way_out
    code, out, _ = run(capsys, *overrides, *way_out)
    assert code == 0 and " fits; " in out


def test_what_no_layout_can_hold_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "experiment=nemotron3_ultra_64gpu", "parallel.ep=8", "--gpus", "32")
    assert code == 2 and "phase " in err and "ranks " in err and "host " in err
    assert "no layout of 32 such devices" in err


def test_other_hardware_and_other_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "experiment=nemotron3_ultra", "--gpus", "256", "--gpu", "b200")
    assert code == 0 and "256 devices of 32 hosts (b200)" in out
    code, _, err = run(capsys, "experiment=nemotron3_ultra", "--gpus", "100")
    assert code == 2 and "100 devices are no multiple" in err and "--search" in err
    code, _, err = run(capsys, "experiment=nemotron3_ultra", "--gpu", "h300")
    assert code == 2 and "b200, h100, h200, laptop" in err


def test_own_hardware_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text((CONFIGS / "hardware/h200.yaml").read_text().replace("141e9", "96e9"))
    assert Hardware.named(str(file)).facts.device_bytes == 96e9
    file.write_text(file.read_text().replace("train_mfu", "train_muf"))
    with pytest.raises(ConfigError, match=r"hardware\.assumed\.train_muf"):
        Hardware.named(str(file))


def test_a_checkpoint_that_differs_from_the_sizes_shipped(tmp_path: Path) -> None:
    raw = json.loads((CONFIGS / "model/nemotron3_nano_4b/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"vocab_size": 131_200}))
    cfg = compose(["experiment=nemotron3_nano_4b", f"model.path={tmp_path}"])
    model, said = read_model(cfg)
    assert model.vocab_size == 131_200 and len(said) == 1 and "vocab_size = 131200" in said[0]
    with pytest.raises(ConfigError, match=r"plan_path=FOLDER"):
        read_model(compose(["experiment=tiny", "model.path=/nowhere"]))


# ------------------------------------------------------------------ search


def test_a_search_finds_layouts_that_fit_in_order_of_time() -> None:
    cfg = compose(["experiment=nemotron3_nano_4b"])
    model, hardware = read_model(cfg)[0], Hardware.named("h200")
    found = search.search(cfg, model, hardware)
    assert len(found) > 3
    assert [layout.step_s for layout in found] == sorted(layout.step_s for layout in found)
    for layout in found:
        other = plan("experiment=nemotron3_nano_4b", *layout.changes)
        assert other.fits and other.num_devices == 8
        assert other.step.estimate_s == pytest.approx(layout.step_s)
    assert () in [layout.changes for layout in found]  # the layout as it is, to compare


def test_changes_are_overrides_that_lead_there() -> None:
    cfg = compose(["experiment=nemotron3_nano_4b"])
    candidates: list[Config] = [*search._settings(cfg), with_devices(cfg, 16)]
    for other in candidates:
        assert compose(["experiment=nemotron3_nano_4b", *search.changes(cfg, other)]) == other


# ------------------------------------------------------------------ measured against planned


def test_measured_over_planned() -> None:
    cfg = compose(["experiment=tiny"])
    expected = Expected.of(cfg, read_model(cfg)[0])
    name = "memory/generate/rollout_cache_bytes"
    measured = {name: 2.0 * expected.num_bytes[name], "memory/sync/trainer_grads_bytes": 5.0}
    found = expected.against({**measured, "perf/step_time": expected.seconds["perf/step_time"]})
    assert found == {
        f"plan/{name}": 2.0,
        "plan/memory/sync/trainer_grads_bytes": 5.0,  # none was planned
        "plan/perf/step_time": 1.0,
    }
