"""Metrics in words, and numbers as a reader wants them."""

from __future__ import annotations

import math
import re

# What is drawn at once, in this order; all other metrics are drawn on request.
HEADLINES = (
    "rollout/raw_reward",
    "eval/*",
    "train/train_rollout_logprob_abs_diff",
    "train/token_entropy",
    "train/grad_norm",
    "rollout/response_len/mean",
    "rollout/truncated_ratio",
    "rollout/taught_ratio",
    "train/pg_clipfrac",
    "perf/step_time",
)
LOG_SCALE = ("train/train_rollout_logprob_abs_diff", "train/train_rollout_kl")

_WORDS = {
    "rollout/raw_reward": "Mean reward of the answers",
    "rollout/rewards": "Mean advantage of the answers",
    "rollout/advantages_std": "Spread of the advantages",
    "rollout/response_len/mean": "Mean answer, in tokens",
    "rollout/response_len/max": "Longest answer, in tokens",
    "rollout/truncated_ratio": "Share of answers cut at the length limit",
    "rollout/repetition_frac": "Share of answers that run in circles",
    "rollout/not_counted_ratio": "Share of answers without a say in the loss",
    "rollout/zero_advantage_ratio": "Share of answers that teach nothing (advantage 0)",
    "rollout/taught_ratio": "Share of answers that tell right from wrong",
    "rollout/zero_std/all_zero_percentage": "Share of groups in which all answers have reward 0",
    "rollout/zero_std/all_one_percentage": "Share of groups in which all answers have reward 1",
    "rollout/prompts_per_kept": "Prompts answered for each one trained on",
    "rollout/log_probs": "Mean log-prob of a token, by the trainer",
    "rollout/rollout_log_probs": "Mean log-prob of a token, by the engine",
    "reward/invalid_ratio": "Share of answers without a verdict",
    "train/train_rollout_logprob_abs_diff": "Drift: |log p trainer − log p engine|, nats a token",
    "train/train_rollout_kl": "Drift as KL divergence, nats a token",
    "train/ess_ratio": "Share of samples that count after reweighting (ESS)",
    "train/token_entropy": "Entropy of the policy, nats a token",
    "train/entropy_loss": "Entropy under the loss weights, as the bonus takes it",
    "train/grad_norm": "Gradient norm before clipping",
    "train/pg_clipfrac": "Share of tokens whose ratio is clipped",
    "train/ppo_kl": "How far updates moved the policy, nats a token",
    "train/pg_loss": "Policy loss (about 0 is normal: advantages have mean 0)",
    "train/lr-pg_0": "Learning rate",
    "train/nonfinite_logprobs": "Tokens with a log-prob that is not finite",
    "train/routing_flip_rate": "Share of router choices that differ between engine and trainer",
    "drift/decode_vs_trainer": "Drift of the answers scored again, nats a token",
    "drift/decode_vs_prefill": "Engine token by token against engine at once, nats a token",
    "drift/prefill_vs_trainer": "Engine at once against trainer, nats a token",
    "drift/decode_shift": "The engine's own difference with its sign (rounding has none)",
    "drift/truncation": "What top-p and top-k cut off the policy, nats a token",
    "drift/without_truncation": "Drift left if the engine's log-probs are of what these leave",
    "drift/temperature": "Policy against temperature 1, nats a token",
    "drift/without_temperature": "Drift left if the engine's log-probs are of temperature 1",
    "drift/decode_prefill_flips": "Share of router choices that differ within the engine",
    "drift/version_gap": "Versions between policy and the weights that drew the answers",
    "train/train_rollout_logprob_abs_diff_replayed": "Drift with the engine's routes, nats a token",
    "train/train_rollout_logprob_abs_diff_no_replay": "Drift with own routes, nats a token",
    "sync/checksums": "Slices of weights compared at a sync, all equal",
    "perf/step_time": "Seconds a step",
    "perf/rollout_time": "Seconds to generate and grade",
    "perf/train_time": "Seconds of the trainer (log-probs and updates)",
    "perf/update_weights_time": "Seconds to sync the weights",
    "perf/rollout_tokens_per_s": "Tokens a second, generating",
    "perf/actor_train_tok_per_s": "Tokens a second, training",
    "perf/imbalance": "Work of the busiest trainer rank over the mean",
    "perf/fill": "Tokens of a micro-batch over its limit",
}

# what else is told of a held-out set, whose own name may have any sign
_OF_A_SET = re.compile(r"-((mean|pass)@\d+(-low|-high)?|truncated_ratio|none_reward_ratio)$")
_PARTIES = {"trainer": "trainer", "rollout": "engine", "driver": "driver"}
_MEMORY = re.compile(r"memory/(\w+?)/(trainer|rollout|driver)_(\w+)_bytes")
# kinds that are not parts of what a party holds on its devices, and add up to nothing
WHOLES = {"device": "everything on the devices", "resident": "host memory of the largest process"}


def words(name: str) -> str:
    """A metric in words; its own name where there are none."""
    if name in _WORDS:
        return _WORDS[name]
    if name.startswith("plan/"):
        return f"Measured over planned: {words(name.removeprefix('plan/'))}"
    if found := memory_parts(name):
        phase, party, kind = found
        return f"Bytes in phase {phase}: {party} {WHOLES.get(kind, kind)}"
    if re.fullmatch(r"eval/[^/]+", name) and not _OF_A_SET.search(name):
        return f"Held-out reward: {name.removeprefix('eval/')}"
    if name.startswith("reward/invalid/"):
        return f"Share of answers without a verdict: {name.rpartition('/')[2]}"
    return name


def memory_parts(name: str) -> tuple[str, str, str] | None:
    """(phase, party, kind) of a memory metric."""
    if match := _MEMORY.fullmatch(name):
        phase, party, kind = match.groups()
        return phase, _PARTIES[party], kind
    return None


def number(value: float | None) -> str:
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.3g}"


def seconds(value: float | None) -> str:
    if value is None or not math.isfinite(value) or value == 0:
        return number(value) + (" s" if value is not None else "")
    if abs(value) < 0.1:
        return f"{value * 1000:.3g} ms"
    for unit, scale in (("h", 3600), ("min", 60)):
        if abs(value) >= 2 * scale:
            return f"{value / scale:,.1f} {unit}"
    return f"{value:.3g} s"


def size(value: float | None) -> str:
    """Of bytes."""
    if value is None:
        return "–"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:,.3g} {unit}"
    return f"{value:.0f} B"


def percent(share: float | None) -> str:
    if share is None or not math.isfinite(share):
        return "–"
    return f"{100 * share:.2g} %" if abs(share) < 0.1 else f"{100 * share:.0f} %"
