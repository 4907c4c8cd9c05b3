"""What all runs read is made once, as declared, and no validation text is text that an arm trains on."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from experiment_arms import ARMS, QUIET, SETTINGS, TOP, prepared_experiment, sentences, write_arms, write_file
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.corpus.shards import read_texts, write_corpus
from nanochat.errors import DataError, NanochatError, UsageError
from nanochat.experiment.prepare import draw_by_shares, mixed_texts, prepare
from nanochat.experiment.records import read_prepared
from nanochat.experiment.specification import Experiment, ExperimentFolder, read_experiment
from nanochat.files import write_json
from nanochat.loader.token_shards import TokenDataset
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.workspace import Workspace


def content(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file with its digest and, of large ones, the time of change."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns if path.suffix == ".npy" else 0,
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def texts_of(experiment: Experiment, places: ExperimentFolder, name: str) -> list[str]:
    dataset = TokenDataset.open(places.validation(name), "val")
    tokenizer = Tokenizer.load(places.tokenizer)
    return [tokenizer.decode(dataset.document(i)[1:].tolist()) for i in range(dataset.num_documents)]


def test_every_arm_has_the_same_tokenizer_and_is_a_whole_workspace(tmp_path: Path) -> None:
    experiment, places = prepared_experiment(tmp_path)
    record = read_prepared(experiment, places)
    for name in experiment.arms:
        workspace = Workspace(places.arm(name).root)
        assert Tokenizer.load(workspace.tokenizer).fingerprint == record["tokenizer"]
        assert TokenDataset.open(workspace.tokens, "train").num_tokens == record["arms"][name]["tokens"]


def test_preparing_again_changes_no_file(tmp_path: Path) -> None:
    experiment, places = prepared_experiment(tmp_path)
    before = content(places.root)
    prepare(experiment, places, QUIET, workers=1)
    assert content(places.root) == before


def test_a_stopped_preparation_ends_in_the_same_files(tmp_path: Path) -> None:
    experiment, places = prepared_experiment(tmp_path)
    before = {name: digest for name, (digest, _) in content(places.root).items()}
    for folder in (places.validation("noisy"), places.arm("clean").tokens):
        (folder / "manifest.json").unlink()
    places.prepared.unlink()
    next(places.arm("noisy").tokens.glob("train_*.tokens.npy")).unlink()
    prepare(experiment, places, QUIET, workers=1)
    assert {name: digest for name, (digest, _) in content(places.root).items()} == before


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_the_tokenizer_s_text_has_the_declared_shares_from_beginning_to_end(tmp_path: Path, share: float) -> None:
    write_arms(tmp_path, clean=120, noisy=200)
    origin = {text: name for name in ("clean", "noisy") for text in read_texts(tmp_path / name, "train", "")}
    longest = max(map(len, origin))
    shares = {"clean": share, "noisy": 1 - share}
    taken: Counter[str] = Counter()
    for text in mixed_texts({name: tmp_path / name for name in shares}, shares, doc_cap=10**6):
        taken[origin[text]] += len(text)
        assert abs(taken["clean"] - share * taken.total()) <= longest
    assert taken.total() > 5 * longest


DOCUMENTS = st.lists(st.integers(1, 30), min_size=1, max_size=20)


@settings(deadline=None)
@given(lengths=st.lists(DOCUMENTS, min_size=2, max_size=3), weights=st.lists(st.integers(1, 9), min_size=3, max_size=3))
def test_the_shared_validation_set_has_the_declared_shares(lengths: list[list[int]], weights: list[int]) -> None:
    sets = {
        f"arm{arm}": {bytes([arm, place]): np.full(length, arm) for place, length in enumerate(of_arm)}
        for arm, of_arm in enumerate(lengths)
    }
    shares = dict(zip(sets, np.array(weights[: len(sets)]) / sum(weights[: len(sets)]), strict=True))
    drawn = draw_by_shares(sets, shares, 200)
    total = sum(map(len, drawn.values()))
    for arm, name in enumerate(sets):
        of_arm = sum(len(document) for digest, document in drawn.items() if digest[0] == arm)
        assert abs(of_arm - shares[name] * total) <= 30 * len(sets)
    assert total < 230
    exhausted = any(all(digest in drawn for digest in documents) for documents in sets.values())
    assert total >= 200 or exhausted


def test_no_arm_trains_on_a_validation_document(tmp_path: Path) -> None:
    write_arms(tmp_path)
    held_back = list(read_texts(tmp_path / "clean", "val", ""))
    # The other arm is another sample of the same source: it has half of what the first arm holds back.
    overlap = [*held_back[: len(held_back) // 2], *sentences(0.6, 400, seed=9)]
    write_corpus(tmp_path / "other", overlap, rows_per_shard=128, source={"name": "other"}, validation_rows=20)
    experiment = read_experiment(write_file(tmp_path, arms=ARMS.replace('data = "noisy"', 'data = "other"')))
    places = ExperimentFolder.of(experiment, Workspace(tmp_path / "workspace"))
    prepare(experiment, places, QUIET, workers=1)
    trained = {text for name in ("clean", "other") for text in read_texts(tmp_path / name, "train", "")}
    for name in ("shared", "clean", "noisy"):
        assert not trained & set(texts_of(experiment, places, name))
    left_out = len(set(held_back) & trained)
    assert read_prepared(experiment, places)["validation"]["clean"]["left_out"] == left_out > 0


def test_validation_text_that_some_arm_trains_on_entirely_is_refused(tmp_path: Path) -> None:
    write_arms(tmp_path)
    held_back = list(read_texts(tmp_path / "clean", "val", ""))
    overlap = [*held_back * 2, *sentences(0.6, 400, seed=9)]
    write_corpus(tmp_path / "other", overlap, rows_per_shard=128, source={"name": "x"}, validation_rows=1, seed=1)
    assert set(held_back) < set(read_texts(tmp_path / "other", "train", ""))
    experiment = read_experiment(write_file(tmp_path, arms=ARMS.replace('data = "noisy"', 'data = "other"')))
    with pytest.raises(DataError, match="no document is left for the validation set"):
        prepare(experiment, ExperimentFolder.of(experiment, Workspace(tmp_path / "w")), QUIET, workers=1)


def test_a_corpus_of_its_own_can_be_the_shared_validation_set(tmp_path: Path) -> None:
    write_corpus(
        tmp_path / "outside", sentences(0.3, 200, seed=77), rows_per_shard=64, source={"name": "x"}, validation_rows=15
    )
    experiment, places = prepared_experiment(tmp_path, settings=f'{SETTINGS}folder = "outside"\n')
    assert set(texts_of(experiment, places, "shared")) == set(read_texts(tmp_path / "outside", "val", ""))


def test_what_results_were_made_with_is_not_replaced(tmp_path: Path) -> None:
    _, places = prepared_experiment(tmp_path)
    write_json(places.result("clean", 1), {})
    before = content(places.root)
    changed = read_experiment(write_file(tmp_path, settings=SETTINGS.replace("300", "310")))
    with pytest.raises(UsageError, match="holds results, and now the tokenizer would be others"):
        prepare(changed, places, QUIET, workers=1)
    assert content(places.root) == before


def test_commands_make_an_arm_s_data_once(tmp_path: Path) -> None:
    write_arms(tmp_path)
    texts = tmp_path / "my texts"
    texts.mkdir()
    for number, text in enumerate(sentences(0.6, 200, seed=5)):
        (texts / f"{number}.txt").write_text(text)
    arms = ARMS.replace('data = "noisy"', f"prepare = [\"nanochat data local '{texts}' --validation-rows 15\"]")
    experiment = read_experiment(write_file(tmp_path, arms=arms))
    places = ExperimentFolder.of(experiment, Workspace(tmp_path / "workspace"))
    prepare(experiment, places, QUIET, workers=1)
    assert read_prepared(experiment, places)["arms"]["noisy"]["documents"] == 185
    # A command that ran again would find nothing to read.
    texts.rename(tmp_path / "gone")
    prepare(experiment, places, QUIET, workers=1)
    # Once there are results, no other command may make the data anew.
    write_json(places.result("clean", 1), {})
    before = content(places.root)
    with pytest.raises(UsageError, match=r"holds results, and now the arms\.noisy\.prepare would be others"):
        prepare(read_experiment(write_file(tmp_path, arms=arms.replace("15", "16"))), places, QUIET, workers=1)
    assert content(places.root) == before


def test_a_command_that_fails_ends_the_preparation_with_its_name(tmp_path: Path) -> None:
    write_arms(tmp_path)
    arms = ARMS.replace('data = "noisy"', 'prepare = ["data local nowhere"]')
    experiment = read_experiment(write_file(tmp_path, TOP, SETTINGS, arms))
    with pytest.raises(NanochatError, match="data of the arm noisy was not made: nanochat data local nowhere"):
        prepare(experiment, ExperimentFolder.of(experiment, Workspace(tmp_path / "w")), QUIET, workers=1)


def test_data_that_changed_since_is_noticed(tmp_path: Path) -> None:
    experiment, places = prepared_experiment(tmp_path)
    (tmp_path / "noisy").rename(tmp_path / "elsewhere")
    # A host that trains has tokens only.
    read_prepared(experiment, places)
    write_corpus(
        tmp_path / "noisy", sentences(0.9, 200), rows_per_shard=64, source={"name": "other"}, validation_rows=15
    )
    with pytest.raises(DataError, match="was prepared with other corpora and tokenizer"):
        read_prepared(experiment, places)
