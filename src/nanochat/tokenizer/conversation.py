"""Conversations as tokens, with a mask that says which of them the model is trained to say.

    <|bos|> <|user_start|> … <|user_end|> <|assistant_start|> … <|assistant_end|> <|user_start|> …

Inside an assistant's message, `<|python_start|> 6*7 <|python_end|>` calls the tool and `<|output_start|> 42
<|output_end|>` is what it answered. Trained on are the assistant's texts and calls with the tokens that end them, as it
must learn to stop; not what the user says, nor what the tool answers, nor the tokens that the engine places itself.

Text that spells a special token stays plain text, whoever wrote it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nanochat.corpus.conversation import Conversation, Message
from nanochat.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class RenderedConversation:
    """Token ids and, for each, whether the model is trained to say it.

    Attributes:
        ids: token ids, BOS first.
        trained: as long as `ids`.
        is_cut: whether something was left out at the end to keep to a limit.
    """

    ids: list[int]
    trained: list[bool]
    is_cut: bool = False


def render_message(tokenizer: Tokenizer, message: Message) -> tuple[list[int], list[bool]]:
    """One message with its start and end tokens, and which of them are trained on."""
    special = tokenizer.special_id
    if message.role == "user":
        ids = [special("<|user_start|>"), *tokenizer.encode(message.text), special("<|user_end|>")]
        return ids, [False] * len(ids)
    ids, trained = [special("<|assistant_start|>")], [False]
    for part in message.parts:
        tokens = tokenizer.encode(part.text)
        if part.kind == "python":
            tokens = [special("<|python_start|>"), *tokens, special("<|python_end|>")]
        elif part.kind == "python_output":
            tokens = [special("<|output_start|>"), *tokens, special("<|output_end|>")]
        ids += tokens
        trained += [part.kind != "python_output"] * len(tokens)
    return [*ids, special("<|assistant_end|>")], [*trained, True]


def render_conversation(
    tokenizer: Tokenizer, conversation: Conversation, max_tokens: int | None = None
) -> RenderedConversation:
    """A conversation to train on.

    Args:
        max_tokens: the longest result. What is too long is cut after the last answer that fits; if not even the first
            does, in the middle of it, without an end that would teach the model to stop there. The result can then be
            without a trained token, when the first question alone fills it.
    """
    ids, trained = [tokenizer.bos_id], [False]
    # Where the last whole answer ended.
    whole = 0
    for message in conversation.messages:
        message_ids, message_trained = render_message(tokenizer, message)
        ids += message_ids
        trained += message_trained
        if max_tokens is not None and len(ids) > max_tokens:
            cut = whole or max_tokens
            return RenderedConversation(ids[:cut], trained[:cut], is_cut=True)
        if message.role == "assistant":
            whole = len(ids)
    return RenderedConversation(ids, trained)


def render_prompt(tokenizer: Tokenizer, messages: Sequence[Message], max_tokens: int | None = None) -> list[int]:
    """The tokens after which the model answers the last message, which is the user's.

    Args:
        max_tokens: the longest result. What is too long loses its oldest exchanges, and then the beginning of the last
            question.

    Raises:
        ValueError: the last message is not the user's, or `max_tokens` leaves no room for one.
    """
    if not messages or messages[-1].role != "user":
        raise ValueError("the last message of a prompt is the user's")
    frame = [tokenizer.bos_id], [tokenizer.special_id("<|assistant_start|>")]
    rendered = [render_message(tokenizer, message)[0] for message in messages]
    if max_tokens is not None:
        room = max_tokens - 2
        if room < 3:
            raise ValueError(f"{max_tokens} tokens leave no room for a question")
        while len(rendered) > 1 and sum(map(len, rendered)) > room:
            # A question goes with its answer.
            rendered = rendered[2:]
        start, *question = rendered[-1]
        rendered[-1] = [start, *question[-(room - 1) :]]
    return [*frame[0], *(token for message in rendered for token in message), *frame[1]]
