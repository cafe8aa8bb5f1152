"""
Rows of any kind against the trainer: each is refused with its place and column, or has the log-probabilities of a plain forward.

    python -m tests.fuzz.fuzz_rows 60000 CORPUS    # so many rows, by atheris, which looks for branches it has not seen
"""

import contextlib
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset

from tests.conftest import build_model
from tests.fuzz.engine import quiet, run
from tests.fuzz.generate import make_row, make_stream
from tests.fuzz.tokenizers import TOKENIZERS
from trl_dmpo import DMPOConfig, DMPOTrainer
from trl_dmpo.data.formats.records import Unusable
from trl_dmpo.data.schema import find_fault
from trl_dmpo.ranking.row_checks import convert_row
from trl_dmpo.trainer.collator import is_nested
from trl_dmpo.trainer.row_checks import Needs
from trl_dmpo.trainer.tokenization import Untokenizable, check_row, describe, prepare_dataset, tokenize_row


NEEDS = [
    Needs(("sigmoid",)),
    Needs(("lipo",)),
    Needs(("plackett_luce",)),
    Needs(("infonca",), num_hard_negatives=2),
    Needs(("dmpo",), ld_alpha=0.5),
]

# Rows that are longer, laid out, are only laid out: what a position sees is the same at any length
LONGEST_FORWARD = 1000


@dataclass
class Bench:
    """What rows are tried on, and how many there were of which kind."""

    tokenizer: Any
    trainer: DMPOTrainer
    counts: Counter[str] = field(default_factory=Counter)
    largest_difference: float = 0.0

    @classmethod
    def make(cls, kind: str, folder: Path) -> "Bench":
        tokenizer = TOKENIZERS[kind]()
        path = build_model("llama", len(tokenizer), folder)
        rows = [{"prompt": "Next:", "chosen": " Heat", "rejected": [" Big", " Jaws"]}]
        args = DMPOConfig(str(folder), report_to="none", bf16=False, gradient_checkpointing=False, use_cpu=True)
        trainer = DMPOTrainer(str(path), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        trainer.model.eval()
        return cls(tokenizer, trainer)


def try_rows(bench: Bench, draw: Random) -> None:
    """Draws some rows, and asserts of them all that is promised."""
    needs = draw.choice(NEEDS)
    rows = [make_row(draw) for _ in range(draw.randrange(1, 9))]
    outcomes = [_outcome(bench, row, needs) for row in rows]
    for row in rows:
        with contextlib.suppress(Unusable):  # of the evaluation, which has columns of its own
            assert len(convert_row(row)["candidates"]) > 1
    bench.counts["rows"] += len(rows)
    bench.counts["refused"] += sum(isinstance(outcome, str) for outcome in outcomes)
    # A forward, and datasets, take ten times as long as what comes before them
    kind = draw.randrange(8)
    if kind < 2:
        _compare(bench, [outcome for outcome in outcomes if not isinstance(outcome, str)], draw)
    elif kind < 4 and all(isinstance(column, str) for row in rows for column in row):
        _prepare(bench, make_stream(rows), outcomes, needs)
    elif kind == 4:
        _prepare_table(bench, rows, needs)


def _outcome(bench: Bench, row: Any, needs: Needs) -> dict | str:
    """Token ids of a row, or why there are none, of which the trainer must say the column; twice the same."""
    found = []
    for _ in range(2):
        problem = check_row(row, needs)
        try:
            ids = tokenize_row(row, bench.tokenizer, bench.tokenizer.eos_token) if problem is None else None
        except Untokenizable as error:
            problem = error.problem
        if problem is not None:
            assert problem.column in (*("prompt", "chosen", "rejected", "relevance"), "tools", "chat_template_kwargs")
            told = describe(problem, "train", 0)
            assert problem.reason
            assert len(told) < 1000 + sum(len(str(column)) for column in row), "a message is for people to read"
        found.append(told if problem is not None else ids)
    assert found[0] == found[1]
    return found[0]


def _prepare(bench: Bench, dataset: Any, outcomes: list[dict | str], needs: Needs) -> None:
    """The good rows of a dataset are what they are alone, and the first bad one is named."""
    good = {index: outcome for index, outcome in enumerate(outcomes) if not isinstance(outcome, str)}
    given = ("train", bench.tokenizer, bench.tokenizer.eos_token)
    config = SimpleNamespace(
        on_invalid_row="drop", max_length=None, truncation_mode="keep_start", dataset_num_proc=None
    )
    if good or isinstance(dataset, IterableDataset):
        prepared = {row["row_index"]: row for row in prepare_dataset(dataset, *given, config, needs)}
        assert list(prepared) == list(good)
        for index, example in good.items():
            assert {name: prepared[index][name] for name in example} == example
    if len(good) < len(outcomes):
        config.on_invalid_row = "raise"
        first = min(set(range(len(outcomes))) - set(good))
        with pytest.raises(ValueError, match=rf"^train\[{first}\], column '"):
            list(prepare_dataset(dataset, *given, config, needs))
    bench.counts["datasets"] += 1


def _prepare_table(bench: Bench, rows: list[Any], needs: Needs) -> None:
    """The same of rows in a table, if Arrow takes them: it fills in and changes some."""
    if any(find_fault(row) is not None for row in rows):
        return  # pyarrow follows a list that holds itself until the process ends
    try:
        dataset = Dataset.from_list(rows)
    except Exception:  # Arrow's own, of many kinds
        return
    bench.counts["tables"] += 1
    _prepare(bench, dataset, [_outcome(bench, row, needs) for row in dataset], needs)


def _compare(bench: Bench, examples: list[dict], draw: Random) -> None:
    """Log-probabilities of a batch, against those of each completion after its prompt in a row of its own."""
    trainer, collator = bench.trainer, bench.trainer.data_collator
    max_length, mode = draw.choice([(None, "keep_start"), (None, "keep_start"), (40, "keep_start"), (40, "keep_end")])
    if mode == "keep_start" and max_length is not None:
        examples = [example for example in examples if len(example["prompt_ids"]) < max_length]
    collator.max_length, collator.truncation_mode = max_length, mode
    examples = [example for example in examples if _length(example, collator) <= LONGEST_FORWARD]
    if not examples:
        return
    batch = collator(examples)
    with torch.no_grad():
        scored = trainer._token_logps(trainer.model, batch)
    assert torch.isfinite(scored).all()
    for row, example in enumerate(examples):
        chosen = example["chosen_ids"] if is_nested(example["chosen_ids"]) else [example["chosen_ids"]]
        places = {
            **dict(enumerate(chosen)),
            **dict(enumerate(example["rejected_ids"], batch["chosen_lengths"].size(1))),
        }
        for place in draw.sample(list(places), min(2, len(places))):
            expected = _plain(trainer.model, example["prompt_ids"], places[place], max_length, mode)
            got = scored[row, place, : len(expected)]
            assert batch["completion_lengths"][row, place] == len(expected)
            difference = (got - expected).abs().max().item()
            assert difference < 2e-4, f"{difference} at {place} of {example}"
            bench.largest_difference = max(bench.largest_difference, difference)
        bench.counts["compared"] += 1
        bench.counts["completions compared"] += min(2, len(places))


def _length(example: dict, collator: Any) -> int:
    return collator([example])["input_ids"].numel()


def _plain(model: Any, prompt: list[int], completion: list[int], max_length: int | None, mode: str) -> torch.Tensor:
    ids, begin = [*prompt, *completion], len(prompt)
    if max_length is not None and mode == "keep_end":
        begin, ids = max(begin - max(len(ids) - max_length, 0), 0), ids[-max_length:]
    ids = torch.tensor([ids[:max_length]])
    with torch.no_grad():
        logps = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    # Nothing predicts the first token of all
    return logps[begin - 1 :] if begin > 0 else torch.cat([torch.zeros(1), logps])


def main() -> None:
    quiet()
    torch.set_num_threads(1)
    benches = [Bench.make(kind, Path(tempfile.mkdtemp())) for kind in TOKENIZERS]

    def tell() -> str:
        counts = sum((bench.counts for bench in benches), Counter())
        difference = max(bench.largest_difference for bench in benches)
        return (
            f"{', '.join(f'{count:,} {what}' for what, count in counts.items())}; largest difference {difference:.1e}"
        )

    modules = [
        f"trl_dmpo.{name}"
        for name in ("data.schema", "trainer.tokenization", "trainer.row_checks", "ranking.row_checks")
    ]
    run(
        lambda draw: try_rows(draw.choice(benches), draw),
        lambda: sum(bench.counts["rows"] for bench in benches),
        tell,
        modules,
    )


if __name__ == "__main__":
    main()
