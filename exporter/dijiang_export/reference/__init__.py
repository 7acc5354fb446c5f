"""The reference model: DiJiang's mathematics in PyTorch, in three forms, for any precision and device."""
