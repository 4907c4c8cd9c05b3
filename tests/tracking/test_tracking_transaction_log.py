import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from wandb_runs import python, read_back, run_folders

from nanochat.tracking.transaction_log import BLOCK, HEADER, read_log, record_types, write_log

# Lengths around a block and several blocks, where records are cut.
lengths = st.one_of(st.integers(0, 200), st.integers(BLOCK - 60, BLOCK + 20), st.integers(2 * BLOCK, 3 * BLOCK))


def line(length):
    return record_types().Record(output_raw={"line": "x" * length})


@settings(max_examples=40, deadline=None)
@given(st.lists(lengths, max_size=6), st.data())
def test_what_is_written_is_read_and_a_torn_end_costs_only_what_is_torn(sizes, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run-a.wandb"
        write_log(path, map(line, sizes))
        assert [len(record.output_raw.line) for record in read_log(path)] == sizes
        assert [record.num for record in read_log(path)] == list(range(1, len(sizes) + 1))
        content = path.read_bytes()
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        left = [len(record.output_raw.line) for record in read_log(path)]
        assert left == sizes[: len(left)]


def test_a_damaged_byte_ends_the_log_before_its_record(tmp_path):
    path = tmp_path / "run-a.wandb"
    write_log(path, map(line, [10, 20, 30]))
    content = bytearray(path.read_bytes())
    content[content.index(b"x" * 20) + 3] ^= 1
    path.write_bytes(content)
    assert [len(record.output_raw.line) for record in read_log(path)] == [10]


def test_what_is_no_log_has_no_records(tmp_path):
    for content in (b"", HEADER, b"something else entirely"):
        (tmp_path / "run-a.wandb").write_bytes(content)
        assert read_log(tmp_path / "run-a.wandb") == []


def test_the_format_is_that_of_wandb_both_ways(tmp_path):
    script = "run = start(); run.log({'batch/loss': 1.0}, 0); print('hello'); run.finish()"
    assert python(tmp_path, script).stderr == ""
    (folder,) = run_folders(tmp_path)
    (path,) = folder.glob("*.wandb")
    records = read_log(path)
    assert records[-1].HasField("exit")
    before = read_back(folder)
    write_log(path, records)
    assert read_log(path) == records
    assert read_back(folder) == before
