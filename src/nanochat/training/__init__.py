"""Optimizer steps: one loop, what differs between stages, and checkpoints."""
