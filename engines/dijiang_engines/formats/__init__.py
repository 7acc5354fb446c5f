"""Files: bundles, engines, recorded cases and ONNX graphs, read with care and written whole or not at all."""
