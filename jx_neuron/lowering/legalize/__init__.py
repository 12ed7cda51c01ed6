"""Rewriting a partitioned program into what neuronx-cc takes."""
