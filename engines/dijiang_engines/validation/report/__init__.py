"""A validation as an HTML page."""
