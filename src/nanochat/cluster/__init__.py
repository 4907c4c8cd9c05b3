"""The machine around a run: what it offers, and what is wrong with it."""
