"""The stages that make data, from text to tokens. They run where there is no GPU, and import no torch."""

import dataclasses
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from nanochat.config import RunConfig, TokenizerConfig
from nanochat.corpus.builtin import build_builtin_corpus
from nanochat.corpus.local import build_local_corpus
from nanochat.corpus.shards import FIX_CORPUS, open_corpus, read_texts
from nanochat.errors import DataError
from nanochat.files import MANIFEST_NAME, read_manifest, refuse_if_used, verify_files
from nanochat.loader.conversations import tokenize_conversations
from nanochat.loader.token_shards import MANIFEST_KIND as TOKENS_KIND
from nanochat.loader.token_shards import TOKENS_SUFFIX
from nanochat.loader.tokenize import TokenizeProgress, tokenize_corpus
from nanochat.tasks.mixture import mixture, mixture_fingerprint
from nanochat.tokenizer.evaluate import SAMPLES, as_json, evaluate_tokenizer
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.tokenizer.train import train_tokenizer
from nanochat.tracking.console import Console, format_bytes, format_count
from nanochat.tracking.environment import describe_environment
from nanochat.tracking.report import ReportStage, Section, write_section
from nanochat.training.heartbeat import tell
from nanochat.workspace import ChatStage, Workspace

# Of each split, for the table of bytes per token: enough for three digits, little enough to take no time.
SAMPLE_CHARACTERS = 500_000


def corpus_stage(config: RunConfig, workspace: Workspace) -> dict[str, Any]:
    """Make or open the corpus."""
    started = time.time()
    if config.data == "builtin":
        build_builtin_corpus(workspace.base_data)
    elif config.data != "existing":
        build_local_corpus(Path(config.data), workspace.base_data)
    corpus = open_corpus(workspace.base_data, FIX_CORPUS)
    text_bytes = sum(totals["text_bytes"] for totals in corpus.manifest["totals"].values())
    report_section(
        workspace,
        "corpus",
        Section(
            title="Corpus",
            figures={
                "Source": str(corpus.manifest["source"].get("name", "unknown")),
                "Training documents": corpus.train_rows,
                "Validation documents": corpus.val_rows,
                "Text": format_bytes(text_bytes),
                "Shards": len(corpus.train_shards) + len(corpus.val_shards),
                "Fingerprint": corpus.fingerprint,
            },
            config={"source": corpus.manifest["source"]},
            seconds=time.time() - started,
        ),
    )
    return {"fingerprint": corpus.fingerprint}


def tokenizer_stage(config: TokenizerConfig, workspace: Workspace) -> dict[str, Any]:
    """Train the tokenizer on the training shards and measure it."""
    started = time.time()
    corpus = open_corpus(workspace.base_data, FIX_CORPUS)
    tokenizer = train_tokenizer(
        read_texts(workspace.base_data, "train", FIX_CORPUS),
        vocab_size=config.vocab_size,
        digit_group=config.digit_group,
        max_chars=config.max_chars,
        doc_cap=config.doc_cap,
        corpus_fingerprint=corpus.fingerprint,
    )
    refuse_if_used(workspace.tokenizer, str(workspace.tokenizer))
    tokenizer.save(workspace.tokenizer)
    trained_seconds = time.time() - started
    rows = evaluate_tokenizer(tokenizer, {**SAMPLES, **corpus_samples(workspace)}, workspace.encodings)
    report_section(
        workspace,
        "tokenizer",
        Section(
            title="Tokenizer",
            figures={
                "Vocabulary": tokenizer.vocab_size,
                "Digits per token, at most": config.digit_group,
                **{
                    f"Bytes per token, {row.sample}": round(value, 3)
                    for row in rows
                    for name, value in list(row.bytes_per_token.items())[:1]
                    if value is not None
                },
                "Fingerprint": tokenizer.fingerprint,
            },
            config={**dataclasses.asdict(config), "bytes_per_token": as_json(rows)},
            seconds=trained_seconds,
        ),
    )
    return {"fingerprint": read_manifest(workspace.tokenizer, "tokenizer", "")["fingerprint"]}


def corpus_samples(workspace: Workspace) -> dict[str, str]:
    """Text of both splits, to measure a tokenizer on."""
    samples: dict[str, str] = {}
    for split in ("train", "val"):
        collected, length = [], 0
        for text in read_texts(workspace.base_data, split, FIX_CORPUS):
            collected.append(text)
            length += len(text)
            if length >= SAMPLE_CHARACTERS:
                break
        samples[f"corpus ({split})"] = "\n\n".join(collected)
    return samples


def tokenize_stage(workspace: Workspace, workers: int | None) -> dict[str, Any]:
    """Turn the corpus into token shards."""
    started = time.time()
    console = Console()
    corpus = open_corpus(workspace.base_data, FIX_CORPUS)
    with console.progress("tokenising", len(corpus.manifest["files"])) as bar:

        def show(done: TokenizeProgress) -> None:
            bar.advance(1, tokens=format_count(done.tokens_done))
            tell(step=done.shards_done, num_steps=done.num_shards)

        manifest = tokenize_corpus(
            workspace.base_data,
            workspace.tokenizer,
            workspace.tokens,
            workers=workers,
            progress=show,
        )
    entries = [entry for entry in manifest["files"] if entry["name"].endswith(TOKENS_SUFFIX)]
    tokens = {split: sum(entry["tokens"] for entry in entries if entry["split"] == split) for split in ("train", "val")}
    report_section(
        workspace,
        "tokenize",
        Section(
            title="Tokens",
            figures={
                "Training tokens": tokens["train"],
                "Validation tokens": tokens["val"],
                "Fingerprint": manifest["fingerprint"],
            },
            seconds=time.time() - started,
        ),
    )
    console.info(f"{format_count(tokens['train'])} training and {format_count(tokens['val'])} validation tokens")
    return {"fingerprint": manifest["fingerprint"]}


def conversations_stage(
    stage: ChatStage, tasks: tuple[str, ...], sequence_len: int, workspace: Workspace, console: Console
) -> str:
    """Turn a stage's conversations into token shards, unless they are there. Returns their fingerprint."""
    folder = workspace.conversation_tokens(stage)
    tokenizer = Tokenizer.load(workspace.tokenizer)
    made_from = {"tasks": list(tasks), "fingerprint": mixture_fingerprint(tasks, workspace.task_data)}
    fix = f"nanochat data conversations {stage}"
    if (folder / MANIFEST_NAME).exists():
        with suppress(DataError):
            manifest = read_manifest(folder, TOKENS_KIND, fix)
            verify_files(folder, manifest["files"], fix)
            about = (manifest.get("made_from"), manifest.get("sequence_len"), manifest["tokenizer"]["fingerprint"])
            if about == (made_from, sequence_len, tokenizer.fingerprint):
                return str(manifest["fingerprint"])
    refuse_if_used(folder, str(folder))
    manifest = tokenize_conversations(
        {
            "train": mixture(tasks, workspace.task_data, "train"),
            "val": mixture(tasks, workspace.task_data, "test"),
        },
        tokenizer,
        folder,
        sequence_len=sequence_len,
        made_from=made_from,
        fix=f"{fix}, with other --tasks or a longer --sequence-len",
    )
    totals = manifest["totals"]["train"]
    console.info(
        f"{format_count(totals['documents'])} conversations, {format_count(totals['tokens'])} tokens, "
        f"{totals['trained_tokens'] / totals['tokens']:.0%} of them trained on; {totals['cut']} cut to the context, "
        f"{totals['left_out']} left out"
    )
    return str(manifest["fingerprint"])


def report_section(workspace: Workspace, stage: ReportStage, section: Section) -> None:
    """Store a section together with the machine it was made on."""
    write_section(workspace.report, stage, dataclasses.replace(section, environment=describe_environment()))
