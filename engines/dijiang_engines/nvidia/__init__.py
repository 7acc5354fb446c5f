"""NVIDIA's libraries as this project uses them: the CUDA runtime, and TensorRT in its versions."""
