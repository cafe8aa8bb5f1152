"""The stages of an experiment: a start, a preference stage, and the scores of the result."""

import itertools
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import polars as pl

from trl_dmpo.ranking.rows import RankingRows

from .baselines import CUTOFFS
from .data import LINES, MAX_HISTORY, Task, make_task
from .experiment import Arm, Experiment
from .models import make_model, make_tokenizer, quiet, run, train_language_model
from .stages import Stages, hash_of


# Of a method, what is no option of `DMPOConfig`
HARNESS_OPTIONS = ("tune", "like", "against")
# Of adapters and the pretrained models under them
DTYPE = "bfloat16"
ROW_COLUMNS = ("prompt", "chosen", "rejected", "user_id")


class Runner:
    """
    Makes the stages of an experiment.

    Args:
        experiment ([`Experiment`]):
            What to do.
        work (`Path`):
            Where stages are kept.
        folders (`tuple[Path, ...]`, *optional*):
            Where data is looked for.
    """

    def __init__(self, experiment: Experiment, work: Path, folders: tuple[Path, ...] = ()):
        self.experiment, self.stages, self.folders = experiment, Stages(work), folders
        self.task, self.start, self.chosen = cache(self._task), cache(self._start), cache(self._chosen)
        self._rows = cache(self._make_rows)

    def _task(self, seed: int) -> Task:
        return make_task(self.experiment.data, seed, self.folders)

    def _make_rows(self, seed: int, options: tuple) -> tuple[Any, str]:
        rows = self.task(seed).rows(**dict(options))
        return rows, content_hash(rows, ("prompt", "chosen", "rejected"))

    def _start(self, name: str, seed: int) -> Path:
        """The model that arms begin with: a folder with weights, or with an adapter, and a tokenizer."""
        options = self.experiment.starts[name]
        if "model" in options and not options.get("train"):
            seed = self.experiment.seeds[0]  # A new adapter changes nothing, whatever is drawn for it
        task = self.task(seed)
        made_from = {"start": options, "seed": seed}
        if "shape" in options:
            made_from["titles"] = hash_of(task.titles)
        if options.get("train"):
            texts = [make(**options.get("texts", {})) for make in (task.texts, task.validation_texts)]
            made_from["texts"] = [content_hash(rows, ("prompt", "chosen")) for rows in texts]
        else:
            texts = []
        return self.stages.get(
            "start", made_from, lambda folder: make_start(options, task.titles, texts, seed, self.folders, folder)
        )

    def settings(self, arm: Arm) -> dict[str, Any]:
        """The options of an arm's training, with those that were chosen by the validation rows."""
        like = self.experiment.methods[arm.method].get("like", arm.method)
        return {**self.experiment.training, **self.chosen(like), **self._options(arm.method)}

    def _options(self, method: str) -> dict[str, Any]:
        return {k: v for k, v in self.experiment.methods[method].items() if k not in HARNESS_OPTIONS}

    def _chosen(self, method: str) -> dict[str, Any]:
        """Of the settings of a method to choose from, those that are best by the validation rows."""
        trials = self.trials(method)
        return max(trials, key=lambda trial: self.value_of(method, trial)) if len(trials) > 1 else trials[0]

    def trials(self, method: str) -> list[dict[str, Any]]:
        """All settings of a method to choose from."""
        tune = self.experiment.methods[method].get("tune", {})
        return [dict(zip(tune, values, strict=True)) for values in itertools.product(*tune.values())]

    def tuned_with(self) -> tuple[str, int]:
        """The start and the seed with which settings are tried."""
        experiment = self.experiment
        start = experiment.tune.get("start", next(iter(experiment.starts)))
        return start, experiment.tune.get("seed", experiment.seeds[0])

    def value_of(self, method: str, trial: Mapping[str, Any]) -> float:
        """The figure of the validation rows that a choice is made by."""
        tune, (start, seed) = self.experiment.tune, self.tuned_with()
        settings = {**self.experiment.training, **self._options(method), **trial}
        folder = self.train(Arm("", method, start, tune.get("rows", {})), seed, settings)
        rows = self.task(seed).validation[tune["test"]]
        return float(np.mean(row_metrics(rows, read_scores(self.score(folder, rows)))[tune["metric"]]))

    def train(self, arm: Arm, seed: int, settings: Mapping[str, Any]) -> Path:
        """The model of an arm: of one without a method, the start."""
        start = self.start(arm.start, seed)
        if arm.method is None:
            return start
        rows, rows_hash = self._rows(seed, tuple(arm.rows.items()))
        made_from = {
            "start": start.name,
            "rows": rows_hash,
            "settings": dict(settings),
            "seed": seed,
        }
        return self.stages.get(
            "model", made_from, lambda folder: train_preference(start, rows, settings, seed, folder)
        )

    def score(self, model: Path, rows: RankingRows) -> Path:
        """The scores that a model gives to the candidates of some rows."""
        made_from = {"model": model.name, "rows": rows.content_hash, "name": rows.name}
        generate = self.experiment.evaluate.get("generate")
        if generate:
            made_from["generate"] = generate
        return self.stages.get("scores", made_from, lambda folder: write_scores(model, rows, folder, generate))

    def run(self, arm: Arm, seed: int) -> dict[str, Path]:
        """The scores of an arm for each test set."""
        settings = self.settings(arm) if arm.method else {}
        model = self.train(arm, seed, settings)
        tests = {name: rows for name, rows in self.task(seed).test.items() if arm.tests in name}
        if not tests:
            raise ValueError(
                f"{arm.name}: `tests` is {arm.tests!r}, but there are: {', '.join(self.task(seed).test)}."
            )
        return {name: self.score(model, rows) for name, rows in tests.items()}

    def baseline(self, name: str, seed: int) -> dict[str, Path]:
        """
        The scores of a classical recommender for each test set in which answers are items, with settings chosen by the
        validation rows.
        """
        from .baselines import GRIDS, OF_RATINGS, fit_baseline, tune_baseline

        task, first = self.task(seed), self.experiment.seeds[0]
        validation = task.validation[self.experiment.tune["test"]]
        scored = {test: rows for test, rows in task.test.items() if "candidate_ids" in rows.columns}
        tests = {test: rows.content_hash for test, rows in scored.items()}
        liked = (task.rated if name in OF_RATINGS else task.liked)()
        metric = self.experiment.tune["metric"]
        made_from = {"baseline": name, "grid": GRIDS[name], "seed": seed, "learnt": hash_of(liked.rows())}
        made_from |= {"tests": tests, "validation": validation.content_hash, "metric": metric, "tuned_with": first}

        def make(folder: Path) -> dict[str, Any]:
            # As those of language models are
            options = tune_baseline(name, liked, validation, first, metric)
            score = fit_baseline(name, liked, seed, options)
            for test, rows in scored.items():
                (folder / test).mkdir()
                save_scores(score(rows), folder / test)
            return {"options": options}

        folder = self.stages.get("baseline", made_from, make)
        return {test: folder / test for test in scored}

    def explain(self, arm: Arm, seed: int) -> Path:
        """Whether explanations of an arm are faithful: a table for users of the test, and some cases to look at."""
        from .faithfulness import measure_faithfulness, write_cases

        options = dict(self.experiment.explain)
        rows = self.task(seed).test[options.pop("test")]
        model = self.train(arm, seed, self.settings(arm) if arm.method else {})
        made_from = {"model": model.name, "rows": rows.content_hash, "options": options, "dtype": "float32"}

        def make(folder: Path) -> dict[str, Any]:
            users = [
                {"user_id": user, "history_ids": history, "candidate_ids": ids[: options["candidates"]]}
                for user, history, ids in zip(
                    *(rows.columns[name] for name in ("user_id", "history_ids", "candidate_ids")), strict=True
                )
                if len(history) >= options["min_history"]
            ][: options["users"]]
            recommender = self.recommender(model, seed)
            given = {name: options[name] for name in ("counts", "methods", "draws") if name in options}
            measure_faithfulness(recommender, users, **given, seed=seed).write_parquet(folder / "faithfulness.parquet")
            write_cases(recommender, users, folder, counts=options["counts"], budget=options.get("budget", 100))
            return {"users": len(users)}

        return self.stages.get("explain", made_from, make)

    def recommender(self, model: Path, seed: int) -> Any:
        """A model as a recommender of the items of a log."""
        from trl_dmpo import Recommender

        task, options = self.task(seed), self.experiment.data
        form = {"prompt": options.get("prompt", LINES), "max_history": options.get("max_history", MAX_HISTORY)}
        # What one item less changes may be less than what bfloat16 rounds away
        return Recommender(*load_to_score(model, "float32"), task.items(), **form)


def content_hash(rows: Any, columns: tuple[str, ...]) -> str:
    """Of what is trained on."""
    return hash_of([rows[column][:] for column in columns])


def make_start(
    options: Mapping[str, Any], titles: list[str], texts: list, seed: int, folders: tuple[Path, ...], folder: Path
) -> dict[str, Any]:
    """
    Write a model to begin with.

    Args:
        options (`Mapping`):
            `shape` and `vocab_size` of a Llama from scratch, or `model`, the name of a pretrained one, with `lora`, the options
            of a [`~peft.LoraConfig`]; and `train`, the arguments of its training, without which it is left as it is.
        titles (`list[str]`):
            What the tokenizer of a new model is made from.
        texts (`list[Dataset]`):
            What to train on, and what says when to stop.
        seed (`int`):
            Seed of weights and training.
        folders (`tuple[Path, ...]`):
            Where pretrained models are looked for first.
        folder (`Path`):
            Where to write.
    """
    if "shape" in options:
        tokenizer = make_tokenizer(titles, options["vocab_size"])
        model = make_model(tokenizer, options["shape"], seed)
    else:
        model, tokenizer = load_pretrained(options, seed, folders)
    found: dict[str, Any] = {"parameters": model.num_parameters()}
    if options.get("train"):
        found |= train_language_model(model, tokenizer, *texts, options["train"], seed, folder / "checkpoints")
        rmtree(folder / "checkpoints")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return found


def load_pretrained(options: Mapping[str, Any], seed: int, folders: tuple[Path, ...]) -> tuple[Any, Any]:
    """A pretrained model with a new adapter, and its tokenizer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .data import find

    name = options["model"]
    with suppress(FileNotFoundError):  # it is a name on the Hub, then
        name = str(find(name, folders))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPE)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options["lora"])), AutoTokenizer.from_pretrained(
        name
    )


def load_to_score(folder: Path, dtype: str = DTYPE) -> tuple[Any, Any]:
    """The model of a stage and its tokenizer; one without an adapter is in float32, as it was written."""
    from trl_dmpo.ranking.models import load_model, unify_lora

    has_adapter = (folder / "adapter_config.json").exists()
    model, tokenizer = load_model(folder, dtype=dtype if has_adapter else "auto", device="cpu")
    return unify_lora(model), tokenizer


def load_to_train(folder: Path) -> Any:
    """The model of a stage, with an adapter that can be trained, or without one."""
    if not (folder / "adapter_config.json").exists():
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder)
    from peft import AutoPeftModelForCausalLM

    return AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True, dtype=DTYPE)


def train_preference(start: Path, rows: Any, settings: Mapping[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    """Train a start on rows with rejected answers and write the result."""
    from transformers import AutoTokenizer

    from trl_dmpo import DMPOConfig, DMPOTrainer
    from trl_dmpo.ranking.self_play import SelfPlayCallback

    settings = dict(settings)
    self_play = settings.pop("self_play", None)
    tokenizer = AutoTokenizer.from_pretrained(start)
    args = DMPOConfig(str(folder / "checkpoints"), save_strategy="no", **settings, **quiet(seed))
    trainer = DMPOTrainer(
        load_to_train(start),
        args=args,
        train_dataset=rows.select_columns([name for name in ROW_COLUMNS if name in rows.column_names]),
        processing_class=tokenizer,
    )
    if self_play:
        trainer.add_callback(SelfPlayCallback(trainer, **self_play))
    run(trainer)
    trainer.save_model(str(folder))
    tokenizer.save_pretrained(folder)
    rmtree(folder / "checkpoints", ignore_errors=True)
    return {"rows": len(rows), "steps": trainer.state.global_step}


def write_scores(path: Path, rows: RankingRows, folder: Path, generate: int | None = None) -> dict[str, Any]:
    """Score the candidates of rows and write the scores, and the answers that the model gives by itself, if asked for."""
    from trl_dmpo import Scorer
    from trl_dmpo.ranking.evaluate import score_rows
    from trl_dmpo.ranking.generation import generate_answers

    model, tokenizer = load_to_score(path)
    save_scores(score_rows(Scorer(model, tokenizer), rows), folder)
    answers = generate_answers(model, tokenizer, rows.prompts, generate) if generate else None
    return {"rows": len(rows), "answers": answers}


def save_scores(scores: list[np.ndarray], folder: Path) -> None:
    """Keep the scores of each row's candidates."""
    column = pl.Series([each.tolist() for each in scores], dtype=pl.List(pl.Float32))
    pl.DataFrame({"scores": column}).write_parquet(folder / "scores.parquet", compression="zstd")


def read_scores(folder: Path) -> list[np.ndarray]:
    """The scores of a stage: an array for each row."""
    return [each.to_numpy() for each in pl.read_parquet(folder / "scores.parquet")["scores"]]


def row_metrics(rows: RankingRows, scores: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Metrics of each row. Those that are the same as another where one candidate is right are left out."""
    from trl_dmpo.ranking.metrics import pad_candidates, ranking_metrics

    metrics = ranking_metrics(*pad_candidates(scores, rows.labels), CUTOFFS)
    return {name: each for name, each in metrics.items() if not name.startswith(("recall@", "map@", "mrr@"))}
