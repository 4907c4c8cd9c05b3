"""What an experiment found: a picture, a table with intervals over the seeds, a verdict in plain words, and its limits.

It is made from the records of the preparation and of the runs, so it can be made on any machine that has those.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nanochat.errors import DataError
from nanochat.experiment.plan import make_plan
from nanochat.experiment.records import hidden_differences, read_prepared, read_results
from nanochat.experiment.specification import SHARED_SET, Experiment, ExperimentFolder
from nanochat.experiment.statistics import Estimate, difference, estimate
from nanochat.files import write_json, write_text
from nanochat.tracking.compare import ComparedRun, write_comparison
from nanochat.tracking.console import format_count, format_seconds
from nanochat.tracking.plots import Panel, Points, plot_panels
from nanochat.tracking.runs import METRICS_NAME

HEADLINE = f"bpb/{SHARED_SET}"
PICTURE = "curves.png"

AXES = {"tokens": "training tokens", "flops": "training FLOPs", "seconds": "training time (s)"}

Record = Mapping[str, Any]


def compare(experiment: Experiment, folder: ExperimentFolder) -> list[str]:
    """Write `report.md`, `report.json` and the picture into the experiment's report folder.

    Returns:
        The verdicts, one for each arm but the first, which they are compared with.

    Raises:
        DataError: fewer than two arms have a finished run, or a record is damaged.
    """
    records = read_results(experiment, folder)
    finished = {key: record for key, record in records.items() if record["state"] == "finished"}
    arms = [arm for arm in experiment.arms if any(name == arm for name, _ in finished)]
    if len(arms) < 2:
        raise DataError(
            f"{folder.results} holds finished runs of {len(arms)} arms, too few to compare",
            f"nanochat experiment run {experiment.file} --arm NAME --seed SEED; or copy the files of other hosts there",
        )
    scores = {
        metric: {
            arm: {seed: record["final"][metric] for (name, seed), record in finished.items() if name == arm}
            for arm in arms
        }
        for metric in next(iter(finished.values()))["final"]
        if all(metric in record["final"] for record in finished.values())
    }
    means = {metric: {arm: estimate(list(by_seed[arm].values())) for arm in arms} for metric, by_seed in scores.items()}
    differences = {
        metric: {arm: difference(by_seed[arm], by_seed[arms[0]]) for arm in arms[1:]}
        for metric, by_seed in scores.items()
    }
    hidden = _not_comparable(experiment, folder, finished)
    if hidden:
        verdicts = [f"no verdict, as these runs differ in more than the experiment declares: {'; '.join(hidden)}"]
    else:
        verdicts = [verdict(arm, arms[0], differences[HEADLINE][arm]) for arm in arms[1:]]
    caveats = _caveats(experiment, records, finished, differences)
    _draw(folder.report / PICTURE, finished, arms)
    write_json(
        folder.report / "report.json",
        {
            "name": experiment.name,
            "reference": arms[0],
            "verdicts": verdicts,
            "caveats": caveats,
            "scores": scores,
            "means": {m: {arm: asdict(value) for arm, value in by_arm.items()} for m, by_arm in means.items()},
            "differences": {m: {arm: asdict(v) for arm, v in by_arm.items()} for m, by_arm in differences.items()},
            "runs": [_about(record) for record in finished.values()],
        },
    )
    text = _render(experiment, folder, verdicts, caveats, means, differences, finished)
    write_text(folder.report / "report.md", text)
    return verdicts


def verdict(arm: str, reference: str, found: Estimate) -> str:
    """What a difference in bits per byte means, in one line."""
    about = f"shared validation; {found.n} seed{'s' if found.n > 1 else ''}{', paired' if found.paired else ''}"
    better, worse = (arm, reference) if found.mean < 0 else (reference, arm)
    if found.half_width is None:
        return (
            f"{better} has the better figure by {abs(found.mean):.4f} bpb ({about}), "
            f"and one seed cannot tell that from noise: no verdict"
        )
    if found.excludes_zero:
        return f"{better} is better than {worse} by {abs(found.mean):.4f} ± {found.half_width:.4f} bpb ({about})"
    return f"no difference shown: {arm} − {reference} is {found.mean:.4f} ± {found.half_width:.4f} bpb ({about})"


def _not_comparable(
    experiment: Experiment, folder: ExperimentFolder, finished: Mapping[tuple[str, int], Record]
) -> list[str]:
    """Differences that take a comparison its meaning. Other software does not, but it is said."""
    same_software: Mapping[str, str] = {}
    records = {key: {**record, "software": same_software} for key, record in finished.items()}
    return hidden_differences(experiment, read_prepared(experiment, folder), records, same_software)


def _caveats(
    experiment: Experiment,
    records: Mapping[tuple[str, int], Record],
    finished: Mapping[tuple[str, int], Record],
    differences: Mapping[str, Mapping[str, Estimate]],
) -> list[str]:
    """What a reader should know before believing the verdict."""
    caveats = []
    missing = [
        f"{arm} with seed {seed}" for arm in experiment.arms for seed in experiment.seeds if (arm, seed) not in finished
    ]
    if missing:
        caveats.append(f"not finished, and so not counted: {', '.join(missing)} ({len(records)} runs have started)")
    for name in ("code", "image", "torch"):
        values = sorted({record["software"][name] for record in finished.values()})
        if len(values) > 1:
            caveats.append(f"the runs were made by different {name}: {', '.join(values)}")
    hardware = sorted({record["hardware"] for record in finished.values()})
    if len(hardware) > 1:
        caveats.append(f"the runs were made on different hardware: {', '.join(hardware)}; compare no times")
    tokens = sorted({record["tokens"] for record in finished.values()})
    if len(tokens) > 1:
        caveats.append(f"the runs trained on different numbers of tokens: {', '.join(map(format_count, tokens))}")
    for arm, shared in differences[HEADLINE].items():
        for metric, by_arm in differences.items():
            name, own = metric.removeprefix("bpb/"), by_arm[arm]
            if metric.startswith("bpb/") and own.excludes_zero and shared.mean * own.mean < 0:
                caveats.append(f"on the validation set of {name} it is the other way round for {arm}")
    if any(found.half_width is not None and found.n == 2 for found in differences[HEADLINE].values()):
        caveats.append("two seeds give wide intervals; a third narrows them most")
    return caveats


def _draw(path: Path, finished: Mapping[tuple[str, int], Record], arms: list[str]) -> None:
    """Each arm's curves, the mean of its seeds: validation over tokens, FLOPs and time, and the training loss."""

    def panel(name: str, axis: str, title: str, unit: str) -> Panel:
        return Panel({arm: _mean_curve(finished, arm, name, axis) for arm in arms}, title, AXES[axis], unit)

    panels = [panel("bpb", axis, "Shared validation set, mean over seeds", "bits per byte") for axis in AXES]
    plot_panels(path, [*panels, panel("loss", "tokens", "Training loss, smoothed, mean over seeds", "nats per token")])


def _mean_curve(finished: Mapping[tuple[str, int], Record], arm: str, name: str, axis: str) -> Points:
    seeds = [record["curves"][name] for (of, _), record in finished.items() if of == arm]
    # Seeds of an arm are measured at the same steps, unless somebody changed how often in between.
    num_points = min(len(seed["value"]) for seed in seeds)

    def mean(column: str) -> list[float]:
        return [sum(seed[column][place] for seed in seeds) / len(seeds) for place in range(num_points)]

    return mean(axis), mean("value")


def _write_page(
    experiment: Experiment, folder: ExperimentFolder, finished: Mapping[tuple[str, int], Record]
) -> list[str]:
    """A page to look around in with every single run, where all of them were trained on this host."""
    stages = {}
    for (arm, seed), record in finished.items():
        tag = experiment.model_tag(experiment.arms[arm], seed)
        stages[record["run"]] = folder.arm(arm).run(record["run"]) / "base" / tag
    if not all((stage / METRICS_NAME).is_file() for stage in stages.values()):
        return []
    runs = [ComparedRun.read(stage, label) for label, stage in stages.items()]
    page = write_comparison(folder.report / "runs", runs, experiment.name)
    return [f"[Every run, to look around in]({page.relative_to(folder.report)})", ""]


def _about(record: Record) -> dict[str, Any]:
    kept = ("arm", "seed", "run", "steps", "tokens", "checkpoint", "software", "dtype", "hardware", "environment")
    return {name: record[name] for name in kept}


def _render(
    experiment: Experiment,
    folder: ExperimentFolder,
    verdicts: list[str],
    caveats: list[str],
    means: Mapping[str, Mapping[str, Estimate]],
    differences: Mapping[str, Mapping[str, Estimate]],
    finished: Mapping[tuple[str, int], Record],
) -> str:
    plan = make_plan(experiment, folder)
    # As of the runs, which the caveats speak of and the table of runs shows, not of this process.
    equal = {name: value for name, value in plan.equal.items() if name not in ("software", "runs")}
    return "\n".join(
        [
            f"# {experiment.name}",
            "",
            *(f"**{line}**\n" for line in verdicts),
            *(f"- {caveat}" for caveat in caveats),
            "",
            f"![bits per byte over tokens, FLOPs and time]({PICTURE})",
            "",
            *_write_page(experiment, folder, finished),
            "## Figures",
            "",
            "Means over the seeds with 95 % intervals (Student's t), and differences from the first arm, paired by",
            "seed where two seeds or more are common. bpb: bits per byte of a validation set, lower is better.",
            "",
            *_table_of_figures(means, differences),
            "",
            "## What differed",
            "",
            *_table(["", *experiment.arms], [[name, *values] for name, values in plan.differs.items()]),
            "",
            "## What was equal",
            "",
            *_table(["", ""], [[name, value] for name, value in equal.items()]),
            "",
            "## Runs",
            "",
            *_table_of_runs(finished),
            "",
        ]
    )


def _table_of_figures(
    means: Mapping[str, Mapping[str, Estimate]], differences: Mapping[str, Mapping[str, Estimate]]
) -> list[str]:
    arms = list(next(iter(means.values())))
    rows = [
        [metric, *(_interval(by_arm[arm]) for arm in arms), *(_interval(differences[metric][arm]) for arm in arms[1:])]
        for metric, by_arm in means.items()
    ]
    return _table(["metric", *arms, *(f"{arm} − {arms[0]}" for arm in arms[1:])], rows)


def _table_of_runs(finished: Mapping[tuple[str, int], Record]) -> list[str]:
    rows = [
        [
            record["run"],
            f"{record['final'][HEADLINE]:.4f}",
            f"{record['steps']:,}",
            format_seconds(record["curves"]["bpb"]["seconds"][-1]),
            record["hardware"],
            record["software"]["code"],
        ]
        for record in finished.values()
    ]
    return _table(["run", HEADLINE, "steps", "training time", "hardware", "code"], rows)


def _interval(found: Estimate) -> str:
    spread = "" if found.half_width is None else f" ± {found.half_width:.4f}"
    return f"{found.mean:.4f}{spread} (n = {found.n})"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows]]
