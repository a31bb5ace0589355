"""Names that users of Miles and slime, verl, NeMo-RL and TRL bring along, and ours for them.

docs/algorithms.md has them as a table. Only for error messages: nothing is translated silently, as
the same name often counts something else.
"""

from __future__ import annotations

_SAMPLES = "train.global_batch, which counts samples, not prompts"
_TEMPLATE = "data.template_kwargs"

KEYS = {
    # sizes
    "rollout_batch_size": "rollout.num_prompts",
    "n_samples_per_prompt": "rollout.samples_per_prompt",
    "global_batch_size": "train.global_batch",
    "num_steps_per_rollout": "train.updates_per_step",
    "num_rollout": "train.num_steps",
    "max_tokens_per_gpu": "train.max_tokens_per_micro_batch",
    "rollout_max_response_len": "rollout.max_response_tokens",
    "rollout_max_prompt_len": "data.max_prompt_tokens",
    "train_batch_size": "rollout.num_prompts",
    "ppo_mini_batch_size": _SAMPLES,
    "ppo_max_token_len_per_gpu": "train.max_tokens_per_micro_batch",
    "max_prompt_length": "data.max_prompt_tokens",
    "max_response_length": "rollout.max_response_tokens",
    "max_completion_length": "rollout.max_response_tokens",
    "total_training_steps": "train.num_steps",
    "num_prompts_per_step": "rollout.num_prompts",
    "num_generations_per_prompt": "rollout.samples_per_prompt",
    "num_generations": "rollout.samples_per_prompt",
    "max_num_steps": "train.num_steps",
    "max_steps": "train.num_steps",
    "train_global_batch_size": "train.global_batch",
    "num_iterations": "train.updates_per_step, each on other samples: none is trained on twice",
    # advantages
    "adv_estimator": "algo.advantage_estimator",
    "disable_grpo_std_normalization": "algo.normalize_std=false",
    "norm_adv_by_std_in_grpo": "algo.normalize_std",
    "normalize_rewards": "algo.normalize_std",
    "scale_rewards": "algo.normalize_std",
    "normalize_advantages": "algo.whiten",
    "use_leave_one_out_baseline": "algo.advantage_estimator=rloo",
    # loss
    "clip_ratio": "algo.eps_clip and algo.eps_clip_high",
    "clip_ratio_low": "algo.eps_clip",
    "clip_ratio_high": "algo.eps_clip_high",
    "clip_ratio_c": "algo.eps_clip_c",
    "ratio_clip_min": "algo.eps_clip",
    "ratio_clip_max": "algo.eps_clip_high",
    "ratio_clip_c": "algo.eps_clip_c",
    "epsilon": "algo.eps_clip",
    "epsilon_high": "algo.eps_clip_high",
    "loss_mode": "algo.policy_loss",
    "importance_sampling_level": "algo.policy_loss=gspo for sequences",
    "loss_agg_mode": "algo.aggregation",
    "loss_type": "algo.aggregation, or algo=dr_grpo, algo=dapo, algo=cispo",
    "token_level_loss": "algo.aggregation=token",
    "calculate_per_token_loss": "algo.aggregation=token",
    "entropy_coeff": "algo.entropy_coef",
    "use_opsm": "algo.opsm_delta above 0",
    "off_policy_mask_threshold": "algo.opsm_delta",
    # KL and reference
    "use_kl_loss": "algo.kl_loss_coef above 0",
    "use_kl_in_reward": "algo.kl_coef above 0",
    "kl_penalty": "algo.kl_loss_type",
    "reference_policy_kl_penalty": "algo.kl_loss_coef",
    "beta": "algo.kl_loss_coef",
    "use_bias_correction_kl": "algo.use_unbiased_kl",
    "ref_model_sync_steps": "algo.ref_update_interval",
    # train/rollout correction
    "use_rollout_logprobs": "algo.old_logprobs=rollout",
    "bypass_mode": "algo.old_logprobs=rollout",
    "use_rollout_routing_replay": "algo.routing_replay",
    "use_tis": "algo.correction.weight=token",
    "tis_clip": "algo.correction.high",
    "tis_clip_low": "algo.correction.low",
    "rollout_is": "algo.correction.weight",
    "rollout_is_threshold": "algo.correction.high",
    "rollout_rs": "algo.correction.reject",
    "rollout_rs_threshold": "algo.correction.reject_high",
    "rollout_token_veto_threshold": "algo.correction.veto",
    "use_importance_sampling_correction": "algo.correction.weight=token",
    "truncated_importance_sampling_ratio": "algo.correction.high",
    "vllm_importance_sampling_correction": "algo.correction.weight=token",
    "vllm_importance_sampling_cap": "algo.correction.high",
    # DAPO
    "dynamic_sampling_filter_path": "rollout.dynamic_sampling=true",
    "over_sampling_batch_size": "rollout.over_sampling",
    "filter_groups": "rollout.dynamic_sampling=true",
    "gen_batch_size": "rollout.over_sampling",
    "use_dynamic_sampling": "rollout.dynamic_sampling",
    "overlong_buffer_cfg": "algo.overlong_buffer and algo.overlong_penalty",
    "overlong_filtering": "algo.overlong_filter",
    "mask_truncated_completions": "algo.overlong_filter",
    # data and rewards
    "prompt_data": "data.train",
    "train_files": "data.train",
    "val_files": "data.eval",
    "eval_prompt_data": "data.eval",
    "input_key": "data.train.NAME.prompt_key",
    "apply_chat_template_kwargs": _TEMPLATE,
    "chat_template_kwargs": _TEMPLATE,
    "filter_overlong_prompts": "data.max_too_long_ratio",
    "rm_type": "reward.file and reward.function, or metadata of a data row",
    "custom_rm_path": "reward.file and reward.function",
    "custom_reward_function": "reward.file and reward.function",
    # the rest
    "hf_checkpoint": "model.path",
    "model_name_or_path": "model.path",
    "learning_rate": "optim.lr",
    "grad_clip": "optim.clip_grad",
    "max_grad_norm": "optim.clip_grad",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "tensor_model_parallel_size": "parallel.tp",
    "pipeline_model_parallel_size": "parallel.pp",
    "expert_model_parallel_size": "parallel.ep",
    "expert_tensor_parallel_size": "parallel.expert_tp",
    "rollout_num_gpus_per_engine": "rollout.engine.tp",
    "rollout_temperature": "rollout.temperature",
}

VALUES = {
    "algo.advantage_estimator": {
        "gspo": "algo.policy_loss=gspo with grpo",
        "cispo": "algo.policy_loss=cispo with grpo",
        "dr_grpo": "grpo with algo.normalize_std=false and algo.aggregation=constant",
        "reinforce++": "reinforce_plus_plus",
        "reinforce++_baseline": "reinforce_plus_plus_baseline",
        "reinforce_baseline": "reinforce_plus_plus_baseline",
        "group_norm": "grpo",
        "gae": "none: there is no critic",
        "ppo": "none: there is no critic",
    },
    "algo.policy_loss": {
        "vanilla": "ppo_clip",
        "ppo": "ppo_clip",
        "grpo": "ppo_clip",
        "sequence": "gspo",
    },
    "algo.aggregation": {
        "token-mean": "token",
        "seq-mean-token-mean": "sample",
        "seq-mean-token-sum": "constant with algo.aggregation_constant=1",
        "seq-mean-token-sum-norm": "constant",
        "grpo": "sample",
        "dapo": "token",
        "bnpo": "token",
        "dr_grpo": "constant",
    },
    "algo.kl_loss_type": {"kl": "k1", "mse": "k2", "k3+": "k3", "abs": "none"},
}


def own_key(name: str) -> str:
    """What a key of another framework, the last part of its path, is called here; or ""."""
    return KEYS.get(name, "")


def own_value(key: str, value: object) -> str:
    """What a value of our `key` is called here; or ""."""
    return VALUES.get(key, {}).get(str(value).lower(), "")
