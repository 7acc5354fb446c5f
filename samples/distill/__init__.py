"""A pre-trained Transformer into a DiJiang model, by distillation on one GPU: `python -m samples.distill`."""
