"""GGUF, the files of llama.cpp: the format, its architectures as HF's models, and their tokenizers."""
