"""From prompts to text: the decode loop, sessions, stop strings."""
