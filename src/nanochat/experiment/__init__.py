"""Experiments: the same model trained on different data, with everything else provably equal, and compared."""
