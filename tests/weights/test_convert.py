"""HF to torch_dist and back: to the bit, whoever is killed, and nothing wrong goes through."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from miles_lite import cli
from miles_lite.weights.conversion import TRACKER, Unit, check_resources, done, settle, share
from miles_lite.weights.convert import ToDist, ToHf, verify
from miles_lite.weights.hf import HfCheckpoint, HfWriter
from miles_lite.weights.hf_files import INDEX
from miles_lite.weights.torch_dist import DistCheckpoint

PROJECT = Path(__file__).parents[2]
TINY = PROJECT / "configs/model/tiny"


def make(out: Path, *words: str) -> Path:
    """A random model in several shards, with MTP, tokenizer and the rest of the tiny one."""
    config = TINY / "config.json"
    command = [sys.executable, "tools/make_model.py", str(out), "--config", str(config), *words]
    subprocess.run(command, cwd=PROJECT, check=True, capture_output=True)
    return out


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("sharded") / "hf", "--shard-gb", "0.0003")


@pytest.fixture
def copy(sharded: Path, tmp_path: Path) -> Path:
    """One that a test may damage."""
    return Path(shutil.copytree(sharded, tmp_path / "hf"))


def do(job: ToDist | ToHf) -> None:
    units, _ = job.prepare()
    for unit in units:
        settle(job.out, unit, job.convert(unit))
    job.finish(units)


def to_dist(hf: Path, out: Path, dtype: torch.dtype | None = None) -> Path:
    do(ToDist(hf, out, dtype))
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and path.name != "manifest.json"
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


@pytest.mark.parametrize("hf", ["sharded", "tiny"])
def test_there_and_back_every_file_is_the_same(hf: str, sharded: Path, tmp_path: Path) -> None:
    source = TINY if hf == "tiny" else sharded
    dist = to_dist(source, tmp_path / "dist")
    assert (dist / TRACKER).read_text() == "release\n"
    do(ToHf(dist, source, tmp_path / "back"))
    assert contents(tmp_path / "back") == contents(source)
    if hf == "sharded":
        assert len(list(source.glob("*.safetensors"))) > 3
        assert any(name.startswith("mtp.") for name in weights(source))
    manifests = [json.loads((f / "manifest.json").read_text()) for f in (dist, tmp_path / "back")]
    assert manifests[0]["tensors"] == manifests[1]["tensors"]
    assert manifests[0]["tensors"].keys() == weights(source).keys()
    assert len(list(verify(source, dist))) == len(weights(source))


def test_a_dtype_is_for_all_but_what_stays_fp32(sharded: Path, tmp_path: Path) -> None:
    folder = to_dist(sharded, tmp_path / "dist", torch.bfloat16) / "release"
    dist = DistCheckpoint(folder)
    key = "decoder.layers.0.mixer.{}"
    for name, dtype in (("A_log", torch.float32), ("norm.weight", torch.bfloat16)):
        shape = dist.shapes[key.format(name)]
        assert dist.read(key.format(name), (0,) * len(shape), shape).dtype is dtype
    router = "decoder.layers.1.mlp.router.expert_bias"
    assert dist.read(router, (0,), dist.shapes[router]).dtype is torch.float32


@pytest.mark.parametrize("direction", ["dist", "hf"])
def test_all_is_on_disk_before_what_says_so(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    """Each file before it has its name, and all of them before there are a manifest and a
    tracker."""
    job: ToDist | ToHf = ToDist(sharded, tmp_path / "dist", None)
    if direction == "hf":
        do(job)
        job = ToHf(tmp_path / "dist", sharded, tmp_path / "back")
    synced: dict[int, int] = {}  # inode -> bytes that are on disk
    names: set[Path] = set()  # of what has appeared
    fsync, replace = os.fsync, Path.replace

    def record(handle: int) -> None:
        fsync(handle)
        stat = os.fstat(handle)
        synced[stat.st_ino] = stat.st_size

    def checked(part: Path, path: Path) -> Path:
        assert synced.get(part.stat().st_ino) == part.stat().st_size, path
        if path.name in ("manifest.json", TRACKER):
            for file in job.out.rglob("[!.]*"):
                if file.is_file() and file.parent.name != ".progress":
                    assert synced.get(file.stat().st_ino) == file.stat().st_size, file
        names.add(path)
        return replace(part, path)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(Path, "replace", checked)
    do(job)
    assert job.out / job.last in names


NAMES = ("mamba", "moe", "attention")  # which SGLang 0.5 knows, and transformers too
SPELLINGS = [NAMES, ("linear_attention", "moe", "full_attention")]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("keep_string", [False, True])
def test_the_pattern_is_written_for_everybody(
    copy: Path, tmp_path: Path, spelling: tuple[str, str, str], keep_string: bool
) -> None:
    from transformers import AutoConfig

    config = json.loads((copy / "config.json").read_text())
    words = dict(zip("ME*", spelling, strict=True))
    config["layers_block_type"] = [words[kind] for kind in config["hybrid_override_pattern"]]
    config["mtp_layers_block_type"] = [words[kind] for kind in "*E"]
    if not keep_string:
        del config["hybrid_override_pattern"], config["mtp_hybrid_override_pattern"]
    (copy / "config.json").write_text(json.dumps(config))
    do(ToHf(to_dist(copy, tmp_path / "dist"), copy, tmp_path / "back"))
    written = json.loads((tmp_path / "back/config.json").read_text())
    assert written["hybrid_override_pattern"] == "MEM*EM*E"
    assert written["mtp_hybrid_override_pattern"] == "*E"
    names = dict(zip("ME*", NAMES, strict=True))
    assert written["layers_block_type"] == [names[kind] for kind in "MEM*EM*E"]
    assert written["mtp_layers_block_type"] == ["attention", "moe"]
    read = AutoConfig.from_pretrained(tmp_path / "back")
    assert (read.hybrid_override_pattern, read.mtp_hybrid_override_pattern) == ("MEM*EM*E", "*E")


def test_a_trained_model_spells_it_for_everybody_too(copy: Path, tmp_path: Path) -> None:
    """What a run leaves in hf/; and no manifest of the untrained weights."""
    config = json.loads((copy / "config.json").read_text())
    words = dict(zip("ME*", SPELLINGS[1], strict=True))
    config["layers_block_type"] = [words[kind] for kind in config.pop("hybrid_override_pattern")]
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "manifest.json").write_text("{}")
    writer = HfWriter(tmp_path / "trained", HfCheckpoint(copy))
    writer.create()
    writer.finish()
    written = json.loads((tmp_path / "trained/config.json").read_text())
    assert written["hybrid_override_pattern"] == "MEM*EM*E"
    assert set(written["layers_block_type"]) == set(NAMES)
    assert {path.name for path in (tmp_path / "trained").iterdir()} == {
        path.name for path in copy.iterdir() if path.name != "manifest.json"
    }


def test_everything_else_travels_along(copy: Path, tmp_path: Path) -> None:
    (copy / "assets").mkdir()
    (copy / "assets/card.png").write_bytes(b"picture")
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    (copy / ".cache").mkdir()  # what a download leaves
    do(ToHf(to_dist(copy, tmp_path / "dist"), copy, tmp_path / "back"))
    for folder in (tmp_path / "dist/hf", tmp_path / "back"):
        assert (folder / "assets/card.png").read_bytes() == b"picture"
        assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"
        assert (folder / "tokenizer.json").is_file() and not (folder / ".cache").exists()


# ------------------------------------------------------------------ what does not go through


def shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def drop_tensor(folder: Path) -> None:
    tensors = load_file(shard(folder))
    name = sorted(tensors)[0]
    save_file({k: v for k, v in tensors.items() if k != name}, shard(folder))
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][name]
    (folder / INDEX).write_text(json.dumps(index))


def add_tensor(folder: Path) -> None:
    save_file(load_file(shard(folder)) | {"backbone.extra": torch.ones(2)}, shard(folder))
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["backbone.extra"] = shard(folder).name
    (folder / INDEX).write_text(json.dumps(index))


def integers(folder: Path) -> None:
    tensors = load_file(shard(folder))
    name = sorted(tensors)[0]
    save_file(tensors | {name: tensors[name].to(torch.int32)}, shard(folder))


def half(folder: Path) -> None:
    """One tensor in fp16, all others of the folder in bf16."""
    for file in folder.glob("*.safetensors"):
        save_file({k: v.to(torch.bfloat16) for k, v in load_file(file).items()}, file)
    tensors = load_file(shard(folder))
    name = sorted(tensors)[0]
    save_file(tensors | {name: tensors[name].to(torch.float16)}, shard(folder))


def overlap(folder: Path) -> None:
    """Two tensors of one shape share their bytes."""
    raw = shard(folder).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    by_shape: dict[tuple[int, ...], str] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first = by_shape.setdefault(tuple(entry["shape"]), name)
            entry["data_offsets"] = header[first]["data_offsets"]
    head = json.dumps(header).encode().ljust(length)
    shard(folder).write_bytes(raw[:8] + head[:length] + raw[8 + length :])


def stray(folder: Path) -> None:
    save_file({"backbone.extra": torch.ones(2)}, folder / "more.safetensors")


def reshape(folder: Path) -> None:
    tensors = load_file(shard(folder))
    name = sorted(tensors)[0]
    save_file(tensors | {name: tensors[name].reshape(-1)}, shard(folder))


def edit_config(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return edit


def forget(key: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        del config[key]
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def overwrite(offset: int, data: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        with shard(folder).open("r+b") as file:
            file.seek(offset)
            file.write(data)

    return write


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (drop_tensor, r"disagree; 1 missing: backbone\."),
        (add_tensor, r"disagree; 1 unknown: backbone\.extra"),
        (half, r"'backbone.* is torch.float16: one of them has the wrong dtype"),
        (overlap, r"header at offset 8 is corrupt: tensor 'backbone.* begins at [\d,]+, what is"),
        (stray, r"more\.safetensors is not named by model\.safetensors\.index\.json"),
        (lambda f: shard(f).open("ab").write(b"junk"), r"has 4 bytes after its last tensor, at"),
        (lambda f: os.truncate(f / INDEX, 500), r"index\.json cannot be read"),
        (lambda f: (f / INDEX).write_text('{"weight_map": [1]}'), r"index\.json cannot be read"),
        (lambda f: os.truncate(f / "config.json", 50), r"config\.json: not JSON"),
        (edit_config(model_type="x"), r"config\.json: model_type is 'x'"),
        (forget("vocab_size"), r"config\.json does not say vocab_size"),
        (lambda f: os.truncate(f / "generation_config.json", 5), r"_config\.json: not JSON"),
        (integers, r"tensor 'backbone.* has dtype 'I32', only F32, BF16, F16"),
        (reshape, r"tensor 'backbone.* has shape \(\d+,\), config.json makes it \(\d+, \d+\)"),
        (lambda f: os.truncate(shard(f), 200_000), r"00001-of.* is truncated at offset 200,000"),
        (lambda f: os.truncate(shard(f), 100), r"00001-of-.* header of [\d,]+ bytes does not fit"),
        (overwrite(8, b"\xff\xff"), r"the header at offset 8 is corrupt"),
        (overwrite(0, b"\xff" * 8), r"is truncated or no safetensors file"),
        (lambda f: shard(f).unlink(), r"index\.json names the file 'model-00001-of-"),
        (edit_config(hybrid_override_pattern="MEM*EMME"), r"pattern 'MEM\*EMME' .*disagree; "),
        (edit_config(num_hidden_layers=9), r"num_hidden_layers = 9 but the layer pattern"),
        (edit_config(num_nextn_predict_layers=0), r"unknown: mtp\.layers\.0\."),
    ],
)  # fmt: skip
def test_a_damaged_source_is_named(
    copy: Path, tmp_path: Path, damage: Callable[[Path], None], complaint: str
) -> None:
    damage(copy)
    with pytest.raises(ValueError, match=complaint):
        ToDist(copy, tmp_path / "out", None).prepare()
    assert not (tmp_path / "out").exists()  # before anything was written


def test_a_rounded_conversion_is_verified_against_the_rounded_source(
    sharded: Path, tmp_path: Path
) -> None:
    dist = to_dist(sharded, tmp_path / "dist", torch.bfloat16)
    assert len(list(verify(sharded, dist))) == len(weights(sharded))


def test_a_source_that_changed_is_not_taken_for_the_one_converted(
    copy: Path, tmp_path: Path
) -> None:
    dist = to_dist(copy, tmp_path / "dist")
    do(ToHf(dist, copy, tmp_path / "back"))
    os.utime(dist / "release/.metadata")
    with pytest.raises(ValueError, match="holds another conversion"):
        ToHf(dist, copy, tmp_path / "back").prepare()
    os.utime(shard(copy))
    with pytest.raises(ValueError, match="holds another conversion"):
        ToDist(copy, tmp_path / "dist", None).prepare()


def test_a_folder_claimed_by_halves_can_be_claimed(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "dist/.progress").mkdir(parents=True)
    to_dist(sharded, tmp_path / "dist")


def test_a_folder_that_holds_something_else_is_left_alone(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not empty and was not made by this conversion"):
        ToDist(sharded, tmp_path / "out", None).prepare()
    to_dist(sharded, tmp_path / "dist")
    with pytest.raises(ValueError, match="holds another conversion"):
        ToDist(sharded, tmp_path / "dist", torch.bfloat16).prepare()


def test_the_room_is_for_what_is_written(sharded: Path, tmp_path: Path) -> None:
    halves, _ = ToDist(sharded, tmp_path / "half", torch.bfloat16).prepare()
    same, largest = ToDist(sharded, tmp_path / "same", None).prepare()
    total = sum(tensor.nbytes for tensor in weights(sharded).values())
    assert sum(unit.num_bytes for unit in same) == total
    assert total / 2 < sum(unit.num_bytes for unit in halves) < 0.51 * total
    assert largest == max(tensor.nbytes for tensor in weights(sharded).values())


def test_too_little_room_is_refused_with_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "5.0 GB to write" in check_resources(tmp_path, 5 * 10**9, 10**6, 1)
    with pytest.raises(ValueError, match=r"needs 1,000,000\.0 GB more, [\d,.]+ GB are free"):
        check_resources(tmp_path, 10**15, 10**6, 1)
    with pytest.raises(ValueError, match=r"500 workers need up to 3\.1 GB each.*--workers \d+"):
        check_resources(tmp_path, 10, 10**9, 500)


def test_a_command_that_does_not_fit_writes_nothing(
    sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--hf", str(sharded), "--out", str(tmp_path / "out"), "--workers", "10000"]
    assert cli.run(["convert", "hf-to-dist", *words]) == 2
    assert "10000 workers need up to 1.1 GB each, " in capsys.readouterr().err
    assert not [path for path in tmp_path.glob("out/**/*") if path.suffix == ".distcp"]


def test_verify_finds_a_flipped_bit(sharded: Path, tmp_path: Path) -> None:
    dist = to_dist(sharded, tmp_path / "dist")
    file = max((dist / "release").glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    name, tensor = max(weights(sharded).items(), key=lambda item: item[1].numel())
    data[data.index(bytes(tensor.flatten()[:8].view(torch.uint8))) + 3] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"tensor '{name}' is not what manifest.json says"):
        list(verify(sharded, dist))
    with pytest.raises(ValueError, match=f"tensor '{name}' is not what manifest.json says"):
        do(ToHf(dist, sharded, tmp_path / "back"))
    (dist / "manifest.json").unlink()  # as of a folder that others wrote
    with pytest.raises(ValueError, match=f"'{name}' differs between|is corrupt"):
        list(verify(sharded, dist))
    os.truncate(file, len(data) // 2)
    with pytest.raises(ValueError, match=r"__\d+_0\.distcp is truncated at offset [\d,]+: key '"):
        list(verify(sharded, dist))


@pytest.mark.parametrize("file", [".metadata", "common.pt", "metadata.json", "__extra_0.distcp"])
@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_small_files_are_checked_too(sharded: Path, tmp_path: Path, file: str, how: str) -> None:
    victim = to_dist(sharded, tmp_path / "dist") / "release" / file
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data if how == "flipped" else data[: len(data) // 2])
    if how == "missing":
        victim.unlink()
    with pytest.raises(ValueError, match=f"{file} (is not what manifest.json|cannot be)|has no "):
        list(verify(sharded, tmp_path / "dist"))
    with pytest.raises(ValueError, match=f"{file} (is not what manifest.json|cannot be)|has no "):
        ToHf(tmp_path / "dist", sharded, tmp_path / "back").prepare()


def test_a_manifest_that_changed_is_named(sharded: Path, tmp_path: Path) -> None:
    dist = to_dist(sharded, tmp_path / "dist")
    text = (dist / "manifest.json").read_text()
    for broken in (text[:1000], text.replace('"dist": "', '"dist": "f', 1)):
        (dist / "manifest.json").write_text(broken)
        with pytest.raises(ValueError, match=r"manifest\.json (cannot be read|says)"):
            list(verify(sharded, dist))


def test_a_manifest_of_other_hashes_is_refused(sharded: Path, tmp_path: Path) -> None:
    path = to_dist(sharded, tmp_path / "dist") / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["hash"]  # as the first version wrote it, with SHA-256
    path.write_text(json.dumps(manifest))
    told = "hashes are not xxh3_128: another version wrote it; convert again, or remove it"
    with pytest.raises(ValueError, match=told):
        ToHf(path.parent, sharded, tmp_path / "back").prepare()
    path.unlink()
    do(ToHf(path.parent, sharded, tmp_path / "back"))
    assert contents(tmp_path / "back") == contents(sharded)


def test_a_source_with_a_manifest_is_checked_against_it(sharded: Path, tmp_path: Path) -> None:
    """HF files have no checksums, but the folders that a conversion wrote have."""
    do(ToHf(to_dist(sharded, tmp_path / "dist"), sharded, tmp_path / "back"))
    data = bytearray(shard(tmp_path / "back").read_bytes())
    data[-1] ^= 1
    shard(tmp_path / "back").write_bytes(data)
    with pytest.raises(ValueError, match=r"back: tensor 'backbone.* is not what manifest.json"):
        to_dist(tmp_path / "back", tmp_path / "again")


def test_keys_that_the_model_does_not_have_are_not_dropped(copy: Path, tmp_path: Path) -> None:
    dist = to_dist(copy, tmp_path / "dist")
    shorter = tmp_path / "shorter"
    words = ("--set", "num_nextn_predict_layers=1", "--pattern", "MEM*EM*")
    make(shorter, *words)
    with pytest.raises(
        ValueError, match=r"keys are unknown to the layer pattern 'MEM\*EM\*'.*\.7\."
    ):
        ToHf(dist, shorter, tmp_path / "back").prepare()


def test_mtp_may_be_absent_from_torch_dist(copy: Path, tmp_path: Path) -> None:
    """As from what stock megatron-core 0.16 wrote; verify says what it did not compare."""
    plain = make(tmp_path / "plain", "--set", "num_nextn_predict_layers=0")
    dist = to_dist(plain, tmp_path / "dist")
    merged = dict(weights(plain))
    for file in copy.glob("*.safetensors"):
        save_file({k: merged.get(k, v) for k, v in load_file(file).items()}, file)
    compared = {name: done for name, _, done in verify(copy, dist)}
    assert {name for name, done in compared.items() if not done} == {
        name for name in compared if name.startswith("mtp.")
    }
    do(ToHf(dist, copy, tmp_path / "back"))
    assert contents(tmp_path / "back") == contents(copy)


def test_what_is_no_checkpoint_says_so(sharded: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no torch_dist checkpoint"):
        ToHf(tmp_path, sharded, tmp_path / "out").prepare()
    (tmp_path / ".metadata").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"\.metadata cannot be read"):
        ToHf(tmp_path, sharded, tmp_path / "out").prepare()


def test_shares_are_even_and_leave_nothing_out() -> None:
    units = [Unit(f"f{i}", (), size) for i, size in enumerate([9, 1, 5, 5, 2, 7, 3, 8])]
    shares = [share(units, rank, 3) for rank in range(3)]
    assert sorted(unit.file for one in shares for unit in one) == sorted(u.file for u in units)
    loads = [sum(unit.num_bytes for unit in one) for one in shares]
    assert max(loads) - min(loads) <= 2


# ------------------------------------------------------------------ processes


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 MB: several output files."""
    words = ["hidden_size=512", "moe_latent_size=256", "n_routed_experts=32"]
    words += ["moe_intermediate_size=1024"]
    return make(tmp_path_factory.mktemp("large") / "hf", "--shard-gb", "0.1", "--set", *words)


def command(
    hf: Path, out: Path, *words: str, max_file_bytes: int = resource.RLIM_INFINITY
) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "miles_lite.cli", "convert", "hf-to-dist"]
    return subprocess.Popen(
        [*line, "--hf", str(hf), "--out", str(out), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=PROJECT,
        start_new_session=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, -1)),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_killed_it_goes_on_where_it_was(large: Path, tmp_path: Path) -> None:
    out = tmp_path / "dist"
    process = command(large, out)
    deadline = time.monotonic() + 60
    while not list(out.glob(".progress/__*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in out.glob(".progress/__*")}
    assert before and not (out / TRACKER).exists()
    output, _ = command(large, out).communicate(timeout=120)
    assert "GB/s, peak RSS of a worker" in output
    assert {path: path.stat().st_mtime_ns for path in before} == before  # not done again
    assert len(list(verify(large, out))) == len(weights(large))
    output, _ = command(large, out).communicate(timeout=120)
    assert "is complete: nothing to do" in output


def test_a_disk_that_takes_no_more_leaves_what_is_finished(large: Path, tmp_path: Path) -> None:
    out = tmp_path / "dist"
    units, _ = ToDist(large, out, None).prepare()
    sizes = sorted(unit.num_bytes for unit in units)
    limit = (sizes[0] + sizes[1]) // 2  # the smallest file goes through
    process = command(large, out, max_file_bytes=limit)
    output = " ".join(process.communicate(timeout=120)[0].split())
    assert process.returncode == 2 and "Traceback" not in output, output
    assert "File too large; what is finished stays, the same command goes on" in output
    left = {str(path.relative_to(out)) for path in (out / "release").iterdir()}
    assert left == {unit.file for unit in units if done(out, unit)}
    assert command(large, out).wait(timeout=120) == 0
    assert len(list(verify(large, out))) == len(weights(large))


def test_no_worker_outlives_a_killed_rank(large: Path, tmp_path: Path) -> None:
    """The rank that comes back would write the same files at the same time."""
    process = command(large, tmp_path / "dist", "--workers", "2")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("dist/.progress/__*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 2
    process.kill()  # alone, as the kernel does when memory runs out
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


def test_a_finished_file_that_is_gone_is_made_again(large: Path, tmp_path: Path) -> None:
    out = tmp_path / "dist"
    command(large, out).communicate(timeout=120)
    first, second, *_ = sorted((out / "release").glob("__*_0.distcp"))
    first.unlink()
    os.truncate(second, 1000)
    output, _ = command(large, out).communicate(timeout=120)
    assert "to write" in output
    assert len(list(verify(large, out))) == len(weights(large))


def test_two_ranks_share_the_work(large: Path, tmp_path: Path) -> None:
    out = tmp_path / "dist"
    words = ("--num-nodes", "2", "--head-ip", "127.0.0.1", "--timeout", "60")
    ranks = [command(large, out, "--node-rank", str(rank), *words) for rank in (1, 0)]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    told = [int(o.rsplit(" bytes in", 1)[0].rsplit("\n", 1)[-1].replace(",", "")) for o in outputs]
    assert min(told) > 0 and sum(told) == sum(t.nbytes for t in weights(large).values())
    assert len(list(verify(large, out))) == len(weights(large))


def test_a_rank_that_was_killed_comes_back_alone(large: Path, tmp_path: Path) -> None:
    out = tmp_path / "dist"
    words = ("--num-nodes", "2", "--head-ip", "127.0.0.1", "--timeout", "60")
    head, killed = (command(large, out, "--node-rank", str(rank), *words) for rank in (0, 1))
    deadline = time.monotonic() + 60
    while not (out / ".progress/met_2").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    again = command(large, out, "--node-rank", "1", *words)
    outputs = [process.communicate(timeout=120)[0] for process in (again, head)]
    assert [again.returncode, head.returncode] == [0, 0], outputs
    assert len(list(verify(large, out))) == len(weights(large))


def test_a_rank_that_does_not_come_is_named(sharded: Path, large: Path, tmp_path: Path) -> None:
    words = ("--num-nodes", "3", "--node-rank", "0", "--timeout", "3")
    met = command(sharded, tmp_path / "a", *words, "--head-ip", "127.0.0.1")
    assert "rank 1, 2 of 3 did not come to 127.0.0.1" in met.communicate(timeout=60)[0]
    headless = command(
        sharded, tmp_path / "c", "--num-nodes", "2", "--node-rank", "1", "--timeout", "3",
        "--head-ip", "127.0.0.1",
    )  # fmt: skip
    assert (
        "rank 0 of 2 does not answer, or no longer, at 127.0.0.1:29522"
        in (headless.communicate(timeout=60)[0])
    )
    alone = command(large, tmp_path / "b", "--num-nodes", "2", "--timeout", "3")
    assert "no news for 3 s of rank 1; start it again" in alone.communicate(timeout=60)[0]
