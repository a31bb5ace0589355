"""Combinations that cannot work, refused before anything starts: names, values, and the way out.

What one section of the configuration can check alone is checked there; here are the rules that
need the model's sizes or two sections at once. Imports no torch.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata

from miles_lite.config import Config, ConfigError
from miles_lite.models.flops import forward_flops
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.parallel import ParallelDims
from miles_lite.planner.hardware import Hardware
from miles_lite.trainer.megatron.limits import (
    divisors,
    refuse_lost_expert_gradients,
    refuse_what_megatron_changes,
)


def check(cfg: Config, model: NemotronH) -> None:
    """Raise ConfigError on the first rule that `cfg` breaks for `model`."""
    _check_trainer_layout(cfg, model)
    _check_engine_layout(cfg, model)
    _check_recompute(cfg)
    _check_batch(cfg)
    _check_lengths(cfg)
    _check_algorithm(cfg, model)


def _check_trainer_layout(cfg: Config, model: NemotronH) -> None:
    dims = cfg.parallel.dims
    _check_tensor_parallel("parallel.tp", dims.tp, model)
    refuse_what_megatron_changes(model, dims)
    if "E" not in model.pattern:
        if dims.ep != 1:
            raise ConfigError(f"parallel.ep = {dims.ep} but the model has no experts: set it to 1")
        return
    _divides("parallel.ep", dims.ep, "experts (n_routed_experts)", model.num_experts)
    _divides("parallel.expert_tp", dims.expert_tp, "expert width", model.expert_ffn_size)
    _check_expert_grid(dims)
    refuse_lost_expert_gradients(dims, metadata.version("megatron-core"))


def _check_expert_grid(dims: ParallelDims) -> None:
    ranks = dims.tp * dims.dp
    if ranks % (dims.ep * dims.expert_tp):
        raise ConfigError(
            f"parallel.ep x expert_tp = {dims.ep} x {dims.expert_tp} does not divide the "
            f"{ranks} ranks of a pipeline stage (tp x dp = {dims.tp} x {dims.dp}); "
            f"ep x expert_tp may be {divisors(ranks)}"
        )


def _check_tensor_parallel(key: str, tp: int, model: NemotronH) -> None:
    """Whole heads and whole Mamba groups on every rank. Key-value heads may be shared by ranks."""
    if "M" in model.pattern:
        _divides(key, tp, "Mamba groups (n_groups)", model.mamba_num_groups)
        _divides(key, tp, "Mamba heads", model.mamba_num_heads)
    if "*" in model.pattern:
        _divides(key, tp, "attention heads", model.num_heads)
        kv = model.num_kv_heads
        if kv % tp and tp % kv:
            raise ConfigError(
                f"{key} = {tp} and {kv} key-value heads: one must divide the other; "
                f"{key} may be {divisors(model.num_heads)}"
            )
    if "E" in model.pattern:
        _divides(key, tp, "shared expert width", model.shared_ffn_size)
    if "-" in model.pattern:
        _divides(key, tp, "MLP width", model.dense_ffn_size)
    _divides(key, tp, "vocabulary", model.vocab_size)


def _check_engine_layout(cfg: Config, model: NemotronH) -> None:
    engine, dims = cfg.rollout.engine, cfg.rollout.engine.dims
    devices = cfg.parallel.dims.world_size
    if engine.num_engines * engine.tp > devices:
        raise ConfigError(
            f"rollout.engine.num_engines x tp = {engine.num_engines} x {engine.tp} processes, but "
            f"the trainer has {devices} devices (parallel.tp x pp x dp) and engines share them: "
            "make engines fewer or smaller, or the trainer larger"
        )
    _check_tensor_parallel("rollout.engine.tp / dp", dims.attn_tp, model)
    if "E" in model.pattern:
        _divides("rollout.engine.ep", dims.ep, "experts (n_routed_experts)", model.num_experts)
        _divides("rollout.engine.tp / ep", dims.expert_tp, "expert width", model.expert_ffn_size)
    elif dims.ep != 1:
        raise ConfigError(
            f"rollout.engine.ep = {dims.ep} but the model has no experts: set it to 1"
        )
    if engine.backend == "sglang":  # which cuts these over all ranks, whatever dp is
        _divides("rollout.engine.tp", dims.tp, "vocabulary", model.vocab_size)
        if "E" in model.pattern:
            _divides("rollout.engine.tp", dims.tp, "shared expert width", model.shared_ffn_size)


def _check_recompute(cfg: Config) -> None:
    options = cfg.train.megatron
    if options.get("recompute_granularity") != "full":
        return
    method, num_layers = (options.get(f"recompute_{x}") for x in ("method", "num_layers"))
    if method not in ("uniform", "block") or not isinstance(num_layers, int) or num_layers < 1:
        raise ConfigError(
            f"train.megatron.recompute_granularity = full with recompute_method = {method} and "
            f"recompute_num_layers = {num_layers}: set them to uniform and 1 (every layer), or to "
            "block and the number of layers of a stage"
        )


def check_hosts(cfg: Config, hardware: Hardware) -> None:
    """Refuse what does not come out even on hosts of this hardware."""
    per_node, engine = hardware.devices_per_node, cfg.rollout.engine
    for key, size in (("rollout.engine.tp", engine.tp), ("parallel.tp", cfg.parallel.tp)):
        if per_node % size and size % per_node:
            raise ConfigError(
                f"{key} = {size} on hosts of {per_node} devices: a group would begin in the middle "
                f"of a host and end in another; it may be {divisors(per_node)} or a multiple of "
                f"{per_node}"
            )
    world = cfg.parallel.dims.world_size
    if world > per_node and world % per_node:
        raise ConfigError(
            f"{world} devices (parallel.tp x pp x dp) are no whole number of hosts of {per_node}: "
            f"take {world - world % per_node} or {world + -world % per_node}"
        )


def plan_warnings(cfg: Config, model: NemotronH, hardware: Hardware) -> list[str]:
    """What can be run but wastes devices or time."""
    found, engine, dims = [], cfg.rollout.engine, cfg.parallel.dims
    idle = dims.world_size - engine.num_engines * engine.tp
    if idle:
        found.append(
            f"{idle} of {dims.world_size} devices have no engine and wait while answers are drawn "
            f"(rollout.engine.num_engines x tp = {engine.num_engines} x {engine.tp})"
        )
    if dims.tp > hardware.devices_per_node:
        found.append(
            f"parallel.tp = {dims.tp} reaches over hosts of {hardware.devices_per_node} devices: "
            "every layer waits for the network"
        )
    share = -(-cfg.rollout.num_samples // (engine.num_engines * engine.dp))
    if share > engine.max_running:
        found.append(
            f"{share} samples for each group of an engine, rollout.engine.max_running = "
            f"{engine.max_running}: answers come in {-(-share // engine.max_running)} waves"
        )
    per_stage = model.num_layers // dims.pp
    costs = [
        forward_flops(replace(model, pattern=model.pattern[i : i + per_stage], vocab_size=0), 4096)
        for i in range(0, model.num_layers, per_stage)
    ]
    over = max(costs) * len(costs) / sum(costs)
    if over > 1.1:
        found.append(
            f"parallel.pp = {dims.pp}: stage {costs.index(max(costs))} has {over:.2f} "
            "times the mean work, the others wait for it: another pp may cut the pattern evenly"
        )
    return found


def _check_batch(cfg: Config) -> None:
    batch, over = cfg.train.global_batch, cfg.rollout.over_sampling
    if batch % cfg.parallel.dp:
        raise ConfigError(
            f"train.global_batch = {batch} is not a multiple of parallel.dp = {cfg.parallel.dp}: "
            "ranks could not all run the same number of micro-batches"
        )
    if over and not cfg.rollout.dynamic_sampling:
        raise ConfigError(
            f"rollout.over_sampling = {over} without rollout.dynamic_sampling=true: there would be "
            "nothing to choose from the surplus"
        )
    if over and over < cfg.rollout.num_prompts:
        raise ConfigError(
            f"rollout.over_sampling = {over} prompts asked at once are fewer than "
            f"rollout.num_prompts = {cfg.rollout.num_prompts}, which a step keeps"
        )


def _check_lengths(cfg: Config) -> None:
    longest = cfg.data.max_prompt_tokens + cfg.rollout.max_response_tokens
    if longest > cfg.train.max_tokens_per_micro_batch:
        raise ConfigError(
            f"data.max_prompt_tokens + rollout.max_response_tokens = {longest} tokens do not fit a "
            f"forward pass of train.max_tokens_per_micro_batch = "
            f"{cfg.train.max_tokens_per_micro_batch}, which is a hard cap: raise it, or shorten "
            "prompts or answers"
        )
    if cfg.algo.overlong_buffer >= cfg.rollout.max_response_tokens:
        raise ConfigError(
            f"algo.overlong_buffer = {cfg.algo.overlong_buffer} leaves nothing of an answer of "
            f"rollout.max_response_tokens = {cfg.rollout.max_response_tokens} unpunished"
        )


# ------------------------------------------------------------------ algorithms that say nothing


def _check_algorithm(cfg: Config, model: NemotronH) -> None:
    algo, estimator = cfg.algo, cfg.algo.advantage_estimator
    plain = estimator == "reinforce_plus_plus"
    if cfg.rollout.samples_per_prompt == 1 and not plain:
        raise ConfigError(
            f"rollout.samples_per_prompt = 1 with algo.advantage_estimator = {estimator}: alone in "
            "its group a sample has no advantage, and nothing would be learnt. Take 2 samples or "
            "more, or algo=reinforce_plus_plus, whose baseline is the whole batch"
        )
    if cfg.rollout.dynamic_sampling and cfg.rollout.samples_per_prompt == 1:
        raise ConfigError(
            "rollout.dynamic_sampling with rollout.samples_per_prompt = 1: the rewards of a group "
            "of one are always equal, so every group would be replaced for ever"
        )
    if estimator.startswith("reinforce_plus_plus") and not algo.whiten:
        raise ConfigError(
            f"algo.advantage_estimator = {estimator} with algo.whiten = false: its normalisation "
            "over the batch is part of the method: set algo.whiten=true"
        )
    if not algo.train_zero_advantage:
        _check_spared(cfg)
    _check_kl(cfg)
    _check_old_logprobs(cfg)
    if algo.routing_replay and "E" not in model.pattern:
        raise ConfigError(
            "algo.routing_replay = true, but the model has no experts to choose from: leave it "
            "false"
        )


def _check_spared(cfg: Config) -> None:
    """Sparing samples of no advantage must leave the gradient as it is."""
    for key in ("kl_coef", "kl_loss_coef", "entropy_coef", "whiten"):
        if getattr(cfg.algo, key):
            raise ConfigError(
                f"algo.train_zero_advantage = false with algo.{key} = {getattr(cfg.algo, key)}: "
                "samples of no advantage do have a gradient then; leave it true"
            )


def _check_kl(cfg: Config) -> None:
    algo = cfg.algo
    if algo.kl_coef and algo.kl_loss_coef:
        raise ConfigError(
            f"algo.kl_coef = {algo.kl_coef} and algo.kl_loss_coef = {algo.kl_loss_coef}: the same "
            "KL would count twice, in the reward and in the loss; keep one"
        )
    if algo.kl_coef and algo.overlong_filter and algo.advantage_estimator in ("grpo", "rloo"):
        raise ConfigError(
            f"algo.overlong_filter with algo.kl_coef = {algo.kl_coef} and "
            f"{algo.advantage_estimator}: a filtered answer is spared its forward passes, so its "
            "KL is unknown and it could not be part of its group's baseline; take kl_loss_coef"
        )
    if algo.ref_update_interval and not algo.needs_reference:
        raise ConfigError(
            f"algo.ref_update_interval = {algo.ref_update_interval} without a reference: "
            "algo.kl_coef and algo.kl_loss_coef are both 0"
        )
    if algo.use_unbiased_kl and not algo.kl_loss_coef:
        raise ConfigError(
            "algo.use_unbiased_kl = true weighs the KL in the loss, but algo.kl_loss_coef = 0"
        )


def _check_old_logprobs(cfg: Config) -> None:
    if cfg.algo.old_logprobs == "rollout" and cfg.algo.correction.active:
        raise ConfigError(
            "algo.old_logprobs = rollout with algo.correction: the loss already starts from the "
            "engine's log-probs, there is nothing left to correct; turn one of them off"
        )


def warnings(cfg: Config) -> list[str]:
    """What can be run but is seldom meant."""
    algo, rollout, found = cfg.algo, cfg.rollout, []
    if algo.kl_loss_coef and algo.kl_loss_type == "k1" and not algo.use_unbiased_kl:
        found.append(
            "algo.kl_loss_type = k1 in the loss: on policy the gradient of log p - log p_ref has "
            "mean zero, so it adds noise and no pull; k2, k3 or low_var_kl do pull"
        )
    if rollout.top_p < 1 or rollout.top_k > 0:
        found.append(
            f"rollout.top_p = {rollout.top_p}, top_k = {rollout.top_k}: tokens are drawn from a "
            "truncated distribution, but log-probs, ratios and algo.correction are of the full "
            "one, so the gradient is that of another policy; 1 and 0 are what GRPO assumes"
        )
    if algo.old_logprobs == "rollout":
        found.append(
            "algo.old_logprobs = rollout: ratios start from the engine's log-probs, not the "
            "trainer's own; the drift still compares the two"
        )
    return found


def _divides(key: str, value: int, what: str, amount: int) -> None:
    if amount % value:
        raise ConfigError(
            f"{key} = {value} does not divide the {amount} {what}; it may be {divisors(amount)}"
        )
