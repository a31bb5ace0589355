"""miles-lite: GRPO post-training of hybrid Mamba-MoE models, from one laptop to a cluster."""
