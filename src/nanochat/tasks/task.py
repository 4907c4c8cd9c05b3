"""What a task is: conversations to train on, problems to be examined with, and how an answer is judged."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from nanochat.corpus.conversation import Conversation

Split = Literal["train", "test"]
# `talk` has no right answers; `choice` is answered with one of a few letters, scored by likelihood; `generative` is
# answered in free text, which is then judged.
Kind = Literal["talk", "choice", "generative"]


@dataclass(frozen=True)
class Problem:
    """A conversation whose last message is the reference answer.

    Attributes:
        conversation: question and reference answer.
        choices: of a multiple-choice problem, the texts it can be answered with (`A`, `B`, …), one of which is the
            reference answer.
    """

    conversation: Conversation
    choices: tuple[str, ...] = ()

    @property
    def answer(self) -> str:
        """The text of the reference answer."""
        return self.conversation.messages[-1].text


@dataclass(frozen=True)
class Task:
    """One source of conversations.

    Attributes:
        name: as on the command line.
        kind: how it is examined.
        problems: all problems of a split, always the same ones in the same order. Train and test share none.
        is_correct: judges an answer in free text; generative tasks only.
        chance: the accuracy of guessing, 0 to 1.
    """

    name: str
    kind: Kind
    problems: Callable[[Split], Sequence[Problem]]
    is_correct: Callable[[Problem, str], bool] | None = None
    chance: float = 0.0
