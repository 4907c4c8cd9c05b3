"""Text small enough to train on in seconds."""


def small_texts() -> list[str]:
    """Four hundred short documents with patterns that a tiny model learns in a few steps."""
    return [f"{number} plus {number % 7} is {number + number % 7}. " * (1 + number % 5) for number in range(400)]
