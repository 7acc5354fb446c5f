"""The matrix products of a model's layers on a GPU, of few rows and of many, and others' beside them."""
