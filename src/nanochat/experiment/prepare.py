"""What all runs of an experiment read, made once on a CPU node: data, the one tokenizer, tokens, validation sets.

Every step keeps what is whole and made from the same, so the same command carries on after a stop. The record is
written last; it holds what a run needs to know of the other arms, so that an arm can train on a host that has only
its own tokens.
"""

import dataclasses
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from nanochat.corpus.shards import open_corpus, read_texts
from nanochat.data_stages import conversations_stage
from nanochat.errors import DataError, NanochatError, UsageError
from nanochat.experiment.records import corpus_of, inputs_of
from nanochat.experiment.specification import SHARED_SET, Arm, Experiment, ExperimentFolder
from nanochat.files import (
    MANIFEST_NAME,
    fingerprint,
    lock_folder,
    read_json,
    read_manifest,
    verify_files,
    whole_folder,
    write_json,
    write_manifest,
)
from nanochat.loader.token_shards import MANIFEST_KIND, TOKENS_SUFFIX, TokenDataset, write_shard
from nanochat.loader.tokenize import tokenize_corpus
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.tokenizer.train import train_tokenizer
from nanochat.tracking.console import Console, format_count
from nanochat.workspace import ChatStage

DIGEST_BYTES = 16

Document = np.ndarray


def prepare(experiment: Experiment, folder: ExperimentFolder, console: Console, workers: int | None = None) -> None:
    """Make whatever of the experiment's data is missing.

    Args:
        workers: processes that tokenise; None for one per core.

    Raises:
        UsageError: runs were trained with what another preparation made.
        DataError: an arm's corpus is missing or damaged, or no validation text is left.
        NanochatError: a command that makes data failed.
    """
    with lock_folder(folder.root, f"the experiment {experiment.name}"):
        for arm in experiment.arms.values():
            _make_data(experiment, arm, folder, console)
        corpora = {
            name: open_corpus(corpus_of(folder, arm), f"make the corpus of the arm {name}").fingerprint
            for name, arm in experiment.arms.items()
        }
        inputs = inputs_of(experiment, corpora)
        _refuse_to_replace(experiment, folder, inputs)
        _make_tokenizer(experiment, folder, inputs["tokenizer"], console)
        for arm in experiment.arms.values():
            _tokenize(arm, folder, workers, console)
        _make_validation(experiment, folder, fingerprint(inputs), workers, console)
        _make_conversations(experiment, folder, console)
        record = {
            "inputs": inputs,
            "tokenizer": Tokenizer.load(folder.tokenizer).fingerprint,
            "arms": {name: _describe_tokens(folder, arm) for name, arm in experiment.arms.items()},
            "validation": {name: _describe_validation(folder, name) for name in (SHARED_SET, *experiment.arms)},
        }
        write_json(folder.prepared, record)
    console.info(f"{folder.root} is ready: nanochat experiment plan {experiment.file}")


def _refuse_to_replace(experiment: Experiment, folder: ExperimentFolder, inputs: dict[str, Any]) -> None:
    """Models are useless without their tokenizer, and results without their validation set."""
    if folder.prepared.exists() and any(folder.results.glob("*.json")):
        before = read_json(folder.prepared)["inputs"]
        changed = [name for name in inputs if inputs[name] != before.get(name)]
        if changed:
            _refuse_to_change(" and ".join(changed), experiment, folder)


def _refuse_to_change(what: str, experiment: Experiment, folder: ExperimentFolder) -> NoReturn:
    raise UsageError(
        f"{folder.root} holds results, and now the {what} would be others",
        f"give the experiment another name in {experiment.file}",
    )


def _make_data(experiment: Experiment, arm: Arm, folder: ExperimentFolder, console: Console) -> None:
    """Run an arm's commands in its workspace, unless the very same ones made the corpus that is there."""
    if not arm.commands:
        return
    workspace = folder.arm(arm.name)
    receipt = workspace.root / "data.json"
    wanted = {"commands": [list(words) for words in arm.commands]}
    corpus = workspace.base_data / MANIFEST_NAME
    if corpus.exists() and receipt.exists() and read_json(receipt) == wanted:
        return
    if receipt.exists() and any(folder.results.glob("*.json")):
        _refuse_to_change(f"arms.{arm.name}.prepare", experiment, folder)
    receipt.unlink(missing_ok=True)
    for words in arm.commands:
        told = f"nanochat {shlex.join(words)}"
        console.info(f"{arm.name}: {told}")
        environment = {**os.environ, "NANOCHAT_BASE_DIR": str(workspace.root)}
        # A process of its own: a command ends its process, and what it read need not stay in memory.
        command = [sys.executable, "-m", "nanochat", *words]
        done = subprocess.run(command, cwd=experiment.file.absolute().parent, env=environment, check=False)
        if done.returncode:
            raise NanochatError(
                f"the data of the arm {arm.name} was not made: {told} ended with {done.returncode}",
                "mend what it says above; the same command carries on",
            )
    open_corpus(workspace.base_data, f"have the last command of arms.{arm.name}.prepare write base_data")
    write_json(receipt, wanted)


def _make_tokenizer(
    experiment: Experiment, folder: ExperimentFolder, made_from: dict[str, Any], console: Console
) -> None:
    """Train the tokenizer on the declared mix, and give every arm a copy, which makes it a whole workspace."""
    mix = fingerprint(made_from)
    found = _load_if_whole(folder.tokenizer)
    if found is None or found.corpus_fingerprint != mix:
        console.info(f"tokenizer from {' and '.join(f'{s:.0%} {n}' for n, s in experiment.tokenizer_shares.items())}")
        corpora = {name: corpus_of(folder, experiment.arms[name]) for name in experiment.tokenizer_shares}
        train_tokenizer(
            mixed_texts(corpora, experiment.tokenizer_shares, experiment.tokenizer.doc_cap),
            **dataclasses.asdict(experiment.tokenizer),
            corpus_fingerprint=mix,
        ).save(folder.tokenizer)
    trained = Tokenizer.load(folder.tokenizer)
    for name in experiment.arms:
        copy = _load_if_whole(folder.arm(name).tokenizer)
        if copy is None or copy.fingerprint != trained.fingerprint:
            with whole_folder(folder.arm(name).tokenizer) as new:
                shutil.copytree(folder.tokenizer, new, dirs_exist_ok=True)


def _load_if_whole(tokenizer: Path) -> Tokenizer | None:
    try:
        return Tokenizer.load(tokenizer)
    except DataError:
        return None


def mixed_texts(corpora: Mapping[str, Path], shares: Mapping[str, float], doc_cap: int) -> Iterator[str]:
    """Training texts of several corpora, mixed so that at any moment each has its share of the characters.

    It ends where a corpus does, as from there on the shares could not be held.

    Args:
        doc_cap: characters of one text that count.
    """
    sources = {name: read_texts(corpora[name], "train", f"make the corpus of the arm {name}") for name in shares}
    taken = dict.fromkeys(shares, 0)
    while True:
        name = min(shares, key=lambda source: taken[source] / shares[source])
        text = next(sources[name], None)
        if text is None:
            return
        taken[name] += min(len(text), doc_cap)
        yield text


def _tokenize(arm: Arm, folder: ExperimentFolder, workers: int | None, console: Console) -> None:
    corpus = corpus_of(folder, arm)
    shards = len(open_corpus(corpus, f"make the corpus of the arm {arm.name}").manifest["files"])
    with console.progress(f"tokenising {arm.name}", shards) as bar:
        tokenize_corpus(
            corpus,
            folder.tokenizer,
            folder.arm(arm.name).tokens,
            workers=workers,
            progress=lambda done: bar.advance(1, tokens=format_count(done.tokens_done)),
        )


def _make_validation(
    experiment: Experiment, folder: ExperimentFolder, made_from: str, workers: int | None, console: Console
) -> None:
    """Make the shared validation set and each arm's own, of documents that no arm trains on.

    Two samples of one corpus overlap, so what one arm holds back another may well train on, and would be measured on
    what it has read. Documents are compared whole; one that differs in a character counts as another.
    """
    names = (SHARED_SET, *experiment.arms)
    manifests = {name: _validation_manifest(folder, name) for name in names}
    if all(manifest is not None and manifest["made_from"] == made_from for manifest in manifests.values()):
        return
    candidates = _candidates(experiment, folder, workers)
    trained = _trained_digests(experiment, folder, candidates, console)
    sets = {
        name: {digest: text for digest, text in documents.items() if digest not in trained}
        for name, documents in candidates.items()
    }
    left_out = {name: len(candidates[name]) - len(documents) for name, documents in sets.items()}
    if SHARED_SET not in sets:
        sets[SHARED_SET] = draw_by_shares(
            {name: sets[name] for name in experiment.validation_shares},
            experiment.validation_shares,
            experiment.validation_tokens,
        )
        left_out[SHARED_SET] = sum(left_out[name] for name in experiment.validation_shares)
    for name in names:
        if not sets[name]:
            raise DataError(
                f"no document is left for the validation set {name!r}: arms train on all of its candidates",
                "give the arms more validation text, or declare validation.folder",
            )
        if left_out[name]:
            console.info(f"validation set {name}: {left_out[name]} documents left out, as an arm trains on them")
        _write_validation(folder, name, list(sets[name].values()), made_from, left_out[name])


def _candidates(
    experiment: Experiment, folder: ExperimentFolder, workers: int | None
) -> dict[str, dict[bytes, Document]]:
    """The documents that each arm holds back, and those of a shared set from elsewhere, if there is one."""
    held_back = {name: TokenDataset.open(folder.arm(name).tokens, "val") for name in experiment.arms}
    if experiment.validation_folder is not None:
        scratch = folder.root / "validation" / "source"
        tokenize_corpus(experiment.validation_folder, folder.tokenizer, scratch, workers=workers)
        held_back[SHARED_SET] = TokenDataset.open(scratch, "val")
    return {name: _documents(dataset) for name, dataset in held_back.items()}


def _documents(dataset: TokenDataset) -> dict[bytes, Document]:
    """The distinct documents of a data set by digest, in order."""
    documents = map(dataset.document, range(dataset.num_documents))
    return {_digest(document): document for document in documents}


def _digest(document: Document) -> bytes:
    return hashlib.blake2b(document.tobytes(), digest_size=DIGEST_BYTES).digest()


def _trained_digests(
    experiment: Experiment,
    folder: ExperimentFolder,
    candidates: Mapping[str, Mapping[bytes, Document]],
    console: Console,
) -> set[bytes]:
    """Which of the candidates some arm trains on. Only documents as long as a candidate are read at all."""
    wanted = {digest for documents in candidates.values() for digest in documents}
    lengths = np.unique([len(document) for documents in candidates.values() for document in documents.values()])
    found: set[bytes] = set()
    for name in experiment.arms:
        train = TokenDataset.open(folder.arm(name).tokens, "train")
        places = np.flatnonzero(np.isin(train.lengths, lengths)).tolist()
        found |= {digest for place in places if (digest := _digest(train.document(place))) in wanted}
    console.info(f"{len(found)} of {len(wanted)} validation documents are in some arm's training data")
    return found


def draw_by_shares(
    sets: Mapping[str, Mapping[bytes, Document]], shares: Mapping[str, float], num_tokens: int
) -> dict[bytes, Document]:
    """Distinct documents of several sets, each set having its share of the tokens at any moment.

    Like `mixed_texts` it ends where a set does, or at `num_tokens`.
    """
    sources = {name: iter(sets[name].items()) for name in shares}
    taken = dict.fromkeys(shares, 0)
    drawn: dict[bytes, Document] = {}
    while sum(taken.values()) < num_tokens:
        name = min(shares, key=lambda source: taken[source] / shares[source])
        digest, document = next(sources[name], (b"", None))
        if document is None:
            break
        # A document that another set has drawn still counts for this one: it is text of both.
        taken[name] += len(document)
        drawn[digest] = document
    return drawn


def _write_validation(
    folder: ExperimentFolder, name: str, documents: list[Document], made_from: str, left_out: int
) -> None:
    tokenizer = Tokenizer.load(folder.tokenizer)
    about = {
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
    }
    offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    with whole_folder(folder.validation(name)) as new:
        files = write_shard(new, "val_00000", "val", np.concatenate(documents), offsets)
        write_manifest(new, MANIFEST_KIND, files, tokenizer=about, made_from=made_from, left_out=left_out)


def _validation_manifest(folder: ExperimentFolder, name: str) -> dict[str, Any] | None:
    """The manifest of a validation set that is whole, None if there is none."""
    try:
        manifest = read_manifest(folder.validation(name), MANIFEST_KIND, "")
        verify_files(folder.validation(name), manifest["files"], "")
    except DataError:
        return None
    return manifest


def _make_conversations(experiment: Experiment, folder: ExperimentFolder, console: Console) -> None:
    stages: list[ChatStage] = ["mid", "sft"]
    for arm in experiment.arms.values():
        for stage in stages:
            if stage in experiment.stages:
                tasks = getattr(arm.settings, stage).tasks
                conversations_stage(stage, tasks, arm.settings.base.sequence_len, folder.arm(arm.name), console)


def _describe_tokens(folder: ExperimentFolder, arm: Arm) -> dict[str, Any]:
    """What the plan shows of an arm's data, and what says that it is the same data elsewhere."""
    manifest = read_manifest(folder.arm(arm.name).tokens, MANIFEST_KIND, "")
    train = manifest["totals"]["train"]
    return {
        "corpus": manifest["corpus"],
        "fingerprint": manifest["fingerprint"],
        "documents": train["documents"],
        "tokens": train["tokens"],
        "text_bytes": train["text_bytes"],
        "validation_documents": manifest["totals"]["val"]["documents"],
    }


def _describe_validation(folder: ExperimentFolder, name: str) -> dict[str, Any]:
    manifest = read_manifest(folder.validation(name), MANIFEST_KIND, "")
    [tokens] = [entry for entry in manifest["files"] if entry["name"].endswith(TOKENS_SUFFIX)]
    return {
        "fingerprint": manifest["fingerprint"],
        "documents": tokens["documents"],
        "tokens": tokens["tokens"],
        "left_out": manifest["left_out"],
    }
