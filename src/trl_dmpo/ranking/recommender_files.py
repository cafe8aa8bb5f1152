"""A recommender as one folder: model, tokenizer, catalogue and how it asks. Whole, or not there."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import yaml
from peft import PeftModel

from trl_dmpo import __version__

from ..data.build_config import BuildConfig
from ..data.folders import FolderKind, written_aside
from ..data.prompts import DOMAINS, PROMPTS, Domain, Form
from ..data.save import OPTIONS_FILE
from .asking import ask


if TYPE_CHECKING:
    from .recommender import Recommender


OPTIONS = "recommender.json"
CATALOGUE = "catalogue.parquet"
RECOMMENDER = FolderKind("a recommender", OPTIONS, option="folder")


def save_recommender(recommender: "Recommender", folder: Path) -> None:
    """Write a recommender beside `folder`, then put it in its place. What [`Recommender.save_pretrained`] does."""
    model = recommender.scorer.model
    options = {
        "form": describe_form(recommender.form),
        "normalize": recommender.normalize,
        "max_history": recommender.max_history,
        "trl_dmpo_version": __version__,
    }
    is_peft = isinstance(model, PeftModel)
    if is_peft and model.active_adapters != ["default"]:
        raise ValueError(
            f"the active adapter is {', '.join(model.active_adapters)}, but only one of the name default is loaded from a folder. "
            "Load it under that name, or merge it with `merge_and_unload`."
        )
    for config in getattr(model, "peft_config", {}).values():
        if not config.base_model_name_or_path:
            raise ValueError(
                "the adapter's base model was not loaded from anywhere, so the adapter alone could not be loaded again. "
                "Save the base model and load it from there, or merge the two with `merge_and_unload`."
            )
    with written_aside(folder, RECOMMENDER, overwrite=True) as aside:
        # Of DMPO that went on from an adapter, the reference is another one
        model.save_pretrained(aside, **({"selected_adapters": ["default"]} if is_peft else {}))
        _find_base_from_anywhere(aside)
        recommender.scorer.tokenizer.save_pretrained(aside)
        recommender.catalogue.write_parquet(aside / CATALOGUE)
        text = json.dumps(options, indent=2, ensure_ascii=False)
        (aside / OPTIONS).write_text(f"{text}\n", encoding="utf-8")


def _find_base_from_anywhere(folder: Path) -> None:
    """Where an adapter names the folder of its base model, a path that holds wherever the adapter is loaded."""
    for file in folder.rglob("adapter_config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        base = Path(config["base_model_name_or_path"])
        if base.is_dir():
            config["base_model_name_or_path"] = str(base.resolve())
            file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def load_options(folder: Path) -> dict[str, Any]:
    """
    The arguments of [`Recommender`] beside model and tokenizer, from a folder.

    Raises:
        `FileNotFoundError`: the folder is not there or holds no recommender.
        `ValueError`: its options cannot be read.
    """
    for name in (OPTIONS, CATALOGUE):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} is no recommender: there is no {name}. Make one with `Recommender(...).save_pretrained({str(folder)!r})`, "
                "or with `trl-dmpo recommend --model_name_or_path MODEL --dataset_name FOLDER --save_recommender DIR`."
            )
    try:
        options = json.loads((folder / OPTIONS).read_text(encoding="utf-8"))
        return {
            "catalogue": pl.read_parquet(folder / CATALOGUE),
            "prompt": make_form(options["form"]),
            "normalize": options["normalize"],
            "max_history": options["max_history"],
        }
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, pl.exceptions.PolarsError) as error:
        raise ValueError(f"{folder}: the recommender cannot be read: {type(error).__name__}: {error}") from error


def describe_form(form: Form) -> dict[str, Any]:
    """
    A form as plain values, from which [`make_form`] makes it again.

    Raises:
        `ValueError`: it is not one of `PROMPTS`.

    Example:

    ```python
    >>> from trl_dmpo.data.prompts import NextItem
    >>> from trl_dmpo.ranking.recommender_files import describe_form

    >>> describe_form(NextItem(domain="film"))
    {'name': 'next_item', 'options': {'domain': 'film', 'features': (), 'chat': False, 'wording': 'lines'}}
    ```
    """
    name = next((name for name, kind in PROMPTS.items() if type(form) is kind), None)
    if name is None:
        raise ValueError(
            f"`prompt`: {type(form).__name__} is a form of your own, which nothing could load again by its name. Add it to "
            "`trl_dmpo.data.prompts.PROMPTS`, or use a `Template`."
        )
    options = {field.name: getattr(form, field.name) for field in fields(form)}
    if isinstance(form.domain, Domain):
        options["domain"] = asdict(form.domain)
    return {"name": name, "options": options}


def make_form(description: Mapping[str, Any]) -> Form:
    """The form that [`describe_form`] has described."""
    options = dict(description["options"])
    if isinstance(options["domain"], dict):
        options["domain"] = Domain(**options["domain"])
    return PROMPTS[description["name"]](**options)


def read_prepared(folder: Path) -> dict[str, Any]:
    """
    The arguments of [`Recommender`] beside model and tokenizer, from a dataset of `trl-dmpo prepare`.

    Raises:
        `FileNotFoundError`: the folder is not there or holds no such dataset.
        `ValueError`: it has two catalogues, or its prompts cannot be written again, or were shortened to `max_prompt_tokens`.
    """
    if not (folder / OPTIONS_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} holds no dataset of `trl-dmpo prepare`: there is no {OPTIONS_FILE}. Make one, or give the catalogue "
            "and the prompt to `Recommender`."
        )
    options = yaml.safe_load((folder / OPTIONS_FILE).read_text(encoding="utf-8"))
    files = sorted((folder / "items").glob("*.parquet"))
    if len(files) != 1:
        raise ValueError(
            f"{folder} has {len(files)} catalogues in {folder / 'items'}; a recommender has one. Read it with polars and give "
            "it to `Recommender`, with the prompt."
        )
    if options.get("max_prompt_tokens") is not None:
        raise ValueError(
            f"{folder} was prepared with `max_prompt_tokens`, which shortened histories to fit a tokenizer, and a recommender "
            "does not. Prepare it with `max_history`, or give the catalogue, the prompt and `max_history` to `Recommender`."
        )
    catalogue = pl.read_parquet(files[0])
    config = BuildConfig(**{field.name: options[field.name] for field in fields(BuildConfig) if field.name in options})
    return {"catalogue": catalogue, "prompt": _find_form(config, folder, catalogue), "max_history": config.max_history}


def _find_form(config: BuildConfig, folder: Path, catalogue: pl.DataFrame) -> Form:
    """
    The form that writes the prompts of the dataset.

    What kind of thing an item is may be known from the source alone, and not be among the options. So all that there are
    are tried on rows of the dataset.
    """
    forms = [config.make_form(domain) for domain in DOMAINS]
    if not forms[0].negatives:  # no recommender asks so, which it says itself
        return forms[0]
    rows = _first_rows(folder)
    items = {row["item_id"]: row for row in catalogue.iter_rows(named=True)}
    for form in forms:
        for row in rows:
            history, named = ([items[item] for item in ids] for ids in (row["history_ids"], _named(row)))
            if any(_letters(ask(each, history, named)) == _letters(row["prompt"]) for each in _fixed(form)):
                return form
    raise ValueError(
        f"{folder}: the first {len(rows)} prompts cannot be written again from {OPTIONS_FILE}. Give the catalogue and the prompt "
        "to `Recommender`."
    )


def _first_rows(folder: Path) -> list[dict]:
    file = min((folder / "preference").glob("*.parquet"), default=None)
    if file is None:
        raise FileNotFoundError(f"{folder} has no rows in {folder / 'preference'}. Prepare it again.")
    return pl.scan_parquet(file).head(_ROWS_TRIED).collect().to_dicts()


def _named(row: Mapping[str, Any]) -> list:
    """The items to tell apart, which a prompt may list."""
    return [row["chosen_id"], *row["rejected_ids"]]


def _fixed(form: Form) -> list[Form]:
    """The form in each of its wordings, if it is drawn for each row."""
    if getattr(form, "wording", None) != "any":
        return [form]
    return [replace(form, wording=wording) for wording in ("lines", "quotes", "semicolons")]  # type: ignore[call-arg]


def _letters(prompt: Any) -> list[str]:
    """The same for any order of the candidates, which is random."""
    return sorted(prompt if isinstance(prompt, str) else "".join(message["content"] for message in prompt))


_ROWS_TRIED = 100
