"""The only place that reads pickles: those that name nothing but what the reader expects.

A pickle may name any function that can be imported, and have it called with arguments of its
choice. Here a name that is not on the reader's list ends the reading before anything is called.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Collection
from typing import Any


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, names: Collection[str], what: str) -> None:
        super().__init__(io.BytesIO(data))
        self._names, self._what = names, what

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (name := f"{module_name}.{global_name}") not in self._names:
            raise pickle.UnpicklingError(f"it names {name}, which is no part of {self._what}")
        return super().find_class(module_name, global_name)


def unpickle(data: bytes, names: Collection[str], what: str) -> Any:
    """what: the pickle is; names: "module.name" of all that it may name. Raises UnpicklingError
    for another, and whatever a broken pickle raises."""
    return _Unpickler(data, names, what).load()
