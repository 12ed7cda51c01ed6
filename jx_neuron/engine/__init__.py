"""From prompts to tokens: requests, slots, schedules, and when an answer ends."""
