"""A model folder from elsewhere: its Python is never run, its chat template within bounds only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from miles_lite import cli
from miles_lite.compose import CONFIGS
from miles_lite.data.tokenizer import ChatTokenizer
from miles_lite.data.trial import refuse_endless
from miles_lite.rollout.embedded.options import EngineOptions
from miles_lite.serve.live import LiveEngine
from miles_lite.serve.server import Served, application

TINY = CONFIGS / "model" / "tiny"
CLASSES = {
    "config.json": ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer"),
    "tokenizer_config.json": ("AutoTokenizer", "AutoProcessor"),
    "generation_config.json": ("AutoTokenizer",),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One that names code of its own wherever transformers looks for it. Run, it leaves a file."""
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    for file, classes in CLASSES.items():
        named = {name: "evil.Evil" for name in classes}
        if file == "tokenizer_config.json":
            named["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": named}))
    code = f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Evil: pass\n"
    for name in ("evil", "__init__", "conftest", "sitecustomize", "modeling_nemotron_h"):
        (folder / f"{name}.py").write_text(code)
    custom = folder / "custom_generate"
    custom.mkdir()
    (custom / "generate.py").write_text(code)
    return folder


def plan(folder: Path) -> None:
    assert cli.run(["plan", "experiment=tiny", f"model.path={folder}"]) == 0


def check(folder: Path) -> None:
    assert cli.run(["check", "experiment=tiny", f"model.path={folder}"]) == 0


def convert(folder: Path) -> None:
    out = folder.parent / "dist"
    words = ["convert", "hf-to-dist", "--hf", str(folder), "--out", str(out)]
    assert cli.run(words) == 0


def serve(folder: Path) -> None:
    engine = LiveEngine(folder, EngineOptions(max_running=1, max_seq_len=200))
    served = Served("tiny", ChatTokenizer.load(folder), engine, "")
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "1+1"}], "max_tokens": 2}
    with TestClient(application(served)) as client:
        assert client.post("/v1/chat/completions", json=ask).status_code == 200


def train(folder: Path) -> None:
    words = "train.num_steps=1 train.global_batch=8 rollout.num_prompts=4 eval.every=0"
    own = [f"model.path={folder}", f"log.folder={folder.parent / 'runs'}", "log.name=run"]
    sizes = ["rollout.samples_per_prompt=2", *words.split()]
    assert cli.run(["train", "experiment=tiny", *sizes, *own]) == 0


@pytest.mark.parametrize(
    "use", [plan, check, convert, serve, pytest.param(train, marks=pytest.mark.slow)]
)
def test_its_code_is_never_run(
    use: Callable[[Path], None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(folder.parent / "modules"))
    use(folder)
    assert not (folder.parent / "canary").exists()
    assert not list((folder.parent / "modules").rglob("evil.py"))


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (LOOP, "more than 5 s"),
        ("{{ 9 ** (9 ** 9) }}", "more than 5 s"),  # in C, where no signal is heard
        ("{{ 'a' * 10 ** 11 }}", "more than 4 GiB of memory"),
        ("{{ '%1000000000000d' % 1 }}", "more than 4 GiB of memory"),
        ("{% for i in range(9999) %}{{ 'a' * 10000 }}{% endfor %}", "more than 1,000,000 char"),
    ],
)
def test_a_template_without_end_is_refused(template: str, told: str) -> None:
    with pytest.raises(ValueError, match="the chat template in model takes") as caught:
        refuse_endless(template, "model")
    assert told in str(caught.value)


def test_so_is_the_folder_that_has_one(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ 'a' * 10 ** 11 }}")
    with pytest.raises(ValueError, match=f"in {folder} takes .* another chat_template.jinja"):
        ChatTokenizer.load(folder)


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.system('touch canary') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for i in range(10 ** 12) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ " + "(" * 10_000,
        "{% include '/etc/passwd' %}",
        "{% if",
    ],
)
def test_what_jinja_forbids_is_an_error_of_the_prompt(
    template: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder.parent)
    (folder / "chat_template.jinja").write_text(template)
    assert cli.run(["check", "experiment=tiny", f"model.path={folder}"]) == 2
    assert "train.jsonl:1: the chat template makes no prompt of" in capsys.readouterr().err
    assert not (folder.parent / "canary").exists()
