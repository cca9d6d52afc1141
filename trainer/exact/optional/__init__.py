"""Off by default, for GPUs: CUDA graphs, and an exchange that begins under the last backward. They change no bit."""
