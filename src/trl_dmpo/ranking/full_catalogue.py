"""Rows whose candidates are all items of the catalogue, instead of a sample."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import yaml

from ..data.build_config import BuildConfig
from ..data.prompts import Form
from ..data.save import OPTIONS_FILE
from .rows import FullCatalogue, RankingRows, as_text


def with_full_catalogue(rows: RankingRows, dataset: str | Path) -> RankingRows:
    """
    The rows of a prepared dataset with all items of its catalogue as candidates, but for those of the row's history.

    Items of one title have one answer, and are one candidate: no score can tell them apart.

    Args:
        rows ([`RankingRows`]):
            Its rows.
        dataset (`str` or `Path`):
            A folder made by `trl-dmpo prepare`, or its name on the Hub, which says in what form the prompts are.

    Returns:
        [`RankingRows`]: with `catalogue`.

    Raises:
        `ValueError`: the rows have no catalogue, their prompts list the candidates, or their answers do not name its items.
    """
    if rows.items is None or not {"chosen_id", "history_ids"} <= rows.columns.keys():
        raise ValueError(
            f"`full_catalogue`: {rows.name} has no catalogue of items. Use a dataset of `trl-dmpo prepare`."
        )
    form = _load_form(dataset)
    if form.listed:
        raise ValueError(
            f"`full_catalogue`: the prompts of {rows.name} list their candidates, so no other item can be the answer. Prepare "
            "the data with `--prompt next_item`."
        )
    answers = [form.answer(item) for item in rows.items.iter_rows(named=True)]
    if any(answer is None for answer in answers):
        raise ValueError(
            f"`full_catalogue`: an answer in {rows.name} names no item of the catalogue. Prepare the data with `--prompt "
            "next_item`."
        )
    return _over(rows, rows.items["item_id"].to_list(), answers)


def _load_form(dataset: str | Path) -> Form:
    """The form of the prompts, for its answers: the words of its prompts may be another domain's."""
    path = Path(dataset).expanduser() / OPTIONS_FILE
    if not path.parent.is_dir():
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(str(dataset), OPTIONS_FILE, repo_type="dataset"))
    options = yaml.safe_load(path.read_text(encoding="utf-8"))
    config = BuildConfig(**{field.name: options[field.name] for field in fields(BuildConfig) if field.name in options})
    return config.make_form("item")


def _over(rows: RankingRows, ids: list, answers: list) -> RankingRows:
    texts = [as_text(answer) for answer in answers]
    number = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    answer_of = {item: number[text] for item, text in zip(ids, texts, strict=True)}
    # Of items with one answer, the first
    items = np.unique([number[text] for text in texts], return_index=True)[1].tolist()
    chosen = _chosen(rows, answer_of, [texts[item] for item in items])
    kept = [
        np.setdiff1d(np.arange(len(items)), [answer_of[item] for item in history if answer_of[item] != right])
        for history, right in zip(rows.columns["history_ids"], chosen, strict=True)
    ]
    distinct, distinct_ids = [answers[item] for item in items], [ids[item] for item in items]
    return replace(
        rows,
        name=f"{rows.name}, all items",
        candidates=[[distinct[place] for place in places] for places in kept],
        labels=np.array([np.searchsorted(places, right) for places, right in zip(kept, chosen, strict=True)]),
        columns=rows.columns | {"candidate_ids": _ids(rows, kept, chosen, distinct_ids)},
        description=f"{rows.description} Ranked: all {len(items):,} answers that the catalogue has, but those of the history.",
        catalogue=FullCatalogue(distinct, kept),
    )


def _chosen(rows: RankingRows, answer_of: dict, texts: list[str]) -> list[int]:
    """The number of each row's right answer, which must be the one that the row has."""
    chosen = [answer_of[item] for item in rows.columns["chosen_id"]]
    for place, (right, candidates, label) in enumerate(zip(chosen, rows.candidates, rows.labels, strict=True)):
        if as_text(candidates[label]) != texts[right]:
            raise ValueError(
                f"`full_catalogue`: the right answer of {rows.name}[{rows.places[place]}] is {as_text(candidates[label])!r}, but "
                f"the prompt form of {OPTIONS_FILE} names the item {texts[right]!r}. Prepare the data again."
            )
    return chosen


def _ids(rows: RankingRows, kept: list[np.ndarray], chosen: list[int], ids: list) -> list[list]:
    found = [[ids[place] for place in places] for places in kept]
    for row, places, right, item in zip(found, kept, chosen, rows.columns["chosen_id"], strict=True):
        row[int(np.searchsorted(places, right))] = item
    return found
