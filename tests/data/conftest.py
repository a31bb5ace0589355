from __future__ import annotations

from pathlib import Path

import pytest

from miles_lite.data.tokenizer import ChatTokenizer

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    return CONFIGS / "model/tiny"


@pytest.fixture(scope="session")
def tiny_data() -> Path:
    return CONFIGS / "data/tiny"


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_model)
