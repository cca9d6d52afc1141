"""DeepSpeed, optimizers, learning rates and devices: what updates the parameters."""
