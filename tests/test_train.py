"""Whole runs from the command line: real Ray, real Megatron, real engines, real files."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from miles_lite.compose import CONFIGS
from miles_lite.dashboard import PANELS
from miles_lite.report import sections
from miles_lite.report.runs import read_runs
from miles_lite.run import read_metrics, read_samples
from miles_lite.stop import ENDED_ITSELF
from tests import wandb_file

COMMAND = [sys.executable, "-m", "miles_lite.cli", "train", "experiment=tiny"]
SMALL = ["rollout.num_prompts=8", "rollout.samples_per_prompt=4", "train.global_batch=16"]

CHANGED = ["algo.eps_clip_high=0.3", "eval.temperature=0"]

# names that dashboards of users rely on
PROMISED = """
rollout/raw_reward rollout/rewards rollout/advantages rollout/log_probs rollout/rollout_log_probs
rollout/response_len/mean rollout/response_len/median rollout/response_len/max
rollout/response_len/min rollout/truncated_ratio rollout/repetition_frac rollout/total_lengths
rollout/zero_std/all_zero_percentage rollout/zero_std/all_one_percentage rollout/taught_ratio
rollout/weight_version/mean rollout/weight_version/mixed_version_ratio
train/loss train/pg_loss train/entropy_loss train/pg_clipfrac train/ppo_kl train/ess_ratio
train/train_rollout_logprob_abs_diff train/train_rollout_kl train/grad_norm train/lr-pg_0
train/nonfinite_logprobs train/step train/first_log_ratio train/token_entropy
perf/rollout_time perf/step_time perf/train_time perf/log_probs_time perf/actor_train_time
perf/actor_train_tok_per_s perf/update_weights_time perf/rollout_tokens_per_s
drift/decode_vs_prefill drift/prefill_vs_trainer drift/decode_vs_trainer drift/decode_shift
drift/version_gap sync/checksums
reward/invalid_ratio sync/bytes memory/generate/rollout_cache_bytes memory/train/trainer_grads_bytes
memory/generate/driver_resident_bytes memory/train/trainer_resident_bytes
memory/sync/rollout_resident_bytes
""".split()


def launch(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, f"log.folder={folder}", "log.name=run", *SMALL, *overrides],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def finished(process: subprocess.Popen[str], deadline_s: float = 240) -> str:
    """Its output; kills everything it started if it does not end."""
    try:
        return process.communicate(timeout=deadline_s)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def train(folder: Path, *overrides: str) -> Path:
    process = launch(folder, *overrides)
    output = finished(process)
    assert process.returncode == 0, output[-4000:]
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["train.num_steps=2", "log.wandb_project=p", *CHANGED]
    return train(tmp_path_factory.mktemp("train"), *words)


@pytest.mark.slow
def test_metrics_are_there_under_their_names(run: Path) -> None:
    steps = read_metrics(run)
    for step in (0, 1):
        missing = [name for name in PROMISED if name not in steps[step]]
        assert not missing
        assert steps[step]["train/train_rollout_logprob_abs_diff"] <= 1e-4
        assert steps[step]["train/nonfinite_logprobs"] == 0
        assert 0 <= steps[step]["train/first_log_ratio"] <= 1e-4
        assert steps[step]["rollout/weight_version/mean"] == step
    assert steps[1]["train/step"] == 3  # two updates a step
    assert "eval/eval" in steps[0] and "eval/eval" in steps[2]


@pytest.mark.slow
def test_a_run_that_broke_leaves_alarm_and_samples(tmp_path: Path) -> None:
    """The first update of its step, at a senseless learning rate, makes a NaN of the second."""
    words = ["train.num_steps=2", "data.eval=''", "optim.lr=1e38", "optim.warmup_updates=0"]
    process = launch(tmp_path, *words)
    output = finished(process)
    assert process.returncode == 1 and "a loss is NaN or infinite" in output
    (read,) = read_runs([tmp_path / "run"])
    (told,) = sections.alarms([read])
    assert (told["name"], told["when"]) == ("not_finite", "step 0")
    assert "train/loss nan" in told["message"] and "train/loss nan" in output
    assert read.outcome.startswith("failed: NonFiniteError")
    samples = list(read_samples(tmp_path / "run" / "samples" / "step_000000.jsonl.gz"))
    assert len(samples) == 32 and all(sample.trainer_logprobs for sample in samples)


@pytest.mark.slow
def test_wandb_has_every_metric_every_panel_and_the_settings(run: Path) -> None:
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    logged: dict[int, dict[str, Any]] = {}
    for line in wandb_file.history(file):
        step = line.get("rollout/step", line.get("eval/step"))
        logged.setdefault(step, {}).update(line)
    ours = read_metrics(run)
    for step, metrics in ours.items():
        told = {name: value for name, value in metrics.items() if math.isfinite(value)}
        assert {name: logged[step][name] for name in told} == pytest.approx(told)
    axes = wandb_file.axes(file)
    assert axes["rollout/*"] == axes["perf/*"] == axes["memory/*"] == "rollout/step"
    assert axes["train/*"] == "train/step" and axes["eval/*"] == "eval/step"
    drawn = {name for panels in PANELS.values() for names in panels.values() for name in names}
    assert drawn <= set(ours[0]) | set(ours[1])
    config = wandb_file.config(file)
    assert config["algo"]["eps_clip_high"] == 0.3 and "torch" in str(config["environment"])
    assert "rollout/samples/nrows" in logged[0]


@pytest.mark.slow
def test_an_evaluation_of_the_run_or_of_its_export_is_the_one_in_training(
    run: Path, tmp_path: Path
) -> None:
    """Answers, log-probs and verdicts, to the bit; only the version counts from 0."""
    found = []
    for model in (f"{run}@2", run / "hf"):
        words = [*COMMAND[:3], "eval", "--model", str(model), "experiment=tiny", *CHANGED[1:]]
        done = subprocess.run(
            [*words, f"log.folder={tmp_path}", f"log.name=eval{len(found)}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-4000:]
        folder = tmp_path / f"eval{len(found)}"
        [file] = (folder / "eval" / "eval").iterdir()
        summary = json.loads((folder / "summary.json").read_text())
        found.append((list(read_samples(file)), summary["metrics"]))
        assert "pass@1" in done.stdout and str(folder) in done.stdout
    [in_training] = (run / "eval" / "eval").glob("step_000002*")
    of_run = [replace(s, step=0, version=0) for s in read_samples(in_training)]
    assert found[0][0] == found[1][0] == of_run
    names = found[0][1]
    assert names == {name: read_metrics(run)[2][name] for name in names}


@pytest.mark.slow
def test_each_party_holds_what_its_phase_allows(run: Path) -> None:
    held = read_metrics(run)[1]
    assert held["memory/generate/rollout_cache_bytes"] > 0
    assert held["memory/generate/trainer_grads_bytes"] == 0
    assert held["memory/train/rollout_cache_bytes"] == 0
    assert held["memory/train/trainer_grads_bytes"] > 0
    assert held["memory/sync/rollout_cache_bytes"] == held["memory/sync/trainer_grads_bytes"] == 0


@pytest.mark.slow
def test_measured_bytes_are_the_planned_ones(run: Path) -> None:
    """To the byte: weights, gradients, optimizer and caches of all ranks in every phase."""
    measured = {
        name: num_bytes
        for name, num_bytes in read_metrics(run)[1].items()
        if name.startswith("memory/") and "_resident_" not in name
    }
    plan = read_metrics(run)[1]
    assert len(measured) == 15
    for name, num_bytes in measured.items():
        assert plan[f"plan/{name}"] == (1.0 if num_bytes else 0.0), name
    times = [name for name in plan if name.startswith("plan/perf/")]
    assert sorted(times) == [
        "plan/perf/rollout_time",
        "plan/perf/step_time",
        "plan/perf/train_time",
        "plan/perf/update_weights_time",
    ]


@pytest.mark.slow
def test_samples_are_kept_with_both_sides_logprobs(run: Path) -> None:
    samples = list(read_samples(run / "samples" / "step_000001.jsonl.gz"))
    assert len(samples) == 8 * 4
    for sample in samples:
        assert sample.version == 1 and len(sample.tokens) == len(sample.logprobs)
        assert sample.trainer_logprobs == pytest.approx(sample.logprobs, abs=1e-4)
        assert len(sample.entropies) == len(sample.tokens) and min(sample.entropies) >= -1e-6


@pytest.mark.slow
def test_transformers_loads_the_export_and_agrees_with_the_engines(run: Path) -> None:
    """The last evaluation was answered by the weights that were exported, token by token."""
    from transformers import AutoTokenizer, NemotronHForCausalLM

    loaded: Any = NemotronHForCausalLM.from_pretrained(
        run / "hf", dtype=torch.float32, output_loading_info=True
    )
    model, info = loaded
    assert not info["missing_keys"] and not info["mismatched_keys"]
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    tokenizer = AutoTokenizer.from_pretrained(run / "hf")
    for sample in list(read_samples(run / "eval" / "eval" / "step_000002.jsonl.gz"))[:10]:
        prompt = tokenizer.encode(sample.prompt, add_special_tokens=False)
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *sample.tokens]])).logits[0].float()
        logp = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        chosen = logp.gather(1, torch.tensor(sample.tokens)[:, None])[:, 0]
        assert list(sample.logprobs) == pytest.approx(chosen.tolist(), abs=1e-4)
        assert list(sample.tokens) == logp.argmax(-1).tolist()  # evaluation is greedy


@pytest.mark.slow
def test_the_drift_of_a_sound_run_is_rounding(run: Path) -> None:
    for metrics in (read_metrics(run)[0], read_metrics(run)[1]):
        assert metrics["drift/decode_vs_trainer"] <= 1e-4 and metrics["drift/version_gap"] == 0
        assert 0 < metrics["drift/decode_vs_prefill"] <= 1e-4
    done = subprocess.run(
        [sys.executable, "-m", "miles_lite.cli", "drift", str(run)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "rounding: " in done.stdout
    told = json.loads((run / "drift.json").read_text())
    assert [cause["name"] for cause in told["causes"]] == ["rounding"]
    assert told["control"] == {"tensors_moved": 0, "logprobs_moved": 0.0}
    assert told["tensors"]["compared"] > 50 and told["tensors"]["differ"] == []


@pytest.mark.slow
def test_the_export_changed_and_carries_mtp(run: Path) -> None:
    from safetensors.torch import load_file

    from miles_lite.compose import compose

    before = load_file(compose(["experiment=tiny"]).model.path / "model.safetensors")
    after = load_file(run / "hf" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before if n.startswith("mtp."))
    changed = [n for n in before if not torch.equal(before[n], after[n])]
    assert len(changed) > len(before) / 2
    assert not any(n.endswith("e_score_correction_bias") for n in changed)


@pytest.mark.slow
def test_summary_and_configuration_are_in_the_folder(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["outcome"] == "finished" and summary["num_steps"] == 2
    told = {"reward_first", "reward_last", "eval/eval before", "eval/eval after", "drift_max"}
    assert told <= set(summary)
    assert "eps_clip_high: 0.3" in (run / "config.yaml").read_text()
    assert json.loads((run / "environment.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.tp=2", "parallel.dp=1", "rollout.engine.dp=1"],
        [
            *("parallel.tp=2", "parallel.pp=2", "rollout.engine.num_engines=2"),
            *("model.dtype=bf16", "algo.routing_replay=true"),
        ],
    ],
    ids=["tp2", "tp2-pp2-dp2-two-engines-bf16-replay"],
)
def test_other_layouts_run(tmp_path: Path, layout: list[str]) -> None:
    metrics = read_metrics(train(tmp_path, "train.num_steps=1", "data.eval=''", *layout))[0]
    drift = metrics["train/train_rollout_logprob_abs_diff"]
    assert drift <= (0.1 if "model.dtype=bf16" in layout else 1e-4)
    if "algo.routing_replay=true" in layout:
        assert 0 < metrics["train/routing_flip_rate"] < 0.05


@pytest.mark.slow
def test_routing_replay_with_dp_attention_and_from_a_checkpoint(tmp_path: Path, run: Path) -> None:
    """Latent experts over EP 2 on both sides, DP attention 2; off, there is no trace of it."""
    words = ["algo.routing_replay=true", "data.eval=''"]
    train(tmp_path, "train.num_steps=1", *words)
    folder = train(tmp_path, "train.num_steps=2", *words)
    steps, off = read_metrics(folder), read_metrics(run)
    for step in (0, 1):
        drift = "train/train_rollout_logprob_abs_diff"
        told = {name for name in steps[step] if name.startswith((drift, "train/routing"))}
        assert told - set(off[step]) == {
            "train/routing_flip_rate",
            f"{drift}_replayed",
            f"{drift}_no_replay",
        }
        assert steps[step]["train/routing_flip_rate"] == 0  # fp32
        assert steps[step][drift] <= 1e-4 and steps[step][f"{drift}_no_replay"] <= 1e-4
    first = "samples/step_000000.jsonl.gz"
    ours, theirs = list(read_samples(folder / first)), list(read_samples(run / first))
    assert [s.tokens for s in ours] == [s.tokens for s in theirs]


@pytest.mark.slow
def test_same_seed_same_run(tmp_path: Path, run: Path) -> None:
    """Tokens, rewards and losses of two runs are the same, to the bit."""
    again = train(tmp_path, "train.num_steps=2", *CHANGED)
    for step in (0, 1):
        name = f"samples/step_{step:06d}.jsonl.gz"
        ours, theirs = list(read_samples(run / name)), list(read_samples(again / name))
        assert [s.tokens for s in ours] == [s.tokens for s in theirs]
        assert ours == theirs
        first, second = read_metrics(run)[step], read_metrics(again)[step]
        for key in ("train/loss", "train/grad_norm", "rollout/raw_reward"):
            assert first[key] == second[key], key


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_with_its_name(tmp_path: Path) -> None:
    process = launch(tmp_path, "train.num_steps=1000", "data.eval=''")
    try:
        victim = wait_for_training(process, tmp_path / "run", 180)
        os.kill(victim, signal.SIGKILL)
        output = finished(process, 60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 1
    assert "trainer rank" in output, output[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["outcome"] == "failed" and "trainer rank" in summary["error"]


@pytest.mark.slow
def test_a_reward_that_is_never_won_ends_the_run(tmp_path: Path) -> None:
    """It could be won, so nothing refused it; but this model never writes "Answer:"."""
    dapo = f"reward.file={CONFIGS.parent / 'rewards/dapo_math.py'}"
    words = [dapo, "reward.function=dapo_math", "reward.max_dead_steps=2", "data.eval=''"]
    process = launch(tmp_path, "train.num_steps=50", *words)
    output = finished(process)
    assert process.returncode == ENDED_ITSELF
    told = " ".join(output.split())
    assert "2 steps in a row taught nothing" in told, output[-3000:]
    assert "rewards between -1 and -1" in told and "miles-lite reward-audit" in told
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["outcome"] == "failed" and "taught nothing" in summary["error"]


@pytest.mark.slow
def test_an_alarm_may_end_the_run_with_all_saved(tmp_path: Path) -> None:
    words = ["alarms.drift=1e-12", "alarms.stop=[drift]", "data.eval=''"]
    process = launch(tmp_path, "train.num_steps=50", *words)
    output = finished(process)
    assert process.returncode == ENDED_ITSELF
    told = " ".join(output.split())
    assert "WARNING drift at step 0: engine and trainer disagree by" in told, output[-3000:]
    assert "miles-lite train: drift at step 0" in told
    assert (tmp_path / "run" / "checkpoints" / "step_000001").is_dir()
    assert read_metrics(tmp_path / "run")[0]["alarms/drift"] == 1.0


@pytest.mark.slow
def test_answers_without_verdict_are_drawn_again(tmp_path: Path) -> None:
    reward = tmp_path / "moody.py"
    reward.write_text(
        "import os, zlib\n"
        "def moody(response, label):\n"
        "    if zlib.crc32(response.encode()) % 4 == 0: os._exit(1)\n"
        "    return float(f'boxed{{{label}}}' in response)\n"
    )
    words = [f"reward.file={reward}", "reward.function=moody", "reward.invalid=resample"]
    folder = train(tmp_path, "train.num_steps=1", "data.eval=''", *words)
    metrics = read_metrics(folder)[0]
    assert metrics["reward/resampled"] > 0
    assert metrics["reward/invalid_ratio"] < 0.1  # else a quarter
    assert metrics["train/train_rollout_logprob_abs_diff"] <= 1e-4


def wait_for_training(process: subprocess.Popen[str], folder: Path, deadline_s: float) -> int:
    """Once a step is logged: the process id of a trainer rank."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end and process.poll() is None:
        log = folder / "metrics.jsonl"
        if log.is_file() and log.stat().st_size:
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):  # ended meanwhile
                    if "MegatronWorker" in " ".join(child.cmdline()):
                        return child.pid
        time.sleep(0.5)
    raise AssertionError(f"no step within {deadline_s} s")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.tp=4"], "parallel.tp = 4 does not divide the 2 Mamba groups"),
        (["algo.eps_clip_hgh=0.3"], "unknown key algo.eps_clip_hgh; did you mean"),
        (["model.path=/no/such/model"], "/no/such/model"),
        (["data.train=/no/such/data.jsonl"], "/no/such/data.jsonl"),
        (["reward.function=deepscalar"], "deepscaler"),
        (["data.template_kwargs.enable_thinking=false"], "reward deepscaler can never be won"),
        (["train.megatron.moe_router_topkk=3"], "did you mean moe_router_topk?"),
        (["train.megatron.num_layers=3"], "contradicts 8"),
    ],
)
def test_errors_of_the_user_end_in_one_line_before_anything_starts(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    process = launch(tmp_path, *overrides)
    output = finished(process, 60)
    assert process.returncode == 2
    assert message in output and "Traceback" not in output
    assert output.count("\n") <= 3, output
    assert not (tmp_path / "run").exists()
