"""Multiple choice by likelihood: of the letters that may follow the question, which does the model find likeliest?

Nothing is sampled, so a model that has not learnt to answer with a letter alone is examined like one that has.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from nanochat.evaluation.questions import Verdict, render_question
from nanochat.evaluation.sharing import right_padded
from nanochat.model.gpt import GPT
from nanochat.tasks.task import Problem
from nanochat.tokenizer.tokenizer import Tokenizer


@torch.no_grad()
def judge_choices(model: GPT, tokenizer: Tokenizer, problems: Sequence[Problem]) -> list[Verdict]:
    """Answer one batch of multiple-choice problems.

    Choices are told apart by their first token. The logits are float32 even where the model computes in bfloat16, in
    which two letters often have the same one; the cap on logits changes no order and is left out. If two are equal, the
    earlier choice is taken.

    Raises:
        ValueError: a problem's choices do not begin with different tokens, or its answer is not among them.
    """
    questions = [render_question(tokenizer, problem, model.config.sequence_len) for problem in problems]
    prompts = [prompt for prompt, _ in questions]
    hidden_BTC = model.hidden_states(right_padded(prompts, model.lm_head.weight.device))
    last_B = torch.tensor([len(prompt) - 1 for prompt in prompts], device=hidden_BTC.device)
    hidden_BC = hidden_BTC[torch.arange(len(prompts), device=hidden_BTC.device), last_B]
    logits_BV = F.linear(hidden_BC.float(), model.lm_head.weight)
    verdicts = []
    for problem, (_, cut), logits_V in zip(problems, questions, logits_BV, strict=True):
        tokens = [tokenizer.encode(choice)[0] for choice in problem.choices]
        if problem.answer not in problem.choices or len(set(tokens)) < len(tokens):
            raise ValueError(f"{problem.answer!r} cannot be told apart among the choices {problem.choices}")
        logits = logits_V[tokens].tolist()
        chosen = problem.choices[logits.index(max(logits))]
        verdicts.append(Verdict(chosen == problem.answer, cut))
    return verdicts
