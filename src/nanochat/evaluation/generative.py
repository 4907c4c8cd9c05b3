"""Problems answered in free text: the model writes, the task judges what a person would read of it."""

from collections.abc import Sequence

from nanochat.chat.engine import Engine, Sampling
from nanochat.evaluation.questions import Verdict, render_question
from nanochat.tasks.task import Problem, Task
from nanochat.tokenizer.tokenizer import Tokenizer

# What stands between these is a call of the tool or what it answered, which the text of a message leaves out.
HIDDEN = {"<|python_start|>": "<|python_end|>", "<|output_start|>": "<|output_end|>"}


def visible_text(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """What a person reads of an answer: no tool calls, no tool output, no special tokens.

    It is what `Message.text` is of a reference answer. A tool call that never ends hides all that follows.
    """
    ends = {tokenizer.special_id(start): tokenizer.special_id(end) for start, end in HIDDEN.items()}
    special = set(tokenizer.special_ids.values())
    visible, end = [], None
    for token in tokens:
        if end is not None:
            end = None if token == end else end
        elif token in ends:
            end = ends[token]
        elif token not in special:
            visible.append(token)
    return tokenizer.decode(visible)


def judge_texts(engine: Engine, task: Task, problems: Sequence[Problem], max_new_tokens: int) -> list[Verdict]:
    """Answer one batch of problems greedily and judge the answers.

    Args:
        max_new_tokens: the longest answer. A question is cut where it leaves no room for it, but not to less than half
            of the context.
    """
    if task.is_correct is None:
        raise ValueError(f"the task {task.name} has no way to judge an answer")
    sequence_len = engine.config.sequence_len
    room = max(sequence_len - max_new_tokens, sequence_len // 2)
    questions = [render_question(engine.tokenizer, problem, room) for problem in problems]
    answers = engine.generate(
        [prompt for prompt, _ in questions], Sampling(max_new_tokens=max_new_tokens), batch_size=len(problems)
    )
    return [
        Verdict(task.is_correct(problem, visible_text(engine.tokenizer, answer)), cut)
        for problem, answer, (_, cut) in zip(problems, answers, questions, strict=True)
    ]
