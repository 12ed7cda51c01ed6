"""One CPU: how weights and state tables are laid out in its memory."""
