"""The checkpoint of the session, and single-rank engines on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from miles_lite.protocols import Phase
from miles_lite.rollout.embedded.options import EngineOptions
from miles_lite.rollout.embedded.rank import EngineRank
from tests.rollout.embedded.helpers import ONE, StartRank, Tiny, build


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def start(tiny: Tiny) -> Iterator[StartRank]:
    """Start single-rank engines on the tiny model, weights loaded, ready to generate."""
    started: list[EngineRank] = []

    def start_rank(source: Tiny = tiny, **options: Any) -> EngineRank:
        sizes = {"max_running": 8, "max_seq_len": 128, "timeout_s": 20.0, **options}
        rank = EngineRank(source.model, ONE, 0, EngineOptions(**sizes))
        rank.connect("")
        rank.load_hf(source.folder)
        rank.set_version(0)
        rank.enter(Phase.generate)
        started.append(rank)
        return rank

    yield start_rank
    for rank in started:
        if not rank.server.failure:
            rank.close()
