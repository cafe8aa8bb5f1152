"""What the scores of an experiment say: `results.json`, tables and plots, made anew from the finished stages."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from trl_dmpo.ranking.auc import coin_flip_auc, pooled_auc
from trl_dmpo.ranking.generated import generated_metrics
from trl_dmpo.ranking.intervals import bootstrap_means, holm, paired_tests
from trl_dmpo.ranking.metrics import pad_candidates
from trl_dmpo.ranking.rows import RankingRows

from .experiment import Arm, Experiment
from .faithfulness import faithfulness_table, plot_faithfulness, summarise_faithfulness
from .plots import plot_against, plot_arms
from .stages import read_stage
from .training import Runner, read_scores, row_metrics


Scores = list[np.ndarray]


def write_results(
    experiment: Experiment, work: Path, folders: tuple[Path, ...], output: Path, pages: Path
) -> dict[str, Any]:
    """
    Write the results of an experiment of which all stages are there.

    Args:
        experiment ([`Experiment`]):
            The experiment.
        work (`Path`):
            Where its stages are.
        folders (`tuple[Path, ...]`):
            Where data is looked for.
        output (`Path`):
            Where `<name>.json` is written.
        pages (`Path`):
            Where `<name>.md`, plots, and pages of explained cases are written.

    Returns:
        `dict`: what the file has.
    """
    runner, arms = Runner(experiment, work, folders), experiment.expand()
    results = {
        "experiment": {name: value for name, value in vars(experiment).items() if value},
        "chosen": {
            method: choice_of(runner, method) for method in dict.fromkeys(arm.method for arm in arms) if method
        },
        "starts": [
            of_start(runner, name, seed)
            for name in dict.fromkeys(arm.start for arm in arms)
            for seed in experiment.seeds
        ],
        "tests": {name: of_test(runner, name) for name in runner.task(experiment.seeds[0]).test},
    }
    if experiment.explain:
        results["faithfulness"] = {arm.name: faithfulness_of(runner, arm) for arm in experiment.explained()}
    for folder in (output, pages):
        folder.mkdir(parents=True, exist_ok=True)
    (output / f"{experiment.name}.json").write_text(as_json(results), encoding="utf-8")
    (pages / f"{experiment.name}.md").write_text("\n".join(page(results, experiment, pages)), encoding="utf-8")
    copy_cases(runner, pages)
    return results


def page(results: Mapping[str, Any], experiment: Experiment, pages: Path) -> list[str]:
    """All figures in Markdown, with plots, which are drawn."""
    metrics = experiment.evaluate["metrics"]
    lines = [f"# {experiment.title}", "", f"Written by `python -m benchmarks.quality {experiment.name}`.", ""]
    for name, test in results["tests"].items():
        file = pages / f"{experiment.name}_{slug(name)}.png"
        title = f"{name}: {test['rows']:,} rows of {test['users']:,} users"
        plot_arms(test["arms"], metrics[0], title, file)
        lines += [f"## Test: {name}", "", f"{test['rows']:,} rows of {test['users']:,} users.", ""]
        for option in experiment.evaluate.get("plot", ()):
            against = file.with_stem(f"{file.stem}_{option}")
            plot_against(test, experiment, option, metrics[0], title, against)
            lines += [f"![{metrics[0]} against {option}]({against.name})", ""]
        lines += [*table(test["arms"], metrics), "", f"![{metrics[0]} of each arm]({file.name})", ""]
        lines += contrasts_table(test["contrasts"], metrics[0])
        lines += short_table(test, metrics[0])
        lines += rescored_table(test["arms"], metrics[0])
    for name, found in results.get("faithfulness", {}).items():
        file = pages / f"{experiment.name}_{slug(name)}_faithfulness.png"
        plot_faithfulness(found, file)
        lines += [f"## Explanations: {name}", "", f"![Without the named items]({file.name})", ""]
        lines += [faithfulness_table(found), ""]
    return lines + settings_table(results["chosen"], experiment) + starts_table(results["starts"])


def contrasts_table(contrasts: Sequence[Mapping[str, Any]], metric: str) -> list[str]:
    """The differences of what is compared beside the arms' usual comparison."""
    if not contrasts:
        return []
    lines = ["Compared, too:", "", f"| {metric} of | less that of | | p | p, adjusted |", "|---|---|--:|--:|--:|"]
    for each in contrasts:
        change = each["difference"][metric]
        cells = [each["arm"], each["less"], told(change, "+.3f"), told_p(change["p"]), told_p(change["p_holm"])]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def short_table(test: Mapping[str, Any], metric: str) -> list[str]:
    """The usual comparison, of rows with a short history."""
    if "short" not in test:
        return []
    lines = [
        f"Of the {test['short']} rows with a short history:",
        "",
        f"| {metric} of | less that of | | p | p, adjusted |",
    ]
    lines.append("|---|---|--:|--:|--:|")
    for name, arm in test["arms"].items():
        if "short" in arm:
            change = arm["short"][metric]
            cells = [name, arm["against"], told(change, "+.3f"), told_p(change["p"]), told_p(change["p_holm"])]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def rescored_table(arms: Mapping[str, Any], metric: str) -> list[str]:
    """What the metric is if candidates are ranked otherwise."""
    ways = {way for arm in arms.values() for way in arm.get("rescored", ())}
    if not ways:
        return []
    columns = ["log-probability", *sorted(ways)]
    lines = [f"Ranked otherwise, {metric}:", "", f"| | {' | '.join(columns)} |", "|---|" + "--:|" * len(columns)]
    for name, arm in arms.items():
        found = {"log-probability": arm["metrics"][metric], **arm.get("rescored", {})}
        if len(found) > 1:
            lines.append(f"| {name} | {' | '.join(told(found[each]) if each in found else '' for each in columns)} |")
    return [*lines, ""]


def settings_table(chosen: Mapping[str, Any], experiment: Experiment) -> list[str]:
    """What there was to choose from, with the figure of the validation rows."""
    lines = []
    for method, found in chosen.items():
        if found["tried"]:
            metric = experiment.tune["metric"]
            best = max(each[metric] for each in found["tried"])
            told = [
                f"{', '.join(f'{name} {value:g}' for name, value in each.items() if name != metric)}: "
                + (f"**{each[metric]:.4f}**" if each[metric] == best else f"{each[metric]:.4f}")
                for each in found["tried"]
            ]
            lines.append(f"| {method} | {'; '.join(told)} |")
    if not lines:
        return []
    return ["## Settings", "", f"| | {metric} of the validation rows |", "|---|---|", *lines, ""]


def starts_table(starts: Sequence[Mapping[str, Any]]) -> list[str]:
    """How the starts were trained."""
    lines = ["## Starts", "", "| | seed | parameters | lowest loss, at epoch | seconds |", "|---|--:|--:|--:|--:|"]
    for each in starts:
        best = "{1:.3f}, {0:g}".format(*each["best"]) if "best" in each else ""
        cells = [each["start"], each["seed"], f"{each['parameters']:,}", best, f"{each['seconds']:.0f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return [*lines, ""]


def copy_cases(runner: Runner, pages: Path) -> None:
    """The explained cases of each arm, of the first seed."""
    for arm in runner.experiment.explained():
        folder = runner.explain(arm, runner.experiment.seeds[0])
        shutil.copy(folder / "cases.html", pages / f"{runner.experiment.name}_{slug(arm.name)}_cases.html")


def slug(name: str) -> str:
    """For the name of a file."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def choice_of(runner: Runner, method: str) -> dict[str, Any]:
    """The settings of a method, and the figure of the validation rows for each that there was to choose from."""
    like = runner.experiment.methods[method].get("like", method)
    trials = [trial for trial in runner.trials(like) if trial]
    # Those of a method like another stand beside that one
    trials = trials if like == method else []
    tried = [trial | {runner.experiment.tune["metric"]: runner.value_of(like, trial)} for trial in trials]
    return {"settings": runner.settings(Arm("", method, "", {})), "tried": tried}


def of_start(runner: Runner, name: str, seed: int) -> dict[str, Any]:
    folder = runner.start(name, seed)
    stage = read_stage(folder)
    known = {key: stage[key] for key in ("versions", "seconds", "parameters", "best", "curve") if key in stage}
    return {"start": name, "seed": seed, "stage": folder.name, **known}


def faithfulness_of(runner: Runner, arm: Arm) -> list[dict[str, Any]]:
    """How the ranking moves without the items that explanations of an arm name; users of all seeds."""
    folders = [runner.explain(arm, seed) for seed in runner.experiment.seeds]
    return summarise_faithfulness(pl.concat([pl.read_parquet(folder / "faithfulness.parquet") for folder in folders]))


def of_test(runner: Runner, test: str) -> dict[str, Any]:
    """The figures of all arms on one test set, and how they differ from the arm that they are compared with."""
    experiment = runner.experiment
    rows = runner.task(experiment.seeds[0]).test[test]
    hashes = {runner.task(seed).test[test].content_hash for seed in experiment.seeds}
    if len(hashes) > 1:
        raise ValueError(f"The rows of {test} are not the same for all seeds: figures cannot be averaged by row.")
    figures, stages = {}, {}
    scored = scores_of(runner, test, stages)
    for name, (scores, answers) in scored.items():
        figures[name] = Figures(rows, scores, answers)
    arms = {arm.name: arm for arm in experiment.expand() if arm.name in figures}
    results = {name: each.summary() | {"stages": stages[name]} for name, each in figures.items()}
    for name, each in results.items():
        arm = arms.get(name, Arm(name, None, "", {}))
        against, start = baseline_of(experiment, list(arms.values()), arm), start_of(list(arms.values()), arm)
        if against is not None:
            each |= {"against": against, "difference": figures[name].compare(figures[against])}
        if start is not None:
            each["from_start"] = figures[name].compare(figures[start])
    adjust([each["difference"] for each in results.values() if "difference" in each])
    if experiment.evaluate.get("rescore"):
        for name, found in rescored(runner, rows, arms, {name: each for name, (each, _) in scored.items()}).items():
            results[name]["rescored"] = found
    about = {"rows": len(rows), "users": len(np.unique(rows.users)), "content_hash": rows.content_hash}
    if "short" in experiment.evaluate:
        short = np.array([len(history) < experiment.evaluate["short"] for history in rows.columns["history_ids"]])
        about["short"] = int(short.sum())
        for name, each in results.items():
            if "against" in each:
                each["short"] = figures[name].compare(figures[each["against"]], short)
        adjust([each["short"] for each in results.values() if "short" in each])
    contrasts = [
        {"arm": second.name, "less": first.name, "difference": figures[second.name].compare(figures[first.name])}
        for contrast in experiment.evaluate.get("contrasts", ())
        for first, second in contrasted(experiment.expand(), contrast)
        if {first.name, second.name} <= figures.keys()
    ]
    adjust([each["difference"] for each in contrasts])
    return about | {"arms": results, "contrasts": contrasts}


def scores_of(runner: Runner, test: str, stages: dict[str, list]) -> dict[str, tuple[list[Scores], list[Any]]]:
    """From arms and baselines to scores and answers of each seed. `stages` gets where they are from, and the seconds."""
    experiment, found = runner.experiment, {}
    for arm in experiment.expand():
        if arm.tests not in test:
            continue
        settings = runner.settings(arm) if arm.method else {}
        models = [runner.train(arm, seed, settings) for seed in experiment.seeds]
        folders = [runner.run(arm, seed)[test] for seed in experiment.seeds]
        scored = [read_stage(folder) for folder in folders]
        found[arm.name] = [read_scores(folder) for folder in folders], [each["answers"] for each in scored]
        stages[arm.name] = [
            {"seed": seed, "model": model.name, "training_seconds": read_stage(model)["seconds"]}
            | {"versions": read_stage(model)["versions"]}
            | {"scores": folder.name, "scoring_seconds": each["seconds"]}
            for seed, model, folder, each in zip(experiment.seeds, models, folders, scored, strict=True)
        ]
    for name in experiment.baselines:
        folders = [runner.baseline(name, seed).get(test) for seed in experiment.seeds]
        if None in folders:
            continue
        found[name] = [read_scores(folder) for folder in folders], [None] * len(folders)
        stages[name] = [
            {"seed": seed, "scores": folder.parent.name}
            | {key: value for key, value in read_stage(folder.parent).items() if key != "made_from"}
            for seed, folder in zip(experiment.seeds, folders, strict=True)
        ]
    return found


def rescored(
    runner: Runner, rows: RankingRows, arms: Mapping[str, Arm], scores: Mapping[str, list[Scores]]
) -> dict[str, dict[str, Any]]:
    """Of each trained arm, the figures by the log-ratio to its start, and by the log-probability of a token."""
    experiment, found = runner.experiment, {}
    starts = {arm.start: name for name, arm in arms.items() if arm.method is None}
    for name, arm in arms.items():
        lengths = [token_counts(runner.start(arm.start, seed), rows) for seed in experiment.seeds]
        other = {"a token": [_pairwise(np.divide, *each) for each in zip(scores[name], lengths, strict=True)]}
        if arm.method is not None and arm.start in starts:
            start = scores[starts[arm.start]]
            other["log-ratio"] = [_pairwise(np.subtract, *each) for each in zip(scores[name], start, strict=True)]
        metric = experiment.evaluate["metrics"][0]
        found[name] = {way: Figures(rows, each).summary()["metrics"][metric] for way, each in other.items()}
    return found


def _pairwise(function: Any, left: Scores, right: Scores) -> Scores:
    return [function(*each) for each in zip(left, right, strict=True)]


def token_counts(start: Path, rows: RankingRows) -> list[np.ndarray]:
    """Tokens of each candidate, with the one that ends it, for a model that reads nothing but titles and line breaks."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(start)
    titles = list({title for candidates in rows.candidates for title in candidates})
    counts = dict(zip(titles, [len(ids) + 1 for ids in tokenizer(titles).input_ids], strict=True))
    return [np.array([counts[title] for title in candidates]) for candidates in rows.candidates]


def baseline_of(experiment: Experiment, arms: Sequence[Arm], arm: Arm) -> str | None:
    """
    The arm that another is compared with: the one of the method `against`, or of `evaluate.baseline`, that begins with the
    same start and learns from the same rows, but for their rejected answers; of several, one whose rejected answers are drawn
    alike, and with most options in common. What is not trained after its start, and classical recommenders, are compared with the
    first.

    Raises:
        `ValueError`: there is none.
    """
    usual = experiment.evaluate.get("baseline")
    method = experiment.methods.get(arm.method, {}).get("against", usual)
    others = [each for each in arms if each.method == method]
    if method is None or arm.method in {usual, *(each.get("against") for each in experiment.methods.values())} - {
        None
    }:
        return None
    if arm.method is None:
        same = [each for each in others if arm.start in ("", each.start)]
        return same[0].name if same else None
    same = [each for each in others if each.start == arm.start and chosen_rows(each) == chosen_rows(arm)]
    if not same:
        raise ValueError(f"{arm.name} of {experiment.name} is compared with {method}, of which no arm has such rows.")

    def likeness(other: Arm) -> tuple[bool, int]:
        shared = sum(arm.rows.get(key) == value for key, value in other.rows.items())
        return arm.rows.get("negatives") == other.rows.get("negatives"), shared

    return max(same, key=likeness).name


def chosen_rows(arm: Arm) -> dict[str, Any]:
    """The options of an arm's rows that say which answers are chosen."""
    return {name: value for name, value in arm.rows.items() if name not in ("k", "pool", "negatives")}


def contrasted(arms: Sequence[Arm], contrast: Mapping[str, Sequence[Any]]) -> list[tuple[Arm, Arm]]:
    """
    Pairs of arms that differ in one option: of the rows, of which negatives may be drawn from pools of different sizes; or in
    the method, where their rejected answers may differ, too, if there are no two with the same.

    Raises:
        `ValueError`: there are none.
    """
    ((option, (first, second)),) = contrast.items()

    def value(arm: Arm) -> Any:
        return arm.method if option == "method" else arm.rows.get(option)

    def others(arm: Arm) -> Any:
        if option == "method":
            return arm.start, chosen_rows(arm)
        return arm.start, arm.method, {name: each for name, each in arm.rows.items() if name not in (option, "pool")}

    found = [(one, other) for one in arms for other in arms if (value(one), value(other)) == (first, second)]
    found = [(one, other) for one, other in found if others(one) == others(other)]
    if not found:
        raise ValueError(f"`evaluate.contrasts`: no two arms differ in {option} alone, {first!r} and {second!r}.")
    alike = [(one, other) for one, other in found if one.rows == other.rows]
    return alike or found


def start_of(arms: Sequence[Arm], arm: Arm) -> str | None:
    """The arm that is the start of another."""
    found = [each.name for each in arms if each.method is None and each.start == arm.start]
    return found[0] if found and arm.method is not None else None


class Figures:
    """
    The figures of an arm: means over seeds for each row, and intervals over users.

    Args:
        rows ([`RankingRows`]):
            N rows.
        scores (`list[list[np.ndarray]]`):
            The scores of each seed.
        answers (`Sequence`, *optional*):
            What the model answered by itself, of each seed, or `None`.
    """

    def __init__(self, rows: RankingRows, scores: list[Scores], answers: Sequence[list[str] | None] = ()):
        self.users = rows.users
        padded = [pad_candidates(each, rows.labels) for each in scores]
        self.of_seeds = [row_metrics(rows, each) for each in scores]
        chosen = [each[label] for each, label in zip(rows.candidates, rows.labels, strict=True)]
        for metrics, given in zip(self.of_seeds, answers, strict=False):
            if given is not None:
                found = generated_metrics(given, chosen, rows.candidates)
                # The third is a ratio of these, which a mean over seeds is not
                metrics |= {name: found[name] for name in ("generated_hit_rate", "generated_valid_ratio")}
        self.pooled = [pooled_auc(*each) for each in padded]
        self.coins = [float(coin_flip_auc(*each).mean()) if len(rows) > 1 else float("nan") for each in padded]
        self.per_row = {name: mean_of([each[name] for each in self.of_seeds]) for name in self.of_seeds[0]}

    def summary(self) -> dict[str, Any]:
        seeds = [{name: float(mean_of(values)) for name, values in each.items()} for each in self.of_seeds]
        extra = [
            {"pooled_auc": pooled, "coin_flip_auc": coin} for pooled, coin in zip(self.pooled, self.coins, strict=True)
        ]
        means = {name: float(np.mean([each[name] for each in extra])) for name in extra[0]}
        estimates = {name: each._asdict() for name, each in bootstrap_means(self.per_row, self.users).items()}
        return {
            "metrics": estimates | {name: {"value": value} for name, value in means.items()},
            "seeds": [one | other for one, other in zip(seeds, extra, strict=True)],
        }

    def compare(self, other: "Figures", of: Any = True) -> dict[str, dict[str, float]]:
        # Only language models give answers by themselves
        ours, theirs = (
            {name: np.where(of, one.per_row[name], np.nan) for name in one.per_row if name in two.per_row}
            for one, two in ((self, other), (other, self))
        )
        found = paired_tests(ours, theirs, self.users)
        return {name: each.difference._asdict() | {"p": each.p_value} for name, each in found.items()}


def mean_of(values: Sequence[Any]) -> np.ndarray:
    """Over the first dimension, of what has a value; NaN where nothing has."""
    counts = np.sum(~np.isnan(values), axis=0)
    return np.where(counts > 0, np.nansum(values, axis=0) / np.maximum(counts, 1), np.nan)


def adjust(compared: Sequence[dict[str, Any]]) -> None:
    """Adds p-values that are adjusted for all comparisons of a metric (Holm)."""
    for metric in dict.fromkeys(metric for each in compared for metric in each):
        having = [each for each in compared if metric in each]
        adjusted = holm([each[metric]["p"] for each in having]).tolist()
        for each, p in zip(having, adjusted, strict=True):
            each[metric]["p_holm"] = p


def table(arms: Mapping[str, Any], metrics: Sequence[str]) -> list[str]:
    """A line for each arm: the metrics, the difference in the first from the arm that it is compared with, and seconds."""
    lines = [
        f"| | {' | '.join(metrics)} | {metrics[0]} less its start's | less that of | | p | p, adjusted | training, s |",
        "|---|" + "--:|" * len(metrics) + "--:|---|--:|--:|--:|--:|",
    ]
    for name, arm in arms.items():
        cells = [told(arm["metrics"][metric]) for metric in metrics]
        cells.append(told(arm["from_start"][metrics[0]], "+.3f") if "from_start" in arm else "")
        if "difference" in arm:
            change = arm["difference"][metrics[0]]
            cells += [arm["against"], told(change, "+.3f"), told_p(change["p"]), told_p(change["p_holm"])]
        else:
            cells += [""] * 4
        seconds = [each["training_seconds"] for each in arm["stages"] if "training_seconds" in each]
        cells.append(f"{np.mean(seconds):.0f}" if seconds else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def told(estimate: Mapping[str, float], form: str = ".3f") -> str:
    value = format(estimate["value"], form)
    return f"{value} ({estimate['low']:{form}} to {estimate['high']:{form}})" if "low" in estimate else value


def told_p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def as_json(results: Mapping[str, Any]) -> str:
    """A line for each innermost object, so that a change of a figure is a change of a line."""
    text = json.dumps(plain(results), indent=1, ensure_ascii=False)
    return re.sub(r"\{[^{}\[\]]*\}", lambda found: re.sub(r"\n *", " ", found[0]), text) + "\n"


def plain(value: Any) -> Any:
    """Numbers that JSON has, to six digits; `null` where there is none."""
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return None if not np.isfinite(value) else float(f"{value:.6g}")
    return value
