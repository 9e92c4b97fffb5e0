"""How parameters, gradients and activations are laid out."""
