"""The OpenAI-compatible side of the server: requests in, answers and streams out."""
