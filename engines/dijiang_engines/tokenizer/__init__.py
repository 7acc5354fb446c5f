"""Text to tokens and back, for tokenizer.json files of strangers."""
