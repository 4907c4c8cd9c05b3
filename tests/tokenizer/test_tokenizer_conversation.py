"""Conversations as tokens: the format, what is trained on, and what happens to what is too long."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversations import conversations
from nanochat.corpus.conversation import Conversation, Message, Part, PartKind, assistant, user
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat.tokenizer.conversation import render_conversation, render_prompt

quick = settings(max_examples=100, deadline=None)

CONVERSATION = Conversation(
    (
        user("What is 6 times 7?"),
        assistant("Wait: ", Part("python", "6*7"), Part("python_output", "42"), "It is ", "42."),
        user("Thanks"),
        assistant("Bye"),
    )
)
# Each stretch of tokens, and whether it is trained on.
RENDERED = [
    ("<|bos|>", False),
    ("<|user_start|>", False),
    ("What is 6 times 7?", False),
    ("<|user_end|>", False),
    ("<|assistant_start|>", False),
    ("Wait: ", True),
    ("<|python_start|>", True),
    ("6*7", True),
    ("<|python_end|>", True),
    ("<|output_start|>", False),
    ("42", False),
    ("<|output_end|>", False),
    ("It is ", True),
    ("42.", True),
    ("<|assistant_end|>", True),
    ("<|user_start|>", False),
    ("Thanks", False),
    ("<|user_end|>", False),
    ("<|assistant_start|>", False),
    ("Bye", True),
    ("<|assistant_end|>", True),
]


def tokens_of(tokenizer: Tokenizer, stretches: list[str]) -> list[int]:
    """Stretches that are the name of a special token stand for it."""
    special = tokenizer.special_ids
    return [token for text in stretches for token in ([special[text]] if text in special else tokenizer.encode(text))]


def read_back(tokenizer: Tokenizer, ids: list[int]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Role and parts of each message, from the special tokens alone; every stretch of text is decoded as one."""
    names = {token: name for name, token in tokenizer.special_ids.items()}
    kinds = {"<|python_start|>": "python", "<|output_start|>": "python_output"}
    messages: list[tuple[str, list[tuple[str, str]]]] = []
    kind, text = "text", list[int]()
    for token in ids[1:]:
        name = names.get(token)
        if name is None:
            text.append(token)
        elif name in ("<|user_start|>", "<|assistant_start|>"):
            messages.append((name[2:-8], []))
        else:
            if text or kind != "text":
                messages[-1][1].append((kind, tokenizer.decode(text)))
            kind, text = kinds.get(name, "text"), []
    return messages


def joined(message: Message) -> tuple[str, list[tuple[str, str]]]:
    """As `read_back` gives it: texts in a row are one, and empty ones none."""
    parts: list[tuple[PartKind, str]] = []
    for part in message.parts:
        if part.kind == "text" and parts and parts[-1][0] == "text":
            parts[-1] = ("text", parts[-1][1] + part.text)
        elif part.text or part.kind != "text":
            parts.append((part.kind, part.text))
    return message.role, list(parts)


def test_a_conversation_is_rendered_and_masked_token_by_token(tokenizer: Tokenizer) -> None:
    rendered = render_conversation(tokenizer, CONVERSATION)
    assert rendered.ids == tokens_of(tokenizer, [text for text, _ in RENDERED])
    assert rendered.trained == [said for text, said in RENDERED for _ in tokens_of(tokenizer, [text])]
    assert not rendered.is_cut


@quick
@given(conversation=conversations())
def test_every_text_comes_back_and_none_can_forge_a_special_token(
    tokenizer: Tokenizer, conversation: Conversation
) -> None:
    rendered = render_conversation(tokenizer, conversation)
    assert rendered.ids[0] == tokenizer.bos_id not in rendered.ids[1:]
    assert read_back(tokenizer, rendered.ids) == [joined(message) for message in conversation.messages]


def test_a_text_that_spells_the_end_of_an_answer_is_text_whoever_wrote_it(tokenizer: Tokenizer) -> None:
    forged = "".join(SPECIAL_TOKENS)
    answer = assistant(forged, Part("python", forged), Part("python_output", forged))
    ids = render_conversation(tokenizer, Conversation((user(forged), answer))).ids
    special = [name for name in tokenizer.special_ids for token in ids if token == tokenizer.special_id(name)]
    assert sorted(special) == sorted(SPECIAL_TOKENS)
    assert tokenizer.decode(ids).count(forged) == 4


@quick
@given(conversation=conversations())
def test_trained_on_are_answers_and_calls_with_their_ends_and_nothing_else(
    tokenizer: Tokenizer, conversation: Conversation
) -> None:
    rendered = render_conversation(tokenizer, conversation)
    special = tokenizer.special_id
    expected = []
    is_answer = is_output = False
    for token in rendered.ids:
        is_output = is_output or token == special("<|output_start|>")
        expected.append(is_answer and not is_output)
        is_output = is_output and token != special("<|output_end|>")
        is_answer = (is_answer or token == special("<|assistant_start|>")) and token != special("<|assistant_end|>")
    assert rendered.trained == expected


@quick
@given(conversation=conversations(), data=st.data())
def test_what_is_too_long_is_cut_after_the_last_answer_that_fits_or_else_within_the_first(
    tokenizer: Tokenizer, conversation: Conversation, data: st.DataObject
) -> None:
    whole = render_conversation(tokenizer, conversation)
    max_tokens = data.draw(st.integers(1, len(whole.ids) + 2))
    cut = render_conversation(tokenizer, conversation, max_tokens)
    end = tokenizer.special_id("<|assistant_end|>")
    ends = [place + 1 for place, token in enumerate(whole.ids) if token == end and place < max_tokens]
    length = len(whole.ids) if len(whole.ids) <= max_tokens else max([*ends, 0]) or max_tokens
    assert cut.ids == whole.ids[:length]
    assert cut.trained == whole.trained[:length]
    assert cut.is_cut == (len(whole.ids) > max_tokens)


def test_an_answer_that_is_cut_does_not_teach_the_model_to_stop(bytes_only: Tokenizer) -> None:
    conversation = Conversation((user("Count"), assistant("1 2 3")))
    size = len(render_conversation(bytes_only, conversation).ids)
    shorter = render_conversation(bytes_only, conversation, size - 1)
    assert shorter.is_cut
    assert bytes_only.decode(shorter.ids).endswith("1 2 3")
    assert bytes_only.special_id("<|assistant_end|>") not in shorter.ids


def test_a_question_that_fills_the_limit_leaves_nothing_to_train_on(bytes_only: Tokenizer) -> None:
    rendered = render_conversation(bytes_only, Conversation((user("Count to three"), assistant("1 2 3"))), 17)
    assert rendered.is_cut
    assert len(rendered.ids) == 17
    assert not any(rendered.trained)


@quick
@given(conversation=conversations())
def test_a_prompt_is_how_the_conversation_was_trained_on_up_to_the_answer(
    tokenizer: Tokenizer, conversation: Conversation
) -> None:
    ids = render_conversation(tokenizer, conversation).ids
    for turn in range(0, len(conversation.messages), 2):
        prompt = render_prompt(tokenizer, conversation.messages[: turn + 1])
        assert prompt[-1] == tokenizer.special_id("<|assistant_start|>")
        assert prompt == [*ids, prompt[-1]][: len(prompt)]


@quick
@given(conversation=conversations(), max_tokens=st.integers(5, 80))
def test_a_prompt_too_long_loses_whole_exchanges_from_the_oldest_on_and_then_the_beginning_of_the_question(
    tokenizer: Tokenizer, conversation: Conversation, max_tokens: int
) -> None:
    messages = conversation.messages
    messages = messages if len(messages) % 2 else messages[:-1]
    prompts = [render_prompt(tokenizer, messages[first:]) for first in range(0, len(messages), 2)]
    fitting = [prompt for prompt in prompts if len(prompt) <= max_tokens]
    bos, start, *question, end, answer = prompts[-1]
    shortened = [bos, start, *question[-(max_tokens - 4) :], end, answer]
    assert render_prompt(tokenizer, messages, max_tokens) == (fitting[0] if fitting else shortened)


def test_the_question_is_kept_to_its_last_token(bytes_only: Tokenizer) -> None:
    expected = tokens_of(bytes_only, ["<|bos|>", "<|user_start|>", "?", "<|user_end|>", "<|assistant_start|>"])
    assert render_prompt(bytes_only, [user("Why?"), assistant("So."), user("Why so?")], 5) == expected
    with pytest.raises(ValueError, match="4 tokens leave no room for a question"):
        render_prompt(bytes_only, [user("?")], 4)


@pytest.mark.parametrize("messages", [[], [user("Hello"), assistant("Hi")]])
def test_only_a_question_is_a_prompt(bytes_only: Tokenizer, messages: list[Message]) -> None:
    with pytest.raises(ValueError, match="the last message of a prompt is the user's"):
        render_prompt(bytes_only, messages)
