"""Training of the encoder: labels, pairs, loss, an epoch; plain PyTorch, without Ray."""
