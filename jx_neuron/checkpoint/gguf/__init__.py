"""GGUF, the files of llama.cpp: the format, the models of architecture "llama", and their tokenizers."""
