"""An experiment's file means what it says, and every mistake in it is named with its place."""

from pathlib import Path

import pytest
from experiment_arms import ARMS, SETTINGS, TOP, write_file

from nanochat.errors import UsageError
from nanochat.experiment.specification import Budget, read_experiment


def test_a_file_is_read_whole(tmp_path: Path) -> None:
    experiment = read_experiment(write_file(tmp_path))
    assert (experiment.name, experiment.seeds, experiment.stages) == ("toy", (1, 2), ("base",))
    assert experiment.budget == Budget("smallest", 1.0)
    assert experiment.settings.base.depth == 1
    assert experiment.tokenizer.vocab_size == 300
    assert experiment.tokenizer_shares == {"clean": 0.5, "noisy": 0.5}
    assert list(experiment.arms) == ["clean", "noisy"]
    assert experiment.arms["noisy"].data == tmp_path / "noisy"


def test_runs_are_named_by_experiment_arm_model_and_seed(tmp_path: Path) -> None:
    experiment = read_experiment(write_file(tmp_path))
    assert experiment.run_name(experiment.arms["clean"], 2) == "toy-clean-d1-s2"


def test_a_file_from_windows_says_the_same(tmp_path: Path) -> None:
    file = write_file(tmp_path)
    as_written = read_experiment(file)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert read_experiment(file) == as_written


def test_only_what_differs_says_so_differs(tmp_path: Path) -> None:
    arms = ARMS + "[arms.noisy.differs]\nweight_decay = 0.5\n[arms.noisy.differs.sft]\nlr_fraction = 0.5\n"
    experiment = read_experiment(write_file(tmp_path, arms=arms))
    clean, noisy = experiment.arms.values()
    assert clean.settings == experiment.settings
    assert (noisy.settings.base.weight_decay, noisy.settings.sft.lr_fraction) == (0.5, 0.5)
    assert noisy.settings.base.depth == clean.settings.base.depth


def test_commands_that_make_data_may_be_pasted_as_they_are_typed(tmp_path: Path) -> None:
    arms = ARMS.replace('data = "noisy"', "prepare = [\"nanochat data local 'my text'\", 'data adopt']")
    experiment = read_experiment(write_file(tmp_path, arms=arms))
    assert experiment.arms["noisy"].commands == (("data", "local", "my text"), ("data", "adopt"))


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('name = "toy"', 'name = "../toy"', "cannot name a folder"),
        ('name = "toy"', "", "cannot name a folder"),
        ("seeds = [1, 2]", "seeds = [1, 1]", "different whole numbers"),
        ("seeds = [1, 2]", 'seeds = ["1"]', "seeds is '1' — give a whole number"),
        ("seeds = [1, 2]", "seeds = []", "different whole numbers"),
        ("seeds = [1, 2]", "seeds = [100000000000000000000]", "different whole numbers from 0 to"),
        ("seeds = [1, 2]", 'seed = 1\nbudget = "smallest"', "there is no seed — did you mean seeds"),
        ("seeds = [1, 2]", 'budget = "largest"', "budget is 'largest'"),
        ("seeds = [1, 2]", "budget = { tokens = 0 }", "budget is"),
        ("seeds = [1, 2]", "budget = { epochs = inf }", "budget is"),
        ("seeds = [1, 2]", "budget = { steps = 0.3 }", "budget is"),
        ("seeds = [1, 2]", 'stages = ["sft"]', "leaves out base"),
        ("seeds = [1, 2]", 'stages = ["base", "eval"]', "eval has no tasks"),
        ("seeds = [1, 2]", 'stages = ["base", "stf"]', "stages is 'stf' — give 'base' or 'mid'"),
        ("depth = 1", "detph = 1", "there is no settings.detph — did you mean depth"),
        ("depth = 1", 'depth = "1"', "settings.depth is '1' — give a whole number"),
        ("depth = 1", "depth = true", "settings.depth is True"),
        ("depth = 1", "depth = 1\nmatrix_lr = nan", "--matrix-lr is nan — give --matrix-lr a number of 0 or more"),
        ("depth = 1", "seed = 1", "settings.seed is not for this table — list the seeds"),
        ("depth = 1", "num_steps = 10", "settings.num_steps is not for this table — set the budget"),
        ("depth = 1", 'dtype = "float32"', "--dtype"),
        ("device_batch_size = 8", "device_batch_size = 0", "--device-batch-size is 0"),
        ("total_batch_size = 256", "total_batch_size = 500", "toml: --total-batch-size 500 is not a whole number"),
        ("depth = 1", "depth = 0", "toml: a model of depth 0"),
        ("vocab_size = 300", "vocab_size = 10", "vocabulary size 10 is out of range"),
        ("vocab_size = 300", "vocab_size = 300\nshares = { clean = nan }", "no positive sum"),
        ('data = "noisy"', 'prepare = ["nanochat data local \'x"]', "no command line (No closing quotation)"),
        (
            "vocab_size = 300",
            "vocab_size = 300\nshares = { clena = 1 }",
            "no tokenizer.shares.clena — did you mean clean",
        ),
        ("vocab_size = 300", "vocab_size = 300\nshares = { clean = -1 }", "negative share"),
        ("[validation]\ntokens = 1024", "[validation]\ntokens = 0", "validation.tokens is 0"),
        (
            "[validation]\ntokens = 1024",
            '[validation]\nfolder = "x"\nshares = { clean = 1 }',
            "both shares and a folder",
        ),
        ('data = "noisy"', "", "arms.noisy needs either data or prepare"),
        ('data = "noisy"', 'data = "noisy"\nprepare = []', "arms.noisy needs either data or prepare"),
        ('data = "noisy"', "prepare = []", "arms.noisy.prepare is empty"),
        ('data = "noisy"', 'prepare = ["rm -r x"]', "give commands that begin: nanochat data"),
        ('data = "noisy"', 'data = "noisy"\ndifferz = {}', "did you mean differs"),
        ('data = "noisy"', 'data = "noisy"\ndiffers = { seed = 4 }', "arms.noisy.differs.seed is not for this table"),
        ("[arms.noisy]", "[arms.results]", "'results' cannot name a folder"),
        ('[arms.noisy]\ndata = "noisy"', "", "1 arms leave nothing to compare"),
        ("[settings]", "[settings", "cannot be read as TOML"),
    ],
)
def test_a_mistake_is_one_line_that_names_its_place(tmp_path: Path, before: str, after: str, said: str) -> None:
    text = TOP + SETTINGS + ARMS
    assert before in text
    file = tmp_path / "experiment.toml"
    file.write_text(text.replace(before, after, 1))
    with pytest.raises(UsageError) as raised:
        read_experiment(file)
    assert said in str(raised.value)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is missing"):
        read_experiment(tmp_path / "none.toml")
