"""What other libraries call: Hugging Face's `generate()`, lm-evaluation-harness; and comparison with HF's own model."""
