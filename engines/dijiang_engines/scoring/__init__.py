"""How well a model predicts given texts: perplexity, and how far two models' predictions are apart."""
