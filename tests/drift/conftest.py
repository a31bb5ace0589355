"""The tiny checkpoint of the trainer's tests."""

from tests.trainer.conftest import tiny

__all__ = ["tiny"]
