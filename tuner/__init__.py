"""Tuner: a KAITO Workspace with a tuning section in, a pushed LoRA adapter image out."""

__version__ = "0.1.0"
