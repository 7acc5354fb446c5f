"""Records of benchmarks side by side."""
