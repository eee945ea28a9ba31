"""Evaluation harnesses of others, through the same rollout loop. The rest of the package imports nothing of it."""
