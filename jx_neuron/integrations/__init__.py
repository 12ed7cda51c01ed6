"""Adapters to Hugging Face's `generate()` and lm-evaluation-harness, and parity checks against HF's own models."""
