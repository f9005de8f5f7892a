"""Composes the steps into the mmkd command: CLI, job submission, diagnosis, demo. Nobody imports it."""
