"""Multiple choice as text: a question, its choices, and the letter that answers it."""

import string
from collections.abc import Sequence

from nanochat.corpus.conversation import Conversation, assistant, user
from nanochat.tasks.task import Problem

LETTERS = string.ascii_uppercase


def multiple_choice(question: str, choices: Sequence[str], correct_index: int) -> Problem:
    """A problem that is answered with one letter.

    The letter stands after its choice and without a space before it, a finding of karpathy/nanochat: so a small model,
    which binds a letter to the text that it has just read, learns it far more easily, and the letter is the same token
    here and in the answer.

    Args:
        correct_index: of `choices`, from 0.

    Raises:
        ValueError: there are no two choices, more than there are letters, or no such choice.
    """
    if not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"a question with {len(choices)} choices is no multiple choice")
    if not 0 <= correct_index < len(choices):
        raise ValueError(f"choice {correct_index} of {len(choices)} is not there")
    letters = LETTERS[: len(choices)]
    listed = "".join(f"- {choice}={letter}\n" for choice, letter in zip(choices, letters))
    text = f"Multiple Choice question: {question}\n{listed}\nRespond only with the letter of the correct answer."
    return Problem(Conversation((user(text), assistant(letters[correct_index]))), tuple(letters))
