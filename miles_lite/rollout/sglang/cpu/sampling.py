"""Seeds of requests on a CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class _Seeded:
    """SGLang's execution settings, with seeds on."""

    deterministic = SimpleNamespace(enable_deterministic_inference=True)

    def __init__(self, settings: Any) -> None:
        self._settings = settings

    def __getattr__(self, name: str) -> Any:
        return getattr(self._settings, name)


def _heed_seeds(module: Any) -> None:
    """SGLang draws by the seed of a request only with enable_deterministic_inference, which it
    refuses together with the one attention back-end that a CPU has. The sampler that it uses on a
    CPU does know seeds."""
    get_exec = module.get_exec
    module.get_exec = lambda: _Seeded(get_exec())


PATCHES = {"sglang.srt.sampling.sampling_batch_info": _heed_seeds}
