"""Bytes by link against figures worked out by hand."""

from __future__ import annotations

import pytest

from miles_lite.compose import CONFIGS, compose
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.parallel import ParallelDims
from miles_lite.planner.hardware import Hardware
from miles_lite.planner.shards import sync_flows
from miles_lite.planner.traffic import (
    Links,
    distinct_ranks,
    expert_exchange,
    gradient_exchange,
    layer_exchange,
    sync_traffic,
)

H200 = Hardware.named("h200")
DIMS = ParallelDims(tp=8, pp=4, dp=4, ep=32, expert_tp=1)


def model(name: str) -> NemotronH:
    return NemotronH.from_folder(CONFIGS / f"model/nemotron3_{name}")


@pytest.mark.parametrize(
    ("name", "layer_kb", "forward_mb"),
    [("ultra", 174.6, 8.38), ("super", 87.3, 3.49), ("nano_30b", 62.5, 1.44)],
)
def test_experts_of_a_token_over_32_ranks(name: str, layer_kb: float, forward_mb: float) -> None:
    links = expert_exchange(model(name), DIMS, 2, H200)
    sent = links.nvlink + links.network
    assert sent / 1e3 == pytest.approx(layer_kb, rel=1e-3)
    assert sent * model(name).pattern.count("E") / 1e6 == pytest.approx(forward_mb, rel=2e-3)
    assert links.network / sent == pytest.approx(24 / 31)  # 24 of the 31 others are elsewhere


def test_a_dispatcher_that_never_repeats_itself_sends_less() -> None:
    """Published for Ultra: 16.32 distinct ranks, 6.22 MB a token and pass."""
    ultra = model("ultra")
    assert distinct_ranks(ultra, 32) == pytest.approx(16.32, abs=0.005)
    copies = 2 * distinct_ranks(ultra, 32) * 4096 * 31 / 32 * 48
    assert copies / 1e6 == pytest.approx(6.22, abs=0.005)


def test_tensor_parallel_ranks_exchange_a_sequence_twice() -> None:
    ultra = model("ultra")
    mamba = layer_exchange(ultra, "M", DIMS, 2, H200)
    assert mamba == Links(nvlink=2 * 8192 * 2 * 7 / 8)
    moe = layer_exchange(ultra, "E", DIMS, 2, H200)  # of a token's 8 ranks one dispatches it
    assert moe.network == pytest.approx(expert_exchange(ultra, DIMS, 2, H200).network / 8)
    alone = ParallelDims(tp=1, pp=1, dp=8, ep=1, expert_tp=1)
    assert layer_exchange(ultra, "M", alone, 2, H200) == Links()
    assert layer_exchange(ultra, "E", alone, 2, H200) == Links()


def test_gradients_over_ranks_of_other_hosts() -> None:
    assert gradient_exchange(1000.0, 1, 8, H200) == Links()
    assert gradient_exchange(1000.0, 4, 8, H200) == Links(network=750.0)
    assert gradient_exchange(1000.0, 4, 2, H200) == Links(nvlink=750.0)


def test_sync_of_ultra() -> None:
    """Every engine rank gets its 42.2 GB shard once, a quarter of its experts from its own device;
    the four engines together get 5.4 TB and not a full copy of 1.1 TB for each of 128 ranks."""
    cfg = compose(["experiment=nemotron3_ultra"])
    traffic = sync_traffic(sync_flows(cfg, model("ultra")), H200)
    assert traffic.total == 128 * 42_189_508_608
    assert traffic.total == traffic.local + traffic.nvlink + traffic.network
    assert traffic.local / 128 >= 8_053_063_680  # the experts that the rank trains itself
    assert traffic.busiest.network < 42_189_508_608
    assert traffic.busiest.seconds(H200) == pytest.approx(0.80, abs=0.05)


def test_links_work_at_once() -> None:
    links = Links(nvlink=450e9, network=25e9) + Links(pcie=55e9)
    assert links.seconds(H200) == pytest.approx(1.0)
    assert links.times(2).seconds(H200, efficiency=0.5) == pytest.approx(4.0)
