"""Talking to a model: the engine that generates, the calculator it may call, and the terminal."""
