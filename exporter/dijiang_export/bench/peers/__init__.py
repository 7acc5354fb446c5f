"""Other ways to run a model of the same shape."""
