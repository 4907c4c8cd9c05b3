"""Chat as a person has it: text as it comes, tool calls readable, interruptions and long conversations survived."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripts import AFTER_CALL, CALL, successors, tokens_of, watch_passes

from models import random_model, scripted_model
from nanochat.chat.engine import Engine, Sampling
from nanochat.chat.terminal import Chat, answer, chat_in_terminal, read_pieces
from nanochat.checkpoint.store import save_checkpoint
from nanochat.checkpoint.trained_model import TrainedModel
from nanochat.corpus.conversation import Part, assistant, user
from nanochat.errors import ExitCode, StopSignal
from nanochat.model.gpt import GPT
from nanochat.tokenizer.conversation import render_prompt
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.tracking.console import Console
from nanochat.workspace import Stage, Workspace

VOCAB_SIZE = 320
GREEDY = Sampling(40)
ENDLESS = ("<|assistant_start|>", "x", "y", "x")


def trained(model: GPT, tokenizer: Tokenizer, stage: Stage = "sft") -> TrainedModel:
    return TrainedModel(model, tokenizer, stage, "tiny", 3, {}, "")


def calling_model(tokenizer: Tokenizer) -> GPT:
    return scripted_model(successors(tokenizer, CALL, AFTER_CALL), VOCAB_SIZE)


def save(workspace: Workspace, stage: Stage, model: GPT) -> None:
    identity = {"tokenizer": Tokenizer.load(workspace.tokenizer).fingerprint, "model": asdict(model.config)}
    save_checkpoint(
        workspace.checkpoints(stage, "tiny"),
        3,
        model=model.state_dict(),
        optimizer={"nothing": torch.zeros(1)},
        state={},
        config={"identity": identity},
        keep=1,
    )


class Terminal:
    """A `nanochat chat` that believes a person sits before it."""

    def __init__(self, process: "subprocess.Popen[bytes]", screen: int) -> None:
        self.process = process
        self.screen = screen
        self.shown = ""

    def enter(self, line: str) -> None:
        os.write(self.screen, line.encode() + b"\n")

    def wait_for(self, text: str) -> None:
        """Wait until the text appears after what was waited for before."""
        while text not in self.shown:
            assert select.select([self.screen], [], [], 60)[0], f"{text!r} never came, only {self.shown!r}"
            self.shown += os.read(self.screen, 4096).decode()
        self.shown = self.shown.partition(text)[2]


@contextmanager
def open_terminal(workspace: Workspace, *arguments: str) -> Iterator[Terminal]:
    screen, keyboard = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "nanochat", "chat", *arguments],
        env={**os.environ, "NANOCHAT_BASE_DIR": str(workspace.root), "TERM": "dumb"},
        stdin=keyboard,
        stdout=keyboard,
        stderr=keyboard,
    )
    os.close(keyboard)
    try:
        yield Terminal(process, screen)
    finally:
        process.kill()
        process.wait()
        os.close(screen)


def test_one_prompt_is_answered_on_stdout_and_nothing_else_is(
    prepared_workspace: Workspace, tokenizer: Tokenizer, run_command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    save(prepared_workspace, "sft", calling_model(tokenizer))
    result = run_command("chat", "-p", "What is 6 times 7?", "--temperature", "0", workspace=prepared_workspace.root)
    assert (result.returncode, result.stdout, result.stderr) == (0, "[6*7 = 42]fine.\n", "")


def test_a_base_model_continues_plain_text(
    prepared_workspace: Workspace, tokenizer: Tokenizer, run_command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    save(prepared_workspace, "base", scripted_model(successors(tokenizer, ("?abc", "<|bos|>")), VOCAB_SIZE))
    arguments = ("chat", "-i", "base", "-p", "?", "--top-k", "1")
    result = run_command(*arguments, workspace=prepared_workspace.root)
    assert (result.returncode, result.stdout) == (0, "abc\n")


def test_a_stage_without_a_checkpoint_names_the_command_that_makes_it(
    prepared_workspace: Workspace, run_command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    result = run_command("chat", "-i", "mid", "-p", "hello", workspace=prepared_workspace.root)
    assert result.returncode == ExitCode.USAGE
    assert "nanochat train mid" in result.stderr


def test_lines_from_a_pipe_are_answered_one_by_one(prepared_workspace: Workspace, tokenizer: Tokenizer) -> None:
    save(prepared_workspace, "mid", calling_model(tokenizer))
    result = subprocess.run(
        [sys.executable, "-m", "nanochat", "chat", "--stage", "mid", "--temperature", "0"],
        env={**os.environ, "NANOCHAT_BASE_DIR": str(prepared_workspace.root)},
        input="one\n\ntwo\n",
        capture_output=True,
        text=True,
        check=True,
    )
    introduction, *answers = result.stdout.splitlines()
    assert introduction.startswith("tiny after 3 steps of mid")
    assert answers == ["[6*7 = 42]fine."] * 2


def test_a_conversation_in_a_terminal(prepared_workspace: Workspace, tokenizer: Tokenizer) -> None:
    save(prepared_workspace, "sft", calling_model(tokenizer))
    with open_terminal(prepared_workspace, "--temperature", "0") as terminal:
        terminal.wait_for("> ")
        terminal.enter("What is 6 times 7?")
        terminal.wait_for("[6*7 = 42]fine.")
        terminal.wait_for("> ")
        terminal.enter("/clear")
        terminal.wait_for("> ")
        terminal.enter("/quit")
        assert terminal.process.wait(60) == 0


def test_control_c_ends_first_the_answer_and_then_the_program(
    prepared_workspace: Workspace, tokenizer: Tokenizer
) -> None:
    save(prepared_workspace, "sft", scripted_model(successors(tokenizer, ENDLESS), VOCAB_SIZE, sequence_len=30_000))
    with open_terminal(prepared_workspace, "--temperature", "0", "--max-new-tokens", "30000") as terminal:
        terminal.wait_for("> ")
        terminal.enter("Hello?")
        terminal.wait_for("xyxy")
        terminal.process.send_signal(signal.SIGINT)
        terminal.wait_for("> ")
        # Python does not notice a signal between showing the prompt and waiting for a key: a person tries again.
        tries = 0
        while terminal.process.returncode is None and tries < 10:
            tries += 1
            terminal.process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                terminal.process.wait(15)
        # One that has heard the first and is slow to end dies of the second.
        assert terminal.process.returncode in ((0,) if tries == 1 else (0, -signal.SIGINT))


def test_control_d_ends_the_program(prepared_workspace: Workspace, tokenizer: Tokenizer) -> None:
    save(prepared_workspace, "sft", calling_model(tokenizer))
    with open_terminal(prepared_workspace) as terminal:
        terminal.wait_for("> ")
        os.write(terminal.screen, b"\x04")
        assert terminal.process.wait(60) == 0


def test_an_answer_comes_token_by_token_and_is_what_the_engine_says(tokenizer: Tokenizer) -> None:
    model, written = random_model(vocab_size=VOCAB_SIZE), list[str]()
    sampling = Sampling(10, temperature=1.0, seed=3)
    text = answer(trained(model, tokenizer, "base"), "a", sampling, written.append)
    assert len(written) > 2
    assert "".join(written) == text
    tokens = Engine(model, tokenizer).generate([[tokenizer.bos_id, *tokenizer.encode("a")]], sampling)[0]
    plain = [token for token in tokens if token not in tokenizer.special_ids.values()]
    assert [character for character in tokenizer.decode(plain) if character.isalnum()] == [
        character for character in text if character.isalnum()
    ]


def test_the_next_turn_knows_the_ones_before_until_they_are_cleared(tokenizer: Tokenizer) -> None:
    chat = Chat(trained(calling_model(tokenizer), tokenizer), Console())
    chat.answer("one", GREEDY, lambda text: None)
    said = assistant(Part("text", ""), Part("python", "6*7"), Part("python_output", "42"), "fine.")
    assert chat.messages == [user("one"), said]
    chat.clear()
    assert chat.messages == []


def test_of_a_turn_only_what_is_new_is_computed(tokenizer: Tokenizer) -> None:
    model = scripted_model(successors(tokenizer, CALL, AFTER_CALL), VOCAB_SIZE, sequence_len=256)
    chat = Chat(trained(model, tokenizer), Console())
    first, second = "one " * 10, "two"
    chat.answer(first, GREEDY, lambda text: None)
    before = len(render_prompt(tokenizer, [user(first)]))
    passes = watch_passes(chat.engine)
    assert chat.answer(second, GREEDY, lambda text: None) == "[6*7 = 42]fine."
    assert passes[0] < (1, len(render_prompt(tokenizer, chat.messages[:-1])) - before + 1)
    # A conversation that is over leaves nothing behind.
    chat.clear()
    passes.clear()
    chat.answer(first, GREEDY, lambda text: None)
    assert passes[0] == (1, before)


def test_the_same_question_again_may_get_another_answer_and_a_fresh_chat_gets_the_same(tokenizer: Tokenizer) -> None:
    base = trained(random_model(vocab_size=VOCAB_SIZE), tokenizer, "base")
    sampling = Sampling(12, temperature=1.0)

    def two_answers() -> list[str]:
        chat = Chat(base, Console())
        return [chat.answer("a", sampling, lambda text: None) for _ in range(2)]

    assert two_answers() == two_answers()
    assert len(set(two_answers())) == 2


def test_what_was_said_before_an_interruption_is_remembered(tokenizer: Tokenizer) -> None:
    chat = Chat(trained(scripted_model(successors(tokenizer, ENDLESS), VOCAB_SIZE), tokenizer), Console())
    written = []

    def interrupt(text: str) -> None:
        written.append(text)
        if len(written) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.answer("one", GREEDY, interrupt)
    assert chat.messages == [user("one"), assistant("xy")]


def test_a_conversation_may_outgrow_the_context_and_that_is_said_once(
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Chat(trained(calling_model(tokenizer), tokenizer), Console())
    context = chat.trained.model.config.sequence_len
    for turn in range(6):
        assert chat.answer(f"question {turn}", GREEDY, lambda text: None) == "[6*7 = 42]fine."
        assert chat.answer("long " * 100, Sampling(1000), lambda text: None) == "[6*7 = 42]fine."
    assert capsys.readouterr().err.count(f"a context of {context} tokens") == 1
    # The newest exchanges that fit are still there, before the question.
    tokens = chat._tokens("and now?", 12)
    assert tokens == render_prompt(tokenizer, [*chat.messages, user("and now?")], context - 12)
    assert len(tokens) <= context - 12


def test_a_base_model_continues_the_end_of_a_text_that_is_too_long(
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    model = scripted_model(successors(tokenizer, ("?abc", "<|bos|>")), VOCAB_SIZE)
    assert answer(trained(model, tokenizer, "base"), "#" * 500 + "?", GREEDY, lambda text: None) == "abc"
    assert "oldest part is left out" in capsys.readouterr().err


def test_a_model_cannot_steer_the_terminal(tokenizer: Tokenizer) -> None:
    model = scripted_model(successors(tokenizer, ("?\x1b[2J\r\x07\n.", "<|bos|>")), VOCAB_SIZE)
    assert answer(trained(model, tokenizer, "base"), "?", GREEDY, lambda text: None) == "[2J\n."


@given(st.lists(st.one_of(st.sampled_from(["<|python_start|>", "<|output_end|>", "<|user_end|>"]), st.text())))
def test_characters_come_whole_whatever_stands_around_them(tokenizer: Tokenizer, script: list[str]) -> None:
    shown = [part.text for part in read_pieces(tokenizer, tokens_of(tokenizer, *script))]
    hidden = ("<|python_start|>", "<|output_end|>")
    assert "".join(shown) == "".join(piece for piece in script if piece not in hidden)


def test_a_character_that_is_cut_off_becomes_a_replacement(tokenizer: Tokenizer) -> None:
    euro = tokens_of(tokenizer, "€")
    call = tokens_of(tokenizer, "<|python_start|>", "1")
    assert list(read_pieces(tokenizer, [*euro[:2], *call])) == [Part("text", "\ufffd"), Part("python", "1")]
    assert list(read_pieces(tokenizer, euro[:1])) == [Part("text", "\ufffd")]


@pytest.mark.parametrize(
    ("script", "shown"),
    [
        (("a", *CALL[1:], "<|output_start|>", "42", "<|output_end|>", "b"), "a[6*7 = 42]b"),
        ((*CALL[1:], "b"), "[6*7]b"),
        (CALL[1:3], "[6*7]"),
        (("<|output_start|>", "1", "<|output_end|>"), "[1]"),
    ],
)
def test_calls_are_shown_in_brackets(script: tuple[str, ...], shown: str, tokenizer: Tokenizer) -> None:
    model = scripted_model(successors(tokenizer, ("?", *script, "<|bos|>")), VOCAB_SIZE)
    chat = Chat(trained(model, tokenizer, "base"), Console())
    chat.engine.calculator = False
    assert chat.answer("?", GREEDY, lambda text: None) == shown


def test_a_signal_to_stop_ends_the_chat_and_not_only_an_answer(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(scripted_model(successors(tokenizer, ENDLESS), VOCAB_SIZE), tokenizer)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))

    def stop(text: str) -> None:
        raise StopSignal("SIGTERM")

    monkeypatch.setattr("nanochat.chat.terminal.write_out", stop)
    with pytest.raises(StopSignal):
        chat_in_terminal(model, GREEDY, Console())
