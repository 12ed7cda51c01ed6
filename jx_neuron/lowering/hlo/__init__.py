"""HLO modules: protocol buffers, a read-only graph of them, and rewriting."""
