"""Chat in a terminal: text as it comes, tool calls in brackets, and a history that may outgrow the context."""

import codecs
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace

from nanochat.chat.engine import Engine, Sampling
from nanochat.checkpoint.trained_model import TrainedModel
from nanochat.corpus.conversation import Message, Part, PartKind, user
from nanochat.errors import StopSignal
from nanochat.tokenizer.conversation import render_prompt
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.tracking.console import Console

KIND_AFTER: dict[str, PartKind] = {
    "<|python_start|>": "python",
    "<|python_end|>": "text",
    "<|output_start|>": "python_output",
    "<|output_end|>": "text",
}
# What is shown between parts: `[6*7 = 42]` for a call and its output.
MARKS: dict[tuple[PartKind, PartKind], str] = {
    ("text", "python"): "[",
    ("text", "python_output"): "[",
    ("python", "python_output"): " = ",
    ("python", "text"): "]",
    ("python_output", "text"): "]",
    ("python_output", "python"): "] [",
}
# A model may say anything, an escape sequence too: a terminal gets line breaks and tabs, and no other control.
CONTROL = dict.fromkeys(code for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t")

Write = Callable[[str], None]


class Chat:
    """A conversation with a model, or a series of texts that a base model continues.

    Args:
        trained: the model. One of stage `base` knows no conversations: each prompt is a text of its own.
        console: where a warning goes.
    """

    def __init__(self, trained: TrainedModel, console: Console) -> None:
        self.trained = trained
        self.console = console
        self.engine = Engine(trained.model, trained.tokenizer)
        self.messages: list[Message] = []
        self.turns = 0
        self.has_warned = False

    def clear(self) -> None:
        """Begin anew."""
        self.messages, self.turns, self.has_warned = [], 0, False
        self.engine.forget()

    def answer(self, prompt: str, sampling: Sampling, write: Write) -> str:
        """Answer, writing the text as it comes, and remember both for the next turn.

        What was said before an interruption is remembered as well.

        Returns:
            All that was written.
        """
        tokens = self._tokens(prompt, sampling.max_new_tokens)
        # Another seed each turn: the same question again may get another answer.
        tokens_said = self.engine.stream(tokens, replace(sampling, seed=sampling.seed + self.turns))
        self.turns += 1
        said = [Part("text", "")]
        written: list[str] = []

        def show(kind: PartKind, text: str) -> None:
            written.append((MARKS.get((said[-1].kind, kind), "") + text).translate(CONTROL))
            write(written[-1])

        try:
            for piece in read_pieces(self.trained.tokenizer, tokens_said):
                show(piece.kind, piece.text)
                if piece.kind == said[-1].kind:
                    piece = replace(piece, text=said.pop().text + piece.text)
                said.append(piece)
            show("text", "")
        finally:
            self.messages += [user(prompt), Message("assistant", tuple(said))]
        return "".join(written)

    def _tokens(self, prompt: str, max_new_tokens: int) -> list[int]:
        """The prompt with as much of what came before as leaves room for an answer, up to half of the context."""
        tokenizer, context = self.trained.tokenizer, self.trained.model.config.sequence_len
        room = max(context - max_new_tokens, context // 2)
        if self.trained.stage == "base":
            text = tokenizer.encode(prompt)
            tokens, is_cut = [tokenizer.bos_id, *text[-(room - 1) :]], len(text) >= room
        else:
            messages = [*self.messages, user(prompt)]
            tokens = render_prompt(tokenizer, messages, room)
            is_cut = len(render_prompt(tokenizer, messages)) > room
        if is_cut and not self.has_warned:
            self.has_warned = True
            self.console.warning(f"more than a context of {context} tokens has room for: the oldest part is left out")
        return tokens


def read_pieces(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[Part]:
    """An answer bit by bit, each as much as its last token completes.

    A character that takes several tokens comes whole; bytes that are not UTF-8 become U+FFFD.
    """
    kind_after = {tokenizer.special_id(name): kind for name, kind in KIND_AFTER.items()}
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    kind: PartKind = "text"
    for token in tokens:
        following = kind_after.get(token)
        text = decoder.decode(b"" if following else tokenizer.decode_bytes([token]), final=following is not None)
        if text:
            yield Part(kind, text)
        kind = following or kind
    if text := decoder.decode(b"", final=True):
        yield Part(kind, text)


def answer(trained: TrainedModel, prompt: str, sampling: Sampling, write: Write) -> str:
    """Answer one prompt, or continue it if the model is a base model, writing the text as it comes.

    Returns:
        All that was written: the answer, with tool calls in brackets.
    """
    return Chat(trained, Console()).answer(prompt, sampling, write)


def chat_in_terminal(trained: TrainedModel, sampling: Sampling, console: Console) -> None:
    """Answer line after line, until Ctrl-D or `/quit`. Ctrl-C ends an answer, and between answers the program."""
    # With it, input() has a history and can be edited. Not every Python has it.
    with suppress(ImportError):
        import readline  # noqa: F401

    chat = Chat(trained, console)
    interactive = sys.stdin.isatty()
    console.info(
        f"{trained.tag} after {trained.step} steps of {trained.stage}. "
        "/clear starts anew, Ctrl-C ends an answer, /quit or Ctrl-D the program."
    )
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except StopSignal:
            raise
        except (EOFError, KeyboardInterrupt):
            write_out("\n" if interactive else "")
            return
        if line == "/quit":
            return
        if line == "/clear":
            chat.clear()
        elif line:
            try:
                chat.answer(line, sampling, write_out)
            except StopSignal:
                raise
            except KeyboardInterrupt:
                pass
            write_out("\n")


def write_out(text: str) -> None:
    """Write to stdout at once; what its encoding lacks becomes `?`."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()
