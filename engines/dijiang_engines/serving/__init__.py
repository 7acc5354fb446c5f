"""Many users of one model: continuous batching over a runner, and an OpenAI-compatible server around it."""
