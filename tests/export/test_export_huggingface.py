"""What transformers loads from an export is the model that was trained, and an export destroys nothing else."""

import json
import re
import resource
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from nanochat.checkpoint.trained_model import TrainedModel, load_trained_model
from nanochat.config import TrainBaseConfig
from nanochat.corpus.conversation import Message, Part, assistant, conversation_from_json, user
from nanochat.errors import NanochatError, UsageError
from nanochat.export.huggingface import export_huggingface
from nanochat.model.generate import generate
from nanochat.runtime import Runtime
from nanochat.tokenizer import SPECIAL_TOKENS
from nanochat.tokenizer.conversation import render_conversation, render_prompt
from nanochat.tracking.console import Console
from nanochat.tracking.metrics import read, series
from nanochat.training.base import train_base
from nanochat.training.session import metrics_path
from nanochat.workspace import Stage, Workspace

Run = Callable[..., "subprocess.CompletedProcess[str]"]

CPU = Runtime(torch.device("cpu"), torch.float32)
QUIET = Console(enabled=False)
CONFIG = TrainBaseConfig(
    depth=2,
    aspect_ratio=16,
    head_dim=16,
    sequence_len=64,
    variant="classic",
    model_tag="classic",
    num_steps=60,
    total_batch_size=16 * 64,
    device_batch_size=16,
    lanes=4,
    pool_size=8,
    scale_hyperparameters=False,
    eval_tokens=1024,
    dtype="float32",
    wandb="disabled",
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, _prepared_workspace: Path) -> Workspace:
    """Base models of both variants and with shared key/value heads, and the first as if it had learnt to chat."""
    root = tmp_path_factory.mktemp("trained") / "workspace"
    workspace = Workspace(Path(shutil.copytree(_prepared_workspace, root)))
    for tag, config in {
        "classic": CONFIG,
        "shared-heads": replace(CONFIG, num_kv_heads=1),
        "modern": replace(CONFIG, variant="modern", num_steps=1),
    }.items():
        train_base(replace(config, model_tag=tag), "test-run", workspace, CPU)
    shutil.copytree(workspace.checkpoints("base", "classic"), workspace.checkpoints("sft", "classic"))
    return workspace


@pytest.fixture(scope="module")
def exports(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of what most tests look at; they only read."""
    parent = tmp_path_factory.mktemp("exports")
    models: dict[str, tuple[Stage, str]] = {
        "base": ("base", "classic"),
        "shared-heads": ("base", "shared-heads"),
        "sft": ("sft", "classic"),
    }
    for name, (stage, tag) in models.items():
        export_huggingface(workspace, stage, tag, parent / name, "float32", QUIET)
    return {name: parent / name for name in models}


@pytest.fixture(scope="module")
def trained(workspace: Workspace) -> TrainedModel:
    return load_trained_model(workspace, "base", "classic", CPU, QUIET)


def their_model(folder: Path) -> PreTrainedModel:
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval()


@pytest.fixture(scope="module")
def their_tokenizer(exports: dict[str, Path]) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(exports["sft"])


@pytest.mark.parametrize("name", ["base", "shared-heads"])
def test_logits_and_greedy_text_are_ours(name: str, workspace: Workspace, exports: dict[str, Path]) -> None:
    tag = "classic" if name == "base" else name
    ours = load_trained_model(workspace, "base", tag, CPU, QUIET)
    theirs = their_model(exports[name])
    tokens = torch.randint(0, ours.tokenizer.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(theirs(tokens).logits, ours.model(tokens), atol=1e-5, rtol=0)

    tokenizer = AutoTokenizer.from_pretrained(exports[name])
    theirs.generation_config.eos_token_id = None  # All forty tokens, past the end of a document.
    said = set()
    for text in ("1", "12 plus", "is 3", "def f(x):", "ü"):
        prompt = [ours.tokenizer.bos_id, *ours.tokenizer.encode(text)]
        expected = generate(ours.model, prompt, 40)
        got = theirs.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=40)
        assert got[0].tolist() == prompt + expected
        said |= set(expected)
    # Else the texts could agree by saying nothing.
    assert len(said) > 10


def test_the_command_exports_and_replaces_an_earlier_export(
    run_command: Run, workspace: Workspace, exports: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "there" / "model"
    result = run_command("export", "hf", str(folder), "--model-tag", "classic", workspace=workspace.root)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"{folder}: classic after 60 steps of sft" in result.stdout
    weights = (folder / "model.safetensors").read_bytes()
    assert weights == (exports["sft"] / "model.safetensors").read_bytes()

    flags = ("--stage", "base", "--model-tag", "classic", "--dtype", "bfloat16")
    assert run_command("export", "hf", str(folder), *flags, workspace=workspace.root).returncode == 0
    assert not (folder / "chat_template.jinja").exists()
    assert (folder / "model.safetensors").stat().st_size < 0.6 * len(weights)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    theirs = their_model(folder)
    assert theirs.dtype == torch.bfloat16
    exact, tokens = their_model(exports["base"]), torch.arange(64)[None]
    with torch.no_grad():
        assert_close(theirs(tokens).logits.float(), exact(tokens).logits, atol=0.2, rtol=0)


@pytest.mark.parametrize(
    ("name", "ends", "has_template"),
    [("base", ["<|bos|>"], False), ("sft", ["<|assistant_end|>", "<|bos|>"], True)],
)
def test_special_ids_are_right_for_the_stage(
    name: str, ends: list[str], has_template: bool, trained: TrainedModel, exports: dict[str, Path]
) -> None:
    special = trained.tokenizer.special_id
    model, tokenizer = their_model(exports[name]), AutoTokenizer.from_pretrained(exports[name])
    assert model.generation_config.eos_token_id == [special(end) for end in ends]
    for theirs in (model.config, tokenizer):
        assert (theirs.bos_token_id, theirs.eos_token_id) == (special("<|bos|>"), special(ends[0]))
        assert theirs.pad_token_id == special("<|bos|>")
    assert (tokenizer.chat_template is not None) == has_template
    assert len(tokenizer) == model.config.vocab_size == trained.tokenizer.vocab_size
    assert tokenizer.model_max_length == 64


AWKWARD = ["it's", " ", "\r\n", "1234567", "e\u0301", "👩\u200d👧", "\u017f", *SPECIAL_TOKENS]
HOSTILE = st.lists(st.text() | st.sampled_from(AWKWARD), max_size=8).map("".join)


@given(text=HOSTILE)
def test_the_tokenizer_gives_our_ids_with_bos_in_front(
    text: str, trained: TrainedModel, their_tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = [trained.tokenizer.bos_id, *trained.tokenizer.encode(text)]
    assert their_tokenizer(text, split_special_tokens=True)["input_ids"] == ids
    assert their_tokenizer.decode(ids[1:]) == text


# What spells a special token becomes one in a chat template, as the model card says.
BENIGN = st.text(min_size=1).filter(lambda text: not any(name in text for name in SPECIAL_TOKENS))
ANSWERS = st.one_of(
    BENIGN.map(assistant),
    st.tuples(BENIGN, BENIGN, BENIGN).map(
        lambda texts: assistant(texts[0], Part("python", texts[1]), Part("python_output", texts[2]), texts[0])
    ),
)


def as_json(messages: list[Message]) -> list[dict[str, object]]:
    """Messages as the conversation format has them, a single text as a string."""
    return [
        {
            "role": message.role,
            "content": message.text
            if [part.kind for part in message.parts] == ["text"]
            else [{"type": part.kind, "text": part.text} for part in message.parts],
        }
        for message in messages
    ]


@given(turns=st.lists(st.tuples(BENIGN, ANSWERS), min_size=1, max_size=3), system=st.none() | BENIGN)
def test_the_chat_template_places_the_tokens_that_our_renderer_does(
    turns: list[tuple[str, Message]],
    system: str | None,
    trained: TrainedModel,
    their_tokenizer: PreTrainedTokenizerFast,
) -> None:
    messages = as_json([message for question, answer in turns for message in (user(question), answer)])
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    conversation = conversation_from_json(messages)
    theirs = their_tokenizer.apply_chat_template(messages)["input_ids"]
    assert theirs == render_conversation(trained.tokenizer, conversation).ids

    theirs = their_tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    assert theirs == render_prompt(trained.tokenizer, conversation.messages[:-1])


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (["assistant"], "speak in turn"),
        (["user", "user"], "speak in turn"),
        (["user", "system"], "speak in turn"),
        (["user", "assistant"], "the last message of a prompt is by the user"),
        (["system"], "the last message of a prompt is by the user"),
    ],
)
def test_the_chat_template_refuses_what_is_no_prompt(
    roles: list[str], message: str, their_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(TemplateError, match=message):
        their_tokenizer.apply_chat_template(
            [{"role": role, "content": "text"} for role in roles], add_generation_prompt=True
        )


@pytest.mark.parametrize("name", ["base", "sft"])
def test_the_example_of_the_model_card_runs(
    name: str, exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", (exports[name] / "README.md").read_text(), re.M | re.S)
    monkeypatch.chdir(exports[name].parent)
    exec(example, {})
    assert ("<|assistant_start|>" in capsys.readouterr().out) == (name == "sft")


def test_the_model_card_says_what_was_trained(
    workspace: Workspace, trained: TrainedModel, exports: dict[str, Path]
) -> None:
    card = (exports["base"] / "README.md").read_text()
    _, bpb = series(read(metrics_path(workspace, "test-run", "base", "classic")), "epoch/bpb")
    identity = trained.config["identity"]
    for fact in ("base, 60 steps", f"{bpb[-1]:.4f}", trained.fingerprint, identity["tokenizer"], identity["data"]):
        assert f"| {fact} |" in card
    (settings,) = re.findall(r"^```json\n(.*?)^```", card, re.M | re.S)
    assert json.loads(settings) == identity


def test_a_modern_model_is_refused_with_the_reason_and_the_fix(
    run_command: Run, workspace: Workspace, tmp_path: Path
) -> None:
    arguments = ("export", "hf", "--stage", "base", "--model-tag", "modern", str(tmp_path / "model"))
    result = run_command(*arguments, workspace=workspace.root)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    for part in ("value embeddings", "lambdas", "smear", "backout", "sliding windows", "QK scale"):
        assert part in result.stderr
    assert "train with --variant classic" in result.stderr
    assert not (tmp_path / "model").exists()


def spoil_by_adding(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")


def spoil_by_editing(folder: Path) -> None:
    (folder / "README.md").write_text("My own words.")


def spoil_by_being_something_else(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")


def spoil_by_being_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("a file")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_by_adding, "holds more than an export: notes.txt"),
        (spoil_by_editing, "README.md"),
        (spoil_by_being_something_else, "is not an export as nanochat wrote it"),
        (spoil_by_being_a_file, "is not a folder"),
    ],
)
def test_what_is_not_an_export_is_never_replaced(
    spoil: Callable[[Path], None], message: str, workspace: Workspace, exports: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exports["base"], tmp_path / "model"))
    spoil(folder)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=message):
        export_huggingface(workspace, "base", "classic", folder, "float32", QUIET)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_empty_folder_is_used(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    export_huggingface(workspace, "base", "classic", tmp_path / "model", "float32", QUIET)
    assert (tmp_path / "model" / "config.json").is_file()


def test_a_place_that_cannot_be_written_is_named_with_what_to_do(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "model"
    with pytest.raises(NanochatError, match=f"the export to {folder} could not be written.*choose another folder"):
        export_huggingface(workspace, "base", "classic", folder, "float32", QUIET)


def test_a_disk_that_is_full_costs_nothing_of_the_earlier_export(
    workspace: Workspace, exports: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exports["base"], tmp_path / "model"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # To whoever writes, a limit on the size of files is what a quota is; the weights are above this one.
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    try:
        with pytest.raises(NanochatError, match=r"could not be written.*free space"):
            export_huggingface(workspace, "base", "classic", folder, "float32", QUIET)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_every_user_who_may_read_the_folder_may_read_the_weights(exports: dict[str, Path]) -> None:
    modes = {path.stat().st_mode for path in exports["base"].iterdir()}
    assert len(modes) == 1


def test_a_stage_without_a_model_names_the_command_that_makes_it(run_command: Run, tmp_path: Path) -> None:
    result = run_command("export", "hf", str(tmp_path / "model"))
    assert (result.returncode, "nanochat train sft" in result.stderr) == (2, True)
