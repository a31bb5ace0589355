"""Every host of a real Ray of three nodes on this machine; one of them does not answer."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from miles_lite import cli
from miles_lite.cluster.everywhere import on_every_host
from miles_lite.doctor import command, node

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        yield str(cluster.address)
    finally:
        cluster.shutdown()


def _where() -> str:
    return ray.get_runtime_context().get_node_id()


def _mute_but(node_id: str) -> str:
    """Answers on one node only."""
    if _where() == node_id:
        return node_id
    time.sleep(200)
    raise AssertionError("the deadline was not kept")


def _broken() -> str:
    raise FileNotFoundError("the package is not here")


def test_each_node_answers_once_and_for_itself(address: str) -> None:
    answers = on_every_host(address, _where, deadline_s=60)
    assert not answers.failures and len(answers.values) == 3
    assert len(set(answers.values.values())) == 3
    assert all(answers.values[name].startswith(name.split()[-1]) for name in answers.values)
    assert all(abs(offset) <= error + 0.05 for offset, error in answers.offsets.values())
    assert node.clocks(answers.offsets).status == "ok"


def test_who_does_not_answer_is_named_by_the_deadline(address: str) -> None:
    known = on_every_host(address, _where, deadline_s=60).values
    (speaks, its_id), *mute = known.items()
    begin = time.monotonic()
    answers = on_every_host(address, _mute_but, its_id, deadline_s=40)
    assert time.monotonic() - begin < 100
    assert set(answers.values) == {speaks}
    assert set(answers.failures) == {name for name, _ in mute}
    for name, why in answers.failures.items():
        assert "no answer to '_mute_but'" in why and name in why


def test_a_node_that_fails_says_why(address: str) -> None:
    answers = on_every_host(address, _broken, deadline_s=60)
    assert not answers.values
    assert all("the package is not here" in why for why in answers.failures.values())


def test_the_command_checks_all_hosts(
    address: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["doctor", "--address", address, "--no-live", "--json", "-"]
    code = cli.run([*words, "experiment=tiny", f"log.folder={tmp_path}"])
    told = capsys.readouterr()
    found = {f["name"]: f for f in json.loads(told.out)["findings"]}
    assert code == 0, told.err
    assert found["cluster"]["detail"] == "3 hosts answer, 1 wanted"
    assert len(found["versions"]["hosts"]) == 3, "hosts that say the same share a line"
    for name in ("same code", "same packages", "same gpus"):
        assert found[name]["status"] == "ok" and found[name]["detail"] == "on all 3 hosts"
    assert found["clocks"]["status"] == "ok"


def test_too_few_hosts_are_a_failure(
    address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = command.Needs(device="cpu", num_hosts=16)
    monkeypatch.setattr(command.Needs, "of", lambda *_: wanted)
    code = cli.run(["doctor", "--address", address, "--no-live", "experiment=tiny"])
    assert code == 1
    assert "3 hosts answer, 16 wanted -> start Ray on the others" in capsys.readouterr().out


def test_no_ray_is_a_failure_that_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    os.environ.pop("RAY_ADDRESS", None)
    code = cli.run(["doctor", "--address", "127.0.0.1:9", "--no-live"])
    assert code == 1
    assert "no Ray at 127.0.0.1:9" in capsys.readouterr().out
