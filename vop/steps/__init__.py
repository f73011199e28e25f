"""What the flows of `vop.pipeline` are made of: one module for each artefact, which it brings up to date."""
