"""From the reference model to ONNX graphs: the op contract, tracing, lowering and writing."""
