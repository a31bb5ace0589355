"""Run a function on a module right after it is imported.

SGLang's modules import each other's names, so a replacement must be in place before the next module
copies the name; patching after everything is imported would miss those copies.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

Patch = Callable[[Any], None]  # given the module


class _Hooks(MetaPathFinder):
    def __init__(self, patches: Mapping[str, Patch]):
        self.patches = patches

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        patch = self.patches.get(fullname)
        spec = PathFinder.find_spec(fullname, path, target) if patch else None
        if patch is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_patch(module: Any) -> None:
            execute(module)
            patch(module)

        spec.loader.exec_module = execute_and_patch  # a loader belongs to one module
        return spec


def after_import(patches: Mapping[str, Patch]) -> None:
    """From now on. RuntimeError if one of the modules is there already, too late to be patched."""
    if late := sorted(set(patches) & set(sys.modules)):
        raise RuntimeError(f"imported before they could be patched: {', '.join(late)}")
    sys.meta_path.insert(0, _Hooks(patches))
