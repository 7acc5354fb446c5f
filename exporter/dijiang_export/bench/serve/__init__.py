"""Measuring servers with an OpenAI-compatible API."""
