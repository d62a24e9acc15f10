"""Executors: rollout jobs in, finished jobs out, wherever the workers are."""
