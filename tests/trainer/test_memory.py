"""What leaves a device comes back as it was, into the same tensors and views."""

from __future__ import annotations

import torch

from miles_lite.trainer.megatron import cpu_compat

cpu_compat.install()

from miles_lite.trainer.megatron.memory import Away, storages  # noqa: E402 (imports megatron)


def test_away_and_back() -> None:
    whole = torch.arange(12.0)
    view, other = whole[4:8], torch.ones(3, dtype=torch.bfloat16)
    away = Away(pin=False)
    for value in (0.0, 7.0):  # and again, with other contents
        whole[0] = value
        away.leave(dict.fromkeys(storages([view, whole, other])))
        assert away.is_away
        assert whole.untyped_storage().nbytes() == other.untyped_storage().nbytes() == 0
        away.come_back()
        assert whole.tolist() == [value, *range(1, 12)] and view.tolist() == [4.0, 5.0, 6.0, 7.0]
    view.zero_()
    assert whole[4:8].sum() == 0 and other.tolist() == [1.0] * 3


def test_a_copy_that_is_there_is_used() -> None:
    master, copied = torch.arange(5.0), torch.zeros(5)
    away = Away(pin=False)
    away.leave({master.untyped_storage(): copied})
    assert copied.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    away.come_back()
    assert master.tolist() == copied.tolist() and not away.is_away


def test_a_storage_counts_once_even_while_it_is_empty() -> None:
    whole, other = torch.zeros(8), torch.zeros(2)
    tensors = [whole, whole[2:], other]
    assert len(storages(tensors)) == 2
    away = Away(pin=False)
    away.leave(dict.fromkeys(storages(tensors)))
    assert len(storages(tensors)) == 2
    away.come_back()
