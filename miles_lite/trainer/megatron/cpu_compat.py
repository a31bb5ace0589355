"""Makes megatron-core >=0.16.1,<0.20 run on CPU and gloo: the same trainer, on a laptop.

    from miles_lite.trainer.megatron import cpu_compat
    cpu_compat.install()                    # before the first `import megatron...`

With CUDA there, install() does nothing: a GPU run uses megatron-core untouched.

How: an import hook. Once a `megatron.*` module is executed, its global name `torch` is replaced by
a look-alike in which `torch.cuda` and the factory functions mean the CPU; a few modules get an
override each (the table `_AFTER`). torch itself stays as it is, but for three Tensor methods:
replacing torch.cuda globally breaks torch._dynamo, hence transformers.
What stands in for Transformer Engine and mamba_ssm is in `stand_ins`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import importlib.util
import inspect
import logging
import multiprocessing
import sys
import textwrap
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest.mock import MagicMock

import torch

from miles_lite.trainer.megatron import norms, stand_ins

_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like")

_device = torch.device("cpu")
_torch_view: types.ModuleType | None = None


def install(device: str = "cpu") -> None:
    """Arrange that megatron modules imported from now on run without CUDA.

    `device` is what they take for the GPU: "cpu", or "meta" for a dry run that allocates nothing.
    Every process needs its own call, spawned checkpoint writers included.
    """
    global _device, _torch_view
    if torch.cuda.is_available():
        return
    _device = torch.device(device)
    if _torch_view is not None:
        return
    assert "megatron.core" not in sys.modules, "cpu_compat.install() comes after a megatron import"
    _torch_view = _make_torch_view()
    _patch_tensor_methods()
    _silence()
    sys.meta_path.insert(0, _Hook())


def _silence() -> None:
    """Megatron warns of every GPU package that is not there, torch of names megatron still uses."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings(
        "ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning
    )


# ---- `torch` as megatron modules see it


class _Stream:
    """A CUDA stream or event. CPU work is synchronous: there is nothing to order."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def __exit__(self, *_: Any) -> None: ...

    def __enter__(self) -> _Stream:
        return self

    def record_event(self, *_: Any) -> _Stream:
        return self

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0


class _View(types.ModuleType):
    """A module look-alike: its own attributes first, then those of the real module."""

    def __init__(self, real: types.ModuleType, **own: Any) -> None:
        super().__init__(real.__name__)
        self.__dict__.update(real.__dict__)  # fast path; __getattr__ serves late attributes
        self.__dict__.update(own)
        self.__dict__["_real"] = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


def _on_device(factory: Callable[..., Any]) -> Callable[..., Any]:
    """A literal device="cuda" (schedules.py, clip_grads.py, moe_utils.py, ...) means `_device`."""

    @functools.wraps(factory)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = _device
        return factory(*args, **kwargs)

    return wrapper


def _nothing(*_: Any, **__: Any) -> None: ...


def _make_torch_view() -> types.ModuleType:
    stream = _Stream()
    cuda = _View(
        torch.cuda,
        current_device=lambda: _device,
        device_count=lambda: 1,
        set_device=_nothing,
        synchronize=_nothing,
        empty_cache=_nothing,
        Stream=_Stream,
        Event=_Stream,
        current_stream=lambda *_, **__: stream,
        default_stream=lambda *_, **__: stream,
        stream=lambda _: contextlib.nullcontext(),
        # tensor_parallel/random.py: the "CUDA generator" is the CPU generator
        manual_seed=lambda seed: torch.default_generator.manual_seed(int(seed)),
        get_rng_state=lambda *_, **__: torch.get_rng_state(),
        set_rng_state=lambda state, *_, **__: torch.set_rng_state(state),
    )
    cuda.__dict__["random"] = _View(torch.cuda.random, get_rng_state=cuda.get_rng_state)
    return _View(torch, cuda=cuda, **{f: _on_device(getattr(torch, f)) for f in _FACTORIES})


def _patch_tensor_methods() -> None:
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.Tensor.record_stream = _nothing
    # optimizer.py, distrib_optimizer.py and clip_grads.py compare Tensor.type() with
    # "torch.cuda.FloatTensor" and the like. Answer so, but to megatron callers only.
    real_type = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = real_type(self, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(out, str) and caller.startswith("megatron."):
            return "torch.cuda." + out.rsplit(".", 1)[1]
        return out

    torch.Tensor.type = type_


# ---- overrides, each applied once its module is executed


def _random(module: Any) -> None:
    # the original queues work for torch.cuda's lazy init, which never comes
    module._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    # the tracker warns that the CPU generator moved inside a "CUDA" fork; here that is the point
    logging.getLogger(module.__name__).addFilter(lambda record: "CPU RNG" not in str(record.msg))


def _mappings(module: Any) -> None:
    """Gather and scatter unequal pieces by padding them, which gloo, unlike NCCL, needs.

    Expert-TP ranks of an EP group bring different numbers of tokens.
    """

    def all_gather(outputs: list[torch.Tensor], piece: torch.Tensor, group: Any) -> None:
        most = max(len(output) for output in outputs)
        padded = [_padded(output, most) for output in outputs]
        torch.distributed.all_gather(padded, _padded(piece, most), group=group)
        for output, gathered in zip(outputs, padded, strict=True):
            output.copy_(gathered[: len(output)])

    def reduce_scatter(output: torch.Tensor, pieces: list[torch.Tensor], group: Any) -> None:
        most = max(len(piece) for piece in pieces)
        padded = _padded(output, most)
        torch.distributed.reduce_scatter(padded, [_padded(p, most) for p in pieces], group=group)
        output.copy_(padded[: len(output)])

    distributed = _View(torch.distributed, all_gather=all_gather, reduce_scatter=reduce_scatter)
    module.torch = _View(module.torch, distributed=distributed)


def _padded(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """A contiguous copy with zeros up to `rows`."""
    out = tensor.new_zeros(rows, *tensor.shape[1:])
    out[: len(tensor)] = tensor
    return out


def _moe_layer(module: Any) -> None:
    # latent projections insist on Transformer Engine's replicated linear
    module.HAVE_TE, module.TELinear = True, stand_ins.DuplicatedLinear


def _moe_utils(module: Any) -> None:
    if not hasattr(module, "te_general_gemm"):
        module.te_general_gemm = None  # 0.16.1 reads a name it only defines with TE

    # the original leaves CPU tensors alone even when asked for numpy; all-to-all needs ints
    def maybe_move_tensor_to_cpu(
        tensor: Any, as_numpy: bool = False, record_stream: bool = False
    ) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    module.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu


def _mamba_mixer(module: Any) -> None:
    # packed sequences are refused below certain kernel versions; the stand-ins do support them
    utils: Any = sys.modules["megatron.core.utils"]
    utils._mamba_ssm_version = utils.PkgVersion("2.2.6.post3")
    utils._causal_conv1d_version = utils.PkgVersion("1.5.3.post1")


def _hybrid_block(module: Any) -> None:
    module.TENorm = norms.TorchNorm  # final_norm does not go through the layer spec


def _optimizer(module: Any) -> None:
    """Give the optimizers FusedAdam's layout, as on a GPU.

    Megatron's fallback, torch AdamW, counts steps per parameter; with the distributed optimizer a
    loaded checkpoint then shares one step tensor among all parameters, which advances by hundreds.
    """
    module.Adam = stand_ins.FusedAdam
    if hasattr(module, "USING_PYTORCH_OPTIMIZER"):
        module.USING_PYTORCH_OPTIMIZER = False
    if hasattr(module, "HAVE_APEX_OR_TE"):
        module.HAVE_APEX_OR_TE = module.USING_APEX_OPTIMIZER = True


def _hybrid_optimizer(module: Any) -> None:
    """CPU-offloaded optimizer: "is on the GPU" means "is not one of the CPU copies" here."""
    cls, name = module.HybridDeviceOptimizer, "_get_sub_optimizer_param_groups"
    source = textwrap.dedent(inspect.getsource(getattr(cls, name)))
    for old, new in (
        (" for param in params if param.is_cuda]", " for param in params]"),
        (" and param.is_cuda:", ":"),
        ("if param.is_cuda:", "if not cpu_copy:"),
        (".pin_memory()", ""),
    ):
        assert old in source, f"HybridDeviceOptimizer.{name} has changed: {old!r} is gone"
        source = source.replace(old, new)
    exec(source, module.__dict__)
    setattr(cls, name, module.__dict__.pop(name))


def _filesystem_async(module: Any) -> None:
    """Fork, not spawn, the checkpoint writer's queue: spawning re-imports __main__ on every rank,
    which made the first save of 8 ranks on 2 cores take 13 s instead of 3."""

    def queue(*_: Any) -> Any:
        if module._results_queue is None:
            module._results_queue = multiprocessing.get_context("fork").Manager().Queue()
        return module._results_queue

    for name in ("_get_write_results_queue", "get_write_results_queue"):  # 0.16, 0.17
        if hasattr(module, name):
            setattr(module, name, queue)


_AFTER: Mapping[str, Callable[[Any], None]] = {
    # jit_fuser is torch.compile: 7 s of C++ compiler for the first tiny forward instead of 0.1 s
    "megatron.core.jit": lambda module: module.disable_jit_fuser(),
    "megatron.core.tensor_parallel.random": _random,
    "megatron.core.tensor_parallel.mappings": _mappings,
    "megatron.core.transformer.moe.moe_layer": _moe_layer,
    "megatron.core.transformer.moe.moe_utils": _moe_utils,
    "megatron.core.ssm.mamba_mixer": _mamba_mixer,
    "megatron.core.ssm.mamba_block": _hybrid_block,
    "megatron.core.models.hybrid.hybrid_block": _hybrid_block,
    "megatron.core.optimizer": _optimizer,
    "megatron.core.optimizer.distrib_optimizer": _optimizer,
    "megatron.core.optimizer.cpu_offloading.hybrid_optimizer": _hybrid_optimizer,
    "megatron.core.dist_checkpointing.strategies.filesystem_async": _filesystem_async,
}


# ---- the import hook

_HAVE_TRITON = importlib.util.find_spec("triton") is not None

# these import triton unconditionally; their kernels are never called on a CPU
_TRITON_USERS = (
    ".tensor_ops",
    ".paged_stash",
    ".causal_conv1d_varlen",
    ".batch_invariant_decode",
)


def _pretended(name: str) -> Mapping[str, Any]:
    """Modules that megatron module `name` finds importable while it is executed."""
    if name.endswith(_TRITON_USERS) and not _HAVE_TRITON:
        triton = MagicMock(__version__="0")
        return {"triton": triton, "triton.language": triton.language}
    if name.endswith(".mamba_mixer"):
        root = "mamba_ssm.ops.triton"
        modules = (
            _module("mamba_ssm"),
            _module("mamba_ssm.ops"),
            _module(root),
            _module(f"{root}.layernorm_gated", RMSNorm=norms.RMSNormGated),
            _module(
                f"{root}.ssd_combined",
                mamba_chunk_scan_combined=stand_ins.mamba_chunk_scan_combined,
                mamba_split_conv1d_scan_combined=stand_ins.mamba_split_conv1d_scan_combined,
            ),
        )
        return {module.__name__: module for module in modules}
    return {}


def _module(name: str, **attributes: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(attributes, __path__=[])
    return module


@contextlib.contextmanager
def _importable(modules: Mapping[str, Any]) -> Iterator[None]:
    """Not left behind: transformers and others probe for mamba_ssm and triton."""
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module


class _Hook:
    """A meta path finder: the normal one, with work around the execution of megatron modules."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith("megatron."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None or not hasattr(spec.loader, "exec_module"):
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            with _importable(_pretended(name)):
                execute(module)
            if module.__dict__.get("torch") is torch:
                module.__dict__["torch"] = _torch_view
            _AFTER.get(name, _nothing)(module)

        spec.loader.exec_module = exec_module
        return spec
