"""The card of a prepared dataset: what it is, how it came about, and pictures of it."""

import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from .plan import Plan
from .splits import SPLIT_NAMES


if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .save import Saved

PICTURE = "images/rows.png"
_CONTROL_PICTURES = {code: 0x2400 + code for code in range(0x20)}
# Told apart also by who sees no difference between red and green
_COLORS = {"train": "#0072B2", "validation": "#E69F00", "test": "#009E73"}


def count_rows(plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """
    What the splits hold.

    Args:
        plans (`Sequence[Plan]`):
            The rows.

    Returns:
        `list[dict]`: for each split that has rows its name, `rows`, `users`, `items` (that are asked for), and mean, smallest
        and largest length of `history` and number of `negatives`.
    """
    counts = []
    for plan in plans:
        for number, split in enumerate(SPLIT_NAMES.categories):
            here = plan.split == number
            if not here.any():
                continue
            counts.append(
                {
                    "split": split,
                    "rows": int(here.sum()),
                    "users": len(np.unique(plan.events.user[plan.event[here]])),
                    "items": len(np.unique(plan.events.item[plan.event[here]])),
                    "history": _range(plan.history.lengths[here]),
                    "negatives": _range((plan.negatives[here] >= 0).sum(axis=1)),
                }
            )
    return counts


def _range(lengths: np.ndarray) -> str:
    low, high = int(lengths.min()), int(lengths.max())
    return str(low) if low == high else f"{lengths.mean():.1f} ({low} to {high})"


def write_card(folder: Path, plans: Sequence[Plan], options: Mapping[str, Any], saved: "Saved") -> None:
    """
    Write `README.md` and its picture.

    Args:
        folder (`Path`):
            The dataset, its files already written.
        plans (`Sequence[Plan]`):
            The rows.
        options (`Mapping[str, Any]`):
            What the dataset was prepared with.
        saved ([`~trl_dmpo.data.save.Saved`]):
            What was written.
    """
    _draw_picture(folder / PICTURE, plans)
    head = {
        "tags": ["recommendation", "preference", "trl", "trl-dmpo"],
        "task_categories": ["text-generation"],
        "configs": [
            {
                "config_name": configuration,
                "data_files": [{"split": split, "path": f"{configuration}/{split}-*.parquet"} for split in splits],
                **({"default": True} if configuration == "preference" else {}),
            }
            for configuration, splits in saved.rows.items()
        ],
    }
    text = f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n{_body(plans, options, saved)}"
    (folder / "README.md").write_text(text, encoding="utf-8")


def _body(plans: Sequence[Plan], options: Mapping[str, Any], saved: "Saved") -> str:
    sources = "\n".join(f"- {one_line(str(plan.log))}" for plan in plans)
    notes = "\n".join(f"- {count:,} {' '.join(reason.split())}" for reason, count in saved.notes.items()) or "Nothing."
    example = json.dumps(saved.examples[0], indent=2, ensure_ascii=False, default=str)
    return f"""# Rows for preference alignment with many rejected answers

Prepared by trl-dmpo from:

{sources}

The licence of the source holds for these rows, too.

{_table(count_rows(plans))}

![Length of the histories, rejected items of a row, and how popular chosen and rejected items are]({PICTURE})

Content hash: `{saved.content_hash}` (SHA-256 of all rows; the same source, options and version give the same).

## Use

```python
from datasets import load_dataset

preference = load_dataset("PATH", "preference")  # prompt, chosen, rejected: for DMPOTrainer
sft = load_dataset("PATH", "sft")                # prompt, completion: for SFTTrainer
ranking = load_dataset("PATH", "ranking")        # prompt, candidates, label: for evaluation
items = load_dataset("PATH", "items")            # the catalogue, and how often each item was liked in training
```

Beside the text, rows have `user_id`, `chosen_id`, `rejected_ids` or `candidate_ids`, `history_ids` and `timestamp`.

## An example

{fenced(example, "json")}

## How it came about

{fenced(yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True).rstrip(), "yaml")}

`trl-dmpo prepare --config prepare.yaml --output_dir out` makes it again.

Left out, changed or found short:

{notes}

No row has its answer in its history, and no training row has in its text what validation or test ask its user.
"""


def one_line(text: str) -> str:
    """
    Text from the data as a line of Markdown that shows it, and holds no markup.

    Example:

    ```python
    >>> from trl_dmpo.data.card import one_line

    >>> one_line("a\\n# <b>")
    'a # &lt;b&gt;'
    ```
    """
    line = " ".join(text.split()).translate(_CONTROL_PICTURES)
    return re.sub(r"([\\`*_|\[\]])", r"\\\1", html.escape(line, quote=False))


def fenced(text: str, language: str) -> str:
    """`text` as a block of code that nothing in it can end."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _table(rows: list[dict[str, Any]]) -> str:
    columns = list(rows[0])
    lines = [columns, ["---"] + ["--:"] * (len(columns) - 1)]
    lines += [
        [f"{row[column]:,}" if isinstance(row[column], int) else row[column] for column in columns] for row in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _draw_picture(path: Path, plans: Sequence[Plan]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    histories, numbers, popularity = figure.subplots(1, 3)
    _draw_counts(histories, [_by_split(plan, plan.history.lengths) for plan in plans], "items in the history")
    lengths = [_by_split(plan, (plan.negatives >= 0).sum(axis=1)) for plan in plans]
    _draw_counts(numbers, lengths, "rejected items")
    _draw_popularity(popularity, plans)
    histories.legend()
    path.parent.mkdir()
    # Without the version of the library, so that the same rows give the same file
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _by_split(plan: Plan, values: np.ndarray) -> dict[str, np.ndarray]:
    names = SPLIT_NAMES.categories
    return {names[number]: values[plan.split == number] for number in np.unique(plan.split).tolist()}


def _draw_counts(axes: "Axes", splits: list[dict[str, np.ndarray]], label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    named = [(split, values) for each in splits for split, values in each.items()]
    width = 0.8 / len(named)
    for number, (split, values) in enumerate(named):
        value, count = np.unique(values, return_counts=True)
        axes.bar(value - 0.4 + (number + 0.5) * width, count / len(values), width, color=_COLORS[split], label=split)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, np.rint(low) - 0.5), max(high, np.rint(high) + 0.5))
    axes.set_xlabel(label)
    axes.set_ylabel("share of the split's rows")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _draw_popularity(axes: "Axes", plans: Sequence[Plan]) -> None:
    chosen = np.concatenate([plan.popularity[plan.events.item[plan.event]] for plan in plans])
    rejected = np.concatenate([plan.popularity[plan.negatives[plan.negatives >= 0]] for plan in plans])
    edges = np.concatenate([[-0.5, 0.5], np.geomspace(1.5, max(chosen.max(), rejected.max(initial=0), 2) + 1, 24)])
    for items, label, color in ((chosen, "chosen", "#0072B2"), (rejected, "rejected", "#D55E00")):
        if len(items):
            share = np.histogram(items, edges)[0] / len(items)
            axes.stairs(share, np.maximum(edges, 0.3), label=label, color=color, linewidth=2)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlabel("times an item was liked in training")
    axes.set_ylabel("share of items")
    axes.legend()
