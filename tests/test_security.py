"""What SECURITY.md promises: of the source, and of a real run while it lasts and afterwards."""

from __future__ import annotations

import ast
import os
import pickle
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path

import psutil
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from miles_lite.cluster.rendezvous import open_store
from miles_lite.redact import HIDDEN, redacted, redacted_settings
from miles_lite.unpickle import unpickle
from tests.listeners import LOOPBACK, listeners

PROJECT = Path(__file__).resolve().parent.parent
CODE = ("miles_lite", "rewards", "scripts", "tools")

# ------------------------------------------------------------------ the source

FORBIDDEN = {
    *"eval exec compile __import__ os.system os.popen tempfile.mktemp".split(),
    *"pickle.load pickle.loads pickle.Unpickler marshal.load marshal.loads shelve.open".split(),
    *"dill.load dill.loads cloudpickle.load cloudpickle.loads joblib.load".split(),
    *"yaml.load yaml.unsafe_load yaml.full_load".split(),
}
# Each with the reason why nothing foreign can reach it.
ALLOWED = {
    ("miles_lite/unpickle.py", "pickle.Unpickler"): "names nothing but what its reader lists",
    ("miles_lite/trainer/megatron/cpu_compat.py", "exec"): "the source of the installed megatron",
}


def dangers(source: str) -> Iterator[str]:
    """What a file does that hands control to data."""
    tree = ast.parse(source)
    origin = {  # of names that were imported from somewhere
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    } | {
        alias.asname: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.asname
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield from (ast.unparse(b) for b in node.bases if ast.unparse(b) in FORBIDDEN)
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        first, dot, rest = name.partition(".")
        name = origin.get(first, first) + dot + rest
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in FORBIDDEN:
            yield name
        if name == "torch.load" and given.get("weights_only") != "True":
            yield "torch.load without weights_only=True"
        for word in ("shell", "allow_pickle", "trust_remote_code"):
            if given.get(word, "False") != "False":
                yield f"{word}={given[word]}"
        for keyword in node.keywords:  # options as a mapping, for a call elsewhere
            if keyword.arg is None and "trust_remote_code" in ast.unparse(keyword.value):
                yield "trust_remote_code"


def test_nothing_that_a_file_a_model_or_the_network_says_is_executed() -> None:
    found = {
        (str(path.relative_to(PROJECT)), danger)
        for folder in CODE
        for path in (PROJECT / folder).rglob("*.py")
        for danger in dangers(path.read_text())
    }
    assert found == set(ALLOWED)


@pytest.mark.parametrize(
    "source",
    [
        "eval(x)",
        "from pickle import loads as f\nf(x)",
        "import pickle as p\np.load(x)",
        "import torch\ntorch.load(x)",
        "torch.load(x, weights_only=False)",
        "np.load(x, allow_pickle=True)",
        "subprocess.run(x, shell=True)",
        "AutoTokenizer.from_pretrained(x, trust_remote_code=True)",
        "yaml.load(x)",
        "class U(pickle.Unpickler): ...",
    ],
)
def test_a_planted_danger_is_seen(source: str) -> None:
    assert list(dangers(source))


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.target,)


def test_a_pickle_that_calls_is_refused_before_it_does(tmp_path: Path) -> None:
    hostile = pickle.dumps({"weights": Hostile(tmp_path / "executed")})
    with pytest.raises(pickle.UnpicklingError):
        unpickle(hostile, {"pathlib.Path", "pathlib.PosixPath"}, "a test")
    assert not (tmp_path / "executed").exists()
    assert unpickle(pickle.dumps([1, frozenset({2})]), {"builtins.frozenset"}, "a test") == [1, {2}]


def test_a_meeting_point_listens_where_it_was_told_to() -> None:
    store = open_store("127.0.0.1", 0, True, 5.0)
    found = psutil.Process().net_connections("tcp")
    assert {c.laddr.ip for c in found if c.laddr.port == store.port and not c.raddr} == {
        "127.0.0.1"
    }
    again = open_store("127.0.0.1", store.port, False, 5.0)
    again.set("key", "value")
    assert store.get("key") == b"value"


def test_so_does_one_that_torch_makes_for_sglang() -> None:
    code = """if True:
        import psutil, torch.distributed as dist
        from miles_lite.rollout.sglang import stores
        stores.install()
        dist.init_process_group("gloo", "tcp://127.0.0.1:0", rank=0, world_size=1)
        found = psutil.Process().net_connections("tcp")
        print({c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN})
    """
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120
    )
    assert done.stdout == "{'127.0.0.1'}\n", done.stderr


# ------------------------------------------------------------------ dependencies


def needed(requirements: Iterable[str]) -> set[str]:
    """Names of these and of all below them, as they are installed here."""
    seen, todo = set[tuple[str, str]](), [(Requirement(text), "") for text in requirements]
    while todo:
        wanted, extra = todo.pop()
        if wanted.marker and not wanted.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(wanted.name)
        for inner in {(name, each) for each in ("", *wanted.extras)} - seen:
            seen.add(inner)
            todo += [(Requirement(text), inner[1]) for text in metadata.requires(name) or []]
    return {name for name, _ in seen}


def test_the_lock_has_every_package_that_is_installed_by_it_with_hashes() -> None:
    entries = re.findall(
        r"^([\w.-]+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)",
        (lock := (PROJECT / "scripts/cpu.lock").read_text()),
        re.MULTILINE,
    )
    assert len(entries) == lock.count("==")  # all are pinned, and by hashes
    locked = {canonicalize_name(name): version for name, version, _ in entries}
    pinned = re.findall(
        r"^([\w.-]+)==(\S+)$", (PROJECT / "scripts/constraints-cpu.txt").read_text(), re.MULTILINE
    )
    torch_version = dict(pinned).pop("torch")
    assert locked == {canonicalize_name(n): v for n, v in pinned if n != "torch"}
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    setup = (PROJECT / "scripts/setup.sh").read_text()
    extras = re.findall(r'^extras="(.*)"$', setup, re.MULTILINE)[0].split(",")
    wanted = list(project["project"]["dependencies"])
    for extra in extras:
        wanted += project["project"]["optional-dependencies"][extra]
    found = needed(wanted)
    assert len(found) > 100 and found - locked.keys() == {"torch"}
    for requirement in map(Requirement, [*wanted, *project["build-system"]["requires"]]):
        version = locked.get(canonicalize_name(requirement.name), torch_version)
        assert version in requirement.specifier, requirement


# ------------------------------------------------------------------ secrets


def test_secrets_are_redacted_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "open-sesame")
    for text in (
        "the judge wants open-sesame",
        "http://me:hunter22@host/x",
        "WANDB_API_KEY=abcdef123456",
        "{'password': 'abcdef123456'}",
        "Authorization: Bearer abcdef.123456",
        "key sk-proj-abcdef1234567890abcd was refused",
        "hf_abcdefghijklmnopqrst",
        "http://host/?token=abcdef123456&x=1",
        "PGPASSWORD=abcdef123456",
        "MYSQL_PWD=abcdef123456 REDIS_PASS=abcdef123456 SSHPASS=abcdef123456",
        "OPENAI_API_KEYS=abcdef123456",
    ):
        assert HIDDEN in redacted(text)
        assert not re.search("sesame|hunter|abcdef", redacted(text))
    told = ("2048 tokens", "max_tokens=512", "token=17", "http://host:80/a@b", "key: answer")
    for text in (*told, "PWD=/home/someone", "OLDPWD=/home/someone", "pass=second-one"):
        assert redacted(text) == text
    settings = {"options": {"api_key": "x", "key_env": "JUDGE_API_KEY"}, "max_tokens": 5, "n": None}
    hidden = {"options": {"api_key": HIDDEN, "key_env": "JUDGE_API_KEY"}}
    assert redacted_settings(settings) == settings | hidden


@pytest.mark.parametrize(
    "part", ["-", ".", "_", "a-", "sk-", "hf_", "://", "://a", "a:", "bearer ", "token", "token='"]
)
def test_a_hostile_text_is_redacted_in_linear_time(part: str) -> None:
    """It takes half a second here; in quadratic time a tenth of it took minutes."""
    text = (part * 1_000_000)[:1_000_000]
    begin = time.process_time()
    redacted(text)
    assert time.process_time() - begin < 10


# ------------------------------------------------------------------ a real run

PLANTED = {
    "OPENAI_API_KEY": "sk-planted-0123456789abcdef",
    "HF_TOKEN": "hf_plantedplantedplanted0123",
    "MY_PASSWORD": "planted-in-the-environment",
}
RUN_S = 600  # a minute on a machine that does nothing else
STRANGER = """
import sys
from ray._raylet import Config, GcsClient
Config.initialize("")
print(len(GcsClient(address=sys.argv[1]).get_all_node_info(timeout=20)), "node")
"""


@dataclass
class Observed:
    """A run, and what was seen from outside."""

    folder: Path
    listeners: dict[str, set[str]] = field(default_factory=dict)  # by address, who
    phases: set[str] = field(default_factory=set)
    strangers: tuple[str, ...] = ()  # what Ray said without the token, and with another
    friend: str = ""
    token: str = ""
    token_mode: int = 0
    output: str = ""


def _ask(address: str, env: dict[str, str]) -> str:
    command = [sys.executable, "-c", STRANGER, address]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(command, capture_output=True, text=True, env=clean | env, timeout=120)
    return done.stdout + done.stderr


def _look(seen: Observed, driver: psutil.Process) -> None:
    for process in [driver, *driver.children(recursive=True)]:
        try:
            name = (process.cmdline() or [""])[0].strip()
            environment = process.environ() if "gcs_server" in name else {}
        except psutil.Error:
            continue
        seen.phases.add(name)
        for address, port in listeners(process):
            seen.listeners.setdefault(address, set()).add(name or str(process.cmdline()))
            # not before Ray is up: asking takes its time
            is_up = any(phase.startswith("ray::MegatronWorker") for phase in seen.phases)
            if environment and is_up and not seen.friend:
                path = Path(environment["RAY_AUTH_TOKEN_PATH"])
                seen.token, seen.token_mode = path.read_text(), path.stat().st_mode & 0o777
                where, empty = f"{address.removeprefix('::ffff:')}:{port}", str(seen.folder.parent)
                token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
                wrong = token | {"RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_TOKEN": "0" * 64}
                none = {"RAY_AUTH_MODE": "disabled", "HOME": empty}
                with ThreadPoolExecutor() as pool:
                    seen.friend, *strangers = pool.map(partial(_ask, where), [token, none, wrong])
                seen.strangers = tuple(strangers)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Observed:
    folder = tmp_path_factory.mktemp("secure")
    seen = Observed(folder / "run")
    reward = folder / "planted.py"
    reward.write_text("def planted(response, label, *, api_key, url): return len(response) % 2\n")
    words = f"""train.num_steps=1 rollout.num_prompts=4 rollout.samples_per_prompt=4
        train.global_batch=8 log.folder={folder} log.name=run log.wandb_project=p
        reward.file={reward} reward.function=planted +reward.options.api_key=planted-as-an-option
        +reward.options.url='http://me:planted-in-a-url@localhost/'""".split()
    command = [sys.executable, "-m", "miles_lite.cli", "train", "experiment=tiny", *words]
    log = folder.parent / f"{folder.name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=output,
            stderr=output,
            env={**os.environ, **PLANTED, "OMP_NUM_THREADS": "1"},
        )
    deadline = time.monotonic() + RUN_S
    while process.poll() is None:
        if time.monotonic() > deadline:
            process.kill()
        try:
            _look(seen, psutil.Process(process.pid))
        except psutil.NoSuchProcess:
            break
        time.sleep(0.2)
    seen.output = log.read_text()
    assert process.wait() == 0, seen.output[-3000:]
    return seen


@pytest.mark.slow
@pytest.mark.timeout(RUN_S + 60)
def test_everything_listens_on_loopback(run: Observed) -> None:
    assert {"ray::MegatronWorker.step", "ray::EngineRank.poll"} <= run.phases  # we looked often
    assert any("gcs_server" in name for names in run.listeners.values() for name in names)
    assert run.listeners.keys() <= LOOPBACK, run.listeners


@pytest.mark.slow
@pytest.mark.timeout(RUN_S + 60)
def test_ray_of_a_run_talks_to_nobody_else(run: Observed) -> None:
    assert run.friend == "1 node\n"
    assert len(run.strangers) == 2
    for said in run.strangers:
        assert not re.search(r"\d node", said) and re.search(r"(?i)unauthenticated", said), said
    assert len(run.token) == 64 and run.token_mode == 0o600


@pytest.mark.slow
@pytest.mark.timeout(RUN_S + 60)
def test_no_secret_lies_in_the_run_folder_or_the_output(run: Observed) -> None:
    secrets = [*PLANTED.values(), "planted-as-an-option", "planted-in-a-url", run.token]
    files = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    assert len(files) > 8 and any(path.suffix == ".wandb" for path in files)
    for secret in secrets:
        assert secret not in run.output
        assert [str(path) for path, data in files.items() if secret.encode() in data] == []
    assert HIDDEN in (run.folder / "config.yaml").read_text()
    assert HIDDEN in (run.folder / "environment.json").read_text()
