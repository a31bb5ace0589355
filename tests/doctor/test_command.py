"""`miles-lite doctor` from the command line: lines, JSON, exit status, and faults of files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from miles_lite import cli
from miles_lite.compose import CONFIGS
from miles_lite.intact import HASH

TINY = CONFIGS / "model" / "tiny"


def doctor(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, findings by name, stderr."""
    code = cli.run(["doctor", "--json", "-", *words])
    told = capsys.readouterr()
    return code, {f["name"]: f for f in json.loads(told.out)["findings"]}, told.err


def offline(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any], str]:
    return doctor(capsys, "experiment=tiny", "--no-live", *words)


@pytest.mark.slow
def test_tiny_passes_everything(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, found, lines = doctor(capsys, "experiment=tiny", f"log.folder={tmp_path / 'runs'}")
    bad = {n: f for n, f in found.items() if f["status"] in ("failed", "warning")}
    assert (code, bad) == (0, {})
    live = "processes, weight round trip, answers, drift, learning rate 0, packing, second sync"
    assert {name: found[name]["status"] for name in live.split(", ")} == dict.fromkeys(
        live.split(", "), "ok"
    )
    assert found["gpus"]["status"] == "skipped"
    assert "no bit of any weight changed" in lines and "bound 0.0001" in lines
    assert not (tmp_path / "runs").exists(), "a check leaves nothing behind"


@pytest.mark.slow
def test_a_bound_of_0_is_exceeded(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ("experiment=tiny", f"log.folder={tmp_path}", "--max-drift", "0")
    code, found, err = doctor(capsys, *words, "parallel.tp=2", "parallel.dp=1")
    assert code == 1 and "checks failed: drift" in err
    assert found["drift"]["status"] == "failed" and found["learning rate 0"]["status"] == "ok"


def test_without_live_the_rest_is_skipped_with_the_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, found, lines = offline(capsys)
    assert code == 0
    assert found["drift"] | {"hosts": []} == {
        **{"name": "drift", "status": "skipped", "detail": "--no-live", "fix": "", "hosts": []}
    }
    assert found["model files"]["detail"].startswith("141 tensors")
    assert "answers in <|im_end|>" in found["tokenizer"]["detail"]
    assert "a right answer as \\boxed{} scores 1" in found["reward"]["detail"]
    printed = [line for line in lines.splitlines() if line[:9].strip() in ("ok", "skipped")]
    assert len(printed) >= len(found)


@pytest.mark.parametrize(
    ("words", "name", "told"),
    [
        (["data.template_kwargs.enable_thinking=false"], "reward", "deepscaler can never be won"),
        (["reward.file=rewards/exact.py", "reward.function=exact", "+reward.options.marker=@@"],
         "reward", "no more than an empty one"),
        (["data.train=nowhere.jsonl"], "data", "nowhere.jsonl"),
        (["train.max_tokens_per_micro_batch=20000000"], "plan", "missing"),
        (["parallel.pp=3", "parallel.dp=1"], "experiment", "parallel."),
        (["cluster.hardware=abacus"], "experiment", "'abacus' is neither a file nor one of"),
        (["cluster.device=cuda"], "gpus", "2 wanted, and there is no nvidia-smi"),
    ],
)  # fmt: skip
def test_faults_of_the_configuration(
    capsys: pytest.CaptureFixture[str], words: list[str], name: str, told: str
) -> None:
    code, found, err = offline(capsys, *words)
    assert code == 1 and name in err.splitlines()[-1]
    assert found[name]["status"] == "failed" and told in found[name]["detail"]
    assert found[name]["fix"] and found["drift"]["status"] == "skipped"


def _copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def test_a_truncated_shard(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shard = _copied(tmp_path) / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    code, found, _ = offline(capsys, f"model.path={shard.parent}")
    assert code == 1 and "is truncated at offset" in found["model files"]["detail"]


def test_contents_that_changed_under_a_manifest(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = _copied(tmp_path)
    manifest = {"hash": HASH, "tensors": {"backbone.norm_f.weight": {"hf": "0" * 32}}, "files": {}}
    (model / "manifest.json").write_text(json.dumps(manifest))
    code, found, _ = offline(capsys, f"model.path={model}")
    assert code == 1 and "is not what manifest.json says" in found["model files"]["detail"]


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer.json"])
def test_a_model_without_its_tokenizer(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, file: str
) -> None:
    model = _copied(tmp_path)
    (model / file).unlink()
    code, found, _ = offline(capsys, f"model.path={model}")
    assert code == 1 and found["tokenizer"]["status"] == "failed"
    assert found["model files"]["status"] == "ok" and found["reward"]["status"] == "skipped"


def test_no_model_at_all(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, found, _ = offline(capsys, f"model.path={tmp_path}")
    assert code == 1 and "has no config.json" in found["experiment"]["detail"]


def test_a_host_alone_needs_no_experiment(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "found.json"
    code = cli.run(["doctor", "--json", str(file)])
    lines = capsys.readouterr().out.splitlines()
    record = json.loads(file.read_text())
    assert code == 0 and record["experiment"] == ""
    assert len(record["findings"]) == len(lines) == 10 == sum(record["counts"].values())


def test_usage_and_experiments_nobody_knows_exit_with_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.run(["doctor", "experiment=nobody"]) == 2
    with pytest.raises(SystemExit) as stopped:
        cli.run(["doctor", "--ports", "many"])
    assert stopped.value.code == 2
    capsys.readouterr()
