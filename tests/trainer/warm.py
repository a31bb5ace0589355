"""Imported once by the server from which rank processes are forked: megatron's slow imports."""

import importlib
import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from miles_lite.trainer.megatron import cpu_compat

torch.set_num_threads(1)
cpu_compat.install()
for name in (
    "megatron.core.distributed",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "megatron.core.ssm.mamba_mixer",
    "megatron.core.transformer.moe.moe_layer",
    "miles_lite.trainer.megatron.forward",
    "miles_lite.trainer.megatron.setup",
    "miles_lite.weights.hf",
):
    importlib.import_module(name)
