"""Small data sets in the forms of the real ones, for a trial of an experiment."""

import json
from pathlib import Path

import numpy as np


USERS, ITEMS = 60, 60


def write_made_up_data(folder: Path) -> Path:
    """Users who like one of two kinds of things, as MovieLens-100K, files of the DMPO paper, and a file of the LLaRA form."""
    titles = [f"{'Red' if number < ITEMS // 2 else 'Blue'} film {number}" for number in range(ITEMS)]
    generator = np.random.default_rng(0)
    order = [generator.permutation(ITEMS // 2) + ITEMS // 2 * (user % 2) for user in range(USERS)]
    _write_log(folder / "ml-100k", titles, order)
    for name in ("ml_1m", "amazon_movie"):
        _write_pairs(folder / "dmpo", name, titles, order)
    _write_listed(folder / "llara", titles, order)
    return folder


def _write_log(folder: Path, titles: list[str], order: list[np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    # As in the real one, some are of the same time
    lines += [
        f"{user + 1}\t{item + 1}\t{2 if place % 4 == 3 else 5}\t{place // 4}"
        for user, items in enumerate(order)
        for place, item in enumerate(items[:20])
    ]
    (folder / "ml-100k.inter").write_text("\n".join(lines) + "\n")
    items = [f"{number + 1}\t{title}\t1990\tDrama" for number, title in enumerate(titles)]
    header = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"
    (folder / "ml-100k.item").write_text("\n".join([header, *items]) + "\n")


def _write_pairs(folder: Path, name: str, titles: list[str], order: list[np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)

    def record(user: int, negative: int) -> dict:
        history = "".join(f" <Title:{titles[item]}> " for item in order[user][:4])
        right, wrong = (f" <Title:{titles[item]}> " for item in (order[user][5], order[1 - user % 2][negative]))
        first, second = (right, wrong) if (user + negative) % 4 < 2 else (wrong, right)
        instruction = (
            "You are an assistant working on movie recommendations. Here is the user's history of movies they have watched: "
            f"{history}. Rank the likelihood of the user watching the two movies {first} and {second}."
        )
        return {"instruction": instruction, "input": "", "output": [f"{right}, {wrong}", f"{wrong}, {right}"]}

    for k in range(1, 6):
        rows = [record(user, negative) for user in range(20) for negative in range(k)]
        (folder / f"{name}_dpo_{k}.json").write_text(json.dumps(rows))
    (folder / f"{name}_eval.json").write_text(json.dumps([record(user, 9) for user in range(20, USERS)]))


def _write_listed(folder: Path, titles: list[str], order: list[np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "historyList": "::".join(titles[item] for item in items[:5]),
            "itemList": [titles[item] for item in (*order[1 - user % 2][:3], items[6], *order[1 - user % 2][3:6])],
            "trueSelection": titles[items[6]],
        }
        for user, items in enumerate(order)
    ]
    (folder / "lastfm_val.json").write_text(json.dumps(rows))
