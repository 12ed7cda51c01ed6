"""From prompts to tokens: requests, slots, scheduling, sampling on the host, and stopping."""
