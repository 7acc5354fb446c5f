"""OpenVINO behind the Runner protocol, on CPUs and, untried, on Intel's GPUs."""
