"""Problems as prompts, the same for every model: base models are examined in the format of conversations too."""

from dataclasses import dataclass

from nanochat.tasks.task import Problem
from nanochat.tokenizer.conversation import render_prompt
from nanochat.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Verdict:
    """How one problem went: whether it was solved, and whether its question had to be cut to fit the context."""

    correct: bool
    cut: bool


def render_question(tokenizer: Tokenizer, problem: Problem, max_tokens: int) -> tuple[list[int], bool]:
    """The prompt that asks for a problem's answer, and whether it was cut to `max_tokens`."""
    messages = problem.conversation.messages[:-1]
    prompt = render_prompt(tokenizer, messages)
    if len(prompt) <= max_tokens:
        return prompt, False
    return render_prompt(tokenizer, messages, max_tokens), True


def question_length(problem: Problem) -> int:
    """How long a problem's question is, in characters."""
    return sum(len(message.text) for message in problem.conversation.messages[:-1])
