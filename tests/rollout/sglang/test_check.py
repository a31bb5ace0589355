"""What the real ServerArgs makes of options, for a GPU, on a machine that has none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from miles_lite.compose import compose
from miles_lite.config import ConfigError
from miles_lite.parallel import EngineDims
from miles_lite.rollout.sglang.check import check_all, check_config
from miles_lite.rollout.sglang.model_folder import engine_folder
from miles_lite.rollout.sglang.options import options
from tests.rollout.embedded.helpers import build
from tests.rollout.sglang import servers

pytestmark = pytest.mark.sglang

Answer = Mapping[str, Any]

# what is asked for besides what is derived, by a name for it
ASKED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "mistyped": {"mem_fraction_statik": 0.7},
    "another spelling": {"tensor_parallel_size": 2},
    "no choice": {"attention_backend": "fa9"},
    "no number": {"page_size": "many"},
    "no flag": {"disable_radix_cache": "yes"},
    "combination": {"mamba_radix_cache_strategy": "no_buffer"},
    "words of many kinds": {
        "disable_radix_cache": True,
        "disable_overlap_schedule": False,
        "cuda_graph_bs_decode": [1, 2, 4],
        "json_model_override_args": {"rope_theta": 10000},
        "schedule_conservativeness": 0.5,
        "max_mamba_cache_size": None,
    },
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Answer]:
    """All in one process: importing SGLang takes longer than the checks."""
    folder = tmp_path_factory.mktemp("models")
    view = engine_folder(servers.MODEL, folder / "tiny")
    tiny = servers.spec(view, EngineDims(2, 2, 2), device="cuda", dtype="bf16")
    cases = {name: options(replace(tiny, extra=extra)) for name, extra in ASKED.items()}
    # ours would not let these pass; does SGLang?
    cases["tp 4 ep 3"] = options(tiny) | {"tp_size": 4, "ep_size": 3}
    cases["tp 4 dp 3"] = options(tiny) | {"tp_size": 4, "attn_dp_size": 3}
    # the spelling of transformers, seen through our view of it
    build(folder / "saved", n_groups=2)
    viewed = engine_folder(folder / "saved", folder / "viewed")
    cases["transformers"] = options(replace(tiny, folder=viewed))
    cases["unviewed"] = options(replace(tiny, folder=folder / "saved"))
    found = check_all(tiny, list(cases.values()), servers.START_S)
    return dict(zip(cases, found, strict=True))


def test_derived_options_resolve_as_meant_on_a_gpu(answers: Mapping[str, Answer]) -> None:
    resolved = answers["nothing"]["resolved"]
    layout = [resolved[n] for n in ("tp_size", "attn_dp_size", "ep_size", "dp_size")]
    assert layout == [2, 2, 2, 1]
    assert resolved["chunked_prefill_size"] == 16  # SGLang divides by the DP groups
    assert resolved["max_running_requests"] == 16  # and does not
    assert resolved["attention_backend"] == "fa3"  # so it takes itself for a Hopper GPU
    assert resolved["moe_runner_backend"] == "flashinfer_cutlass"
    assert resolved["mem_fraction_static"] == 0.8
    assert not resolved["disable_radix_cache"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mistyped", ["no option 'mem_fraction_statik'", "did you mean mem_fraction_static?"]),
        ("another spelling", ["'tensor_parallel_size'", "did you mean tp_size?"]),
        ("no choice", ["--attention-backend", "'fa9'", "fa3"]),
        ("no number", ["--page-size", "'many'"]),
        ("no flag", ["disable_radix_cache = 'yes'", "true or false"]),
        ("combination", ["no_buffer", "disable_overlap_schedule"]),
        ("tp 4 dp 3", ["tp_size % cfg.attn_dp_size"]),  # asserted without a word
        ("tp 4 ep 3", ["expert parallel size must be 1 or the same"]),
        ("unviewed", ["layers_block_type", "full_attention"]),
    ],
)
def test_what_sglang_refuses_is_told(
    answers: Mapping[str, Answer], name: str, words: list[str]
) -> None:
    for word in words:
        assert word in answers[name]["refused"]


def test_values_of_all_kinds_arrive(answers: Mapping[str, Answer]) -> None:
    resolved = answers["words of many kinds"]["resolved"]
    assert resolved["disable_radix_cache"] is True
    assert resolved["disable_overlap_schedule"] is False
    assert resolved["cuda_graph_config"]["decode"]["bs"] == [1, 2, 4]
    assert "rope_theta" in resolved["json_model_override_args"]
    assert resolved["schedule_conservativeness"] == pytest.approx(0.5 * 0.3)  # its DP discount


def test_a_model_as_transformers_saved_it_is_readable(answers: Mapping[str, Answer]) -> None:
    assert "resolved" in answers["transformers"]


def test_a_configuration_is_checked_whole(tmp_path: Path) -> None:
    cfg = compose(
        [
            "experiment=tiny",
            "rollout.engine.backend=sglang",
            f"rollout.engine.python={servers.python()}",
            "+rollout.engine.sglang.attention_backend=fa9",
            f"cluster.start_timeout_s={servers.START_S}",
        ]
    )
    with pytest.raises(ConfigError, match=r"rollout\.engine\.sglang: SGLang refuses: .*fa9"):
        check_config(cfg, "cuda")
