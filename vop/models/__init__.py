"""Networks: frozen backbones, the trained encoder, and how their outputs become descriptors."""
