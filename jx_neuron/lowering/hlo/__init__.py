"""HLO modules: their protocol buffers, read as a graph, and rewritten."""
