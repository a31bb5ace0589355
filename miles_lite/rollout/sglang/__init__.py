"""Rollouts by SGLang servers."""
