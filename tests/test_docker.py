"""The images' pins are those the project asks for, and those it was tested with."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from miles_lite.environment import PROJECT

GPU, CPU = PROJECT / "docker/Dockerfile", PROJECT / "docker/Dockerfile.cpu"
WANTED = "transformer-engine mamba-ssm causal-conv1d sglang torch-memory-saver".split()


def arguments(file: Path) -> dict[str, str]:
    found = re.findall(r"^ARG ([A-Z0-9_]+)=(.*)$", file.read_text(), re.MULTILINE)
    return {name.lower().replace("_", "-"): value.strip('"') for name, value in found}


def versions(name: str) -> dict[str, str]:
    lines = (PROJECT / "scripts" / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def asked() -> dict[str, Requirement]:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["gpu"], *extras["sglang"], *extras["dev"]]
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


@pytest.mark.parametrize("name", WANTED)
def test_what_the_gpu_image_adds_is_pinned_as_the_project_asks(name: str) -> None:
    pin = arguments(GPU)[name]
    assert asked()[name].specifier.contains(Version(pin), prereleases=True)
    assert re.search(
        rf'"{name}(\[\w+\])?==\${{{name.upper().replace("-", "_")}}}"', GPU.read_text()
    )


def test_sglang_is_the_version_tested() -> None:
    assert arguments(GPU)["sglang"] == versions("sglang-cpu.txt")["sglang"]


def test_the_rest_are_the_versions_tested() -> None:
    """Both images take them from the constraints, by the set-up script."""
    constraints = versions("constraints-cpu.txt")
    for name in ("torch", "megatron-core", "ray", "transformers"):
        assert asked()[name].specifier.contains(Version(constraints[name]))
    for file in (GPU, CPU):
        assert "RUN bash scripts/setup.sh" in file.read_text()
        assert not re.findall(r"(?:torch|megatron-core|ray)==", file.read_text())


@pytest.mark.parametrize("file", [GPU, CPU], ids=["gpu", "cpu"])
def test_images_do_not_run_as_root_say_how_they_are_and_copy_what_is_there(file: Path) -> None:
    text = file.read_text()
    assert re.search(r"^USER [1-9]\d*$", text, re.MULTILINE)
    assert "HEALTHCHECK" in text
    ignored = (PROJECT / ".dockerignore").read_text().splitlines()
    for words in re.findall(r"^COPY --chown=\d+ (.*)$", text, re.MULTILINE):
        for source in words.split()[:-1]:
            assert (PROJECT / source).exists() and f"!{source}" in ignored
