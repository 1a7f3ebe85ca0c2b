"""Every kernel, as compiled for NVIDIA GPUs, against float64 on a CPU."""
