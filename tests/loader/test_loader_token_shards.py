import os
import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loader_corpora import (
    BOS,
    VOCAB_SIZE,
    Shards,
    corpora,
    dataset_of,
    document_mask,
    document_tokens,
    flat,
    write_tokens,
)

from nanochat.errors import DataError
from nanochat.files import file_entry, read_json, write_manifest
from nanochat.loader.token_shards import TokenDataset

SHARDS: Shards = [[3, 1], [], [], [7, 2, 4]]
TOKENS, OFFSETS, TRAINED = (f"train_00003.{name}.npy" for name in ("tokens", "offsets", "trained"))


@given(corpora(1), st.none() | st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_every_document_comes_back_as_it_was_written_with_its_mask_if_it_has_one(
    shards: Shards, mask_seed: int | None
) -> None:
    lengths = flat(shards)
    with dataset_of(shards, mask_seed=mask_seed) as dataset:
        assert dataset.num_documents == len(lengths)
        assert dataset.num_tokens == sum(lengths)
        assert dataset.lengths.tolist() == list(lengths)
        assert dataset.lengths_of(np.arange(len(lengths))[::-1]).tolist() == list(lengths)[::-1]
        assert dataset.is_masked == (mask_seed is not None)
        for index, length in enumerate(lengths):
            assert dataset.document(index).tolist() == document_tokens(index, length)
            if mask_seed is not None:
                mask, start = document_mask(index, length, mask_seed), index % length
                assert dataset.trained_pieces([(index, 0, length)])[0].tolist() == mask
                assert dataset.trained_pieces([(index, start, length)])[0].tolist() == mask[start:]


def test_a_data_set_says_which_tokenizer_made_it_and_cannot_be_written_to() -> None:
    with dataset_of(SHARDS, mask_seed=0) as dataset:
        assert (dataset.bos_id, dataset.vocab_size) == (BOS, VOCAB_SIZE)
        for array in (dataset.document(0), dataset.trained_pieces([(0, 0, 3)])[0]):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1


def test_the_fingerprint_changes_with_tokens_boundaries_order_and_masks_and_nothing_else(tmp_path: Path) -> None:
    def fingerprint(name: str, shards: Shards, mask_seed: int | None = None) -> str:
        write_tokens(tmp_path / name, shards, mask_seed=mask_seed)
        return TokenDataset.open(tmp_path / name, "train").fingerprint

    first = fingerprint("a", [[3, 5], [4]])
    assert fingerprint("b", [[3, 5], [4]]) == first
    assert len({first, fingerprint("c", [[3, 4], [5]]), fingerprint("d", [[8], [4]])}) == 3
    masked = fingerprint("e", [[3, 5], [4]], mask_seed=1)
    assert fingerprint("f", [[3, 5], [4]], mask_seed=1) == masked
    assert len({first, masked, fingerprint("g", [[3, 5], [4]], mask_seed=2)}) == 3


def test_more_shards_open_than_the_system_lets_files_be_open(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    write_tokens(tmp_path, [[2]] * 150, mask_seed=0)
    in_use = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 60, hard))
    try:
        dataset = TokenDataset.open(tmp_path, "train")
        assert [int(dataset.document(i)[0]) for i in range(150)] == [BOS] * 150
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def rewrite(path: Path, array: np.ndarray) -> None:
    """Replace a file and make the manifest agree with it, as only a faulty writer would."""
    np.save(path, array)
    manifest = read_json(path.parent / "manifest.json")
    for entry in manifest["files"]:
        if entry["name"] == path.name:
            entry.update(file_entry(path))
    about = {key: value for key, value in manifest.items() if key not in ("kind", "files", "fingerprint", "command")}
    write_manifest(path.parent, manifest["kind"], manifest["files"], **about)


@pytest.mark.parametrize("name", [TOKENS, OFFSETS, TRAINED])
@pytest.mark.parametrize("damage", ["missing", "truncated", "longer"])
def test_a_missing_or_truncated_file_is_named_before_anything_is_trained(
    tmp_path: Path, name: str, damage: str
) -> None:
    write_tokens(tmp_path, SHARDS, mask_seed=0)
    path = tmp_path / name
    if damage == "missing":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[:-1] if damage == "truncated" else content + b"x")
    with pytest.raises(DataError, match=f"{name}.* — nanochat data tokenize"):
        TokenDataset.open(tmp_path, "train")


@pytest.mark.parametrize(
    ("name", "array"),
    [
        (TOKENS, np.zeros(13, dtype=np.int32)),
        (TOKENS, np.zeros(12, dtype=np.uint16)),
        (TOKENS, np.zeros((13, 1), dtype=np.uint16)),
        (OFFSETS, np.array([0, 7, 9, 13], dtype=np.int32)),
        (OFFSETS, np.array([0, 7, 13], dtype=np.int64)),
        (OFFSETS, np.array([0, 7, 9, 14], dtype=np.int64)),
        (OFFSETS, np.array([1, 7, 9, 13], dtype=np.int64)),
        (OFFSETS, np.array([0, 9, 7, 13], dtype=np.int64)),
        (OFFSETS, np.array([0, 7, 7, 13], dtype=np.int64)),
        (TRAINED, np.zeros(13, dtype=np.int8)),
        (TRAINED, np.zeros(12, dtype=np.uint8)),
        (TRAINED, np.zeros((13, 1), dtype=np.uint8)),
    ],
)
def test_arrays_that_do_not_fit_the_manifest_or_each_other_are_refused(
    tmp_path: Path, name: str, array: np.ndarray
) -> None:
    write_tokens(tmp_path, SHARDS, mask_seed=0)
    rewrite(tmp_path / name, array)
    with pytest.raises(DataError, match=name):
        TokenDataset.open(tmp_path, "train")


@pytest.mark.parametrize("present", [[0], [1, 2], [3]])
def test_masks_for_some_of_the_shards_are_refused(tmp_path: Path, present: list[int]) -> None:
    write_tokens(tmp_path, SHARDS, mask_seed=0)
    manifest = read_json(tmp_path / "manifest.json")
    kept = {f"train_{number:05d}.trained.npy" for number in present}
    files = [entry for entry in manifest["files"] if "trained" not in entry["name"] or entry["name"] in kept]
    write_manifest(tmp_path, manifest["kind"], files, tokenizer=manifest["tokenizer"])
    with pytest.raises(DataError, match=r"of some train shards only which tokens are trained on — my command"):
        TokenDataset.open(tmp_path, "train", fix="my command")


@pytest.mark.parametrize("name", [TOKENS, TRAINED])
def test_a_changed_byte_is_found_when_checksums_are_asked_for(tmp_path: Path, name: str) -> None:
    write_tokens(tmp_path, SHARDS, mask_seed=0)
    path = tmp_path / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    TokenDataset.open(tmp_path, "train")
    with pytest.raises(DataError, match=name):
        TokenDataset.open(tmp_path, "train", checksums=True)


@pytest.mark.parametrize("content", ["", "{}", '{"kind": "tokens"}', '{"kind": "tokens", "files": [3]}'])
def test_a_damaged_manifest_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json.*my command"):
        TokenDataset.open(tmp_path, "train", fix="my command")


def test_a_split_without_documents_is_refused(tmp_path: Path) -> None:
    write_tokens(tmp_path, [[], []])
    for split in ("train", "val"):
        with pytest.raises(DataError, match=f"no {split} documents"):
            TokenDataset.open(tmp_path, split)
