"""
Whether explanations are faithful: what becomes of a recommendation when the items that its explanation names are
removed.

Of each user, the first recommendation among some candidates is explained by `trl_dmpo.ranking.explain`. Then n items
of the history are left out, those that the explanation names or others, and the candidates are ranked anew.

Not all of this can come out otherwise. An ablation attribution *is* the change of the log-odds against the runner-up
when one item is left out. At n = 1 no other item can move these log-odds more, and first place, which mostly goes to
the runner-up, follows them. What can come out otherwise: sets of several items, in prompts that no ablation has
scored; and what is measured against the candidates other than the runner-up ("held out"), of which the attributions
know nothing. At n = 1 that is half a test, as the score of the item itself is in both. And 0 is no yardstick: the
item was first partly by luck, and tends to lose from any change, so the yardstick is what random items do.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl


KINDS = {
    "named": "the items that speak for it most",
    "random": "random items",
    "recent": "the most recent items",
    "against": "the items that speak for it least",
}
BASELINES = ("random", "recent")  # what the named items are compared with
# On the explained item. `_change`: less what it was before, in ranks or nats
EFFECTS = {
    "changed": "no longer first",
    "rank_change": "rank, change",
    "held_out_rank_change": "rank without the runner-up, change",
    "log_odds_change": "log-odds against the runner-up, change",
    "held_out_log_odds_change": "log-odds against the others, change",
    "log_prob_change": "log-probability, change",
    "moved": "ranks moved, mean of all candidates",
}
# What was removed, as shares of the n items
SHARES = {"speaking": "speak for it", "recent": "among the n most recent"}
LEGEND = (
    "Means over users and their 95% intervals. The explained item is the first recommendation; n items of the history "
    "are left out: named, {named}; random, the mean of several draws; recent, the latest; against, {against}. Log- "
    "odds against the others: the mean against each candidate but the runner-up, in nats. p: sign-flip tests paired "
    "by user, adjusted by Holm's method over all of the table. * True by definition, so not tested: an ablation "
    "attribution is this change. What else stands at n = 1 of ablation follows from it in part; the evidence is n > "
    "1, and the figures without the runner-up, which attributions do not know."
).format(**KINDS)
PAGE = (
    '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
    "<title>Explanations, and ranks without what they name</title></head>"
    '<body style="color: {foreground}; background: {background}"><pre style="font-family: monospace">{code}</pre>'
    "</body></html>\n"
)
COLOURS = ["#d55e00", "#0072b2", "#009e73", "#cc79a7"]  # told apart by the colour-blind, too


def measure_faithfulness(
    recommender: Any,
    users: Sequence[Mapping[str, Any]],
    counts: Sequence[int] = (1, 2, 3),
    methods: Sequence[str] = ("ablation",),
    draws: int = 5,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> pl.DataFrame:
    """
    What removing items of a history does to the first recommendation, and to the other candidates.

    `named` and `against` are the n items of the largest and of the smallest attributions, whatever their signs: every
    kind removes as many, and no user is left out. `speaking_share` says how many of them do speak for the item.
    `random` items are drawn from the whole history, so that some of them are named ones.

    The prompts of a user are ranked together, each set of removed items once, whichever kinds and methods ask for it.

    Args:
        recommender ([`~trl_dmpo.Recommender`]):
            What recommends, and is explained.
        users (`Sequence[Mapping]`):
            Each with `user_id`, `history_ids` (oldest first; of more than `max_history` the latest count) and
            `candidate_ids`, at least 3.
        counts (`Sequence[int]`, *optional*, defaults to `(1, 2, 3)`):
            Numbers n of items to remove, all smaller than any history.
        methods (`Sequence[str]`, *optional*, defaults to `("ablation",)`):
            Methods of attribution, as of [`~trl_dmpo.ranking.explain.explain`].
        draws (`int`, *optional*, defaults to `5`):
            Random sets of each size, all different; all that there are, if they are fewer.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the random sets and of sampled Shapley values.
        progress (`Callable[[int], None]`, *optional*):
            Called with the number of users done since the last call.

    Returns:
        `pl.DataFrame`: a row for each user, method, n and kind, in this order, with the effects on the explained
        item, named as in `EFFECTS`, and what was removed, as in `SHARES` with `_share`; for `random` the means over
        draws. `noise` is by how much the log-odds against the runner-up, with the whole history, differ between two
        scorings, in nats. Where noise made the item first, so that it is not when scored again, `changed` is NaN.

    Raises:
        `ValueError`: there are no users, one lacks something, has too short a history or too few candidates, or an
        option
            is out of its range; the message names the user.
    """
    _check_options(counts, methods, draws)
    histories = [_history(recommender, user, max(counts)) for user in users]
    if not histories:
        raise ValueError("`users` is empty. Give at least one user.")
    records = []
    for place, (user, history) in enumerate(zip(users, histories, strict=True)):
        generator = np.random.default_rng([seed, place])
        random = {n: _draw_sets(len(history), n, draws, generator) for n in counts}
        try:
            of_user = _measure_user(recommender, history, list(user["candidate_ids"]), random, methods, seed)
        except ValueError as error:
            raise ValueError(f"`users[{place}]`, user {user['user_id']!r}: {error}") from error
        records += [{"user_id": user["user_id"], **record} for record in of_user]
        if progress is not None:
            progress(1)
    return pl.DataFrame(records, infer_schema_length=None)


def _check_options(counts: Sequence[int], methods: Sequence[str], draws: int) -> None:
    for name, values in (("counts", counts), ("methods", methods)):
        if not len(values) or len(set(values)) < len(values):
            raise ValueError(f"`{name}` is {values!r}; give at least one, and each once.")
    if min(counts) < 1:
        raise ValueError(f"`counts` has {min(counts)}, but at least 1 item is removed.")
    if draws < 1:
        raise ValueError(f"`draws` is {draws}, but it is at least 1.")


def _history(recommender: Any, user: Mapping[str, Any], most: int) -> list:
    """The items of the prompt, of which `most` are to be removed and some are to stay."""
    missing = [name for name in ("user_id", "history_ids", "candidate_ids") if name not in user]
    if missing:
        raise ValueError(f"a user has no {missing[0]!r}, only: {', '.join(user)}.")
    history = list(user["history_ids"])
    shown = history[-recommender.max_history :] if recommender.max_history else history
    if len(shown) <= most:
        raise ValueError(
            f"user {user['user_id']!r} has {len(shown)} items in the prompt, of which {most} cannot be removed so that "
            "one is left. Take users of longer histories, or smaller `counts`."
        )
    if len(user["candidate_ids"]) < 3:
        raise ValueError(
            f"user {user['user_id']!r} has {len(user['candidate_ids'])} candidates. At least 3 are needed: the item, "
            "the runner-up, and what is held out."
        )
    return shown


def _draw_sets(size: int, n: int, draws: int, generator: np.random.Generator) -> list[tuple[int, ...]]:
    """Different sets of n of `size` places."""
    sets: dict[tuple[int, ...], None] = {}
    while len(sets) < min(draws, math.comb(size, n)):
        sets[_as_set(generator.choice(size, n, replace=False))] = None
    return list(sets)


def _as_set(places: np.ndarray) -> tuple[int, ...]:
    return tuple(sorted(places.tolist()))


def _measure_user(
    recommender: Any,
    history: list,
    candidates: list,
    random: Mapping[int, list[tuple[int, ...]]],
    methods: Sequence[str],
    seed: int,
) -> list[dict]:
    """The rows of one user. `random` has, for each n, the sets of places to remove."""
    from trl_dmpo.ranking.explain import explain

    explanations = {
        method: explain(recommender, history, candidates=candidates, method=method, seed=seed, budget=0)
        for method in methods
    }
    sets = {
        (method, n, kind): of_kind
        for method, explanation in explanations.items()
        for n in random
        for kind, of_kind in (_chosen_sets(explanation.attributions, n) | {"random": random[n]}).items()
    }
    removed = list(dict.fromkeys([(), *(each for of_kind in sets.values() for each in of_kind)]))
    ids, scores = _rank_without(recommender, history, candidates, removed)
    records = []
    for method, explanation in explanations.items():
        item, runner_up = ids.index(explanation.item_id), ids.index(explanation.runner_up_id)
        effects = _effects(scores, item, runner_up)
        noise = abs(float(scores[0, item] - scores[0, runner_up]) - explanation.log_odds)
        speaking = explanation.attributions > 0
        for n in random:
            recent = np.arange(len(history)) >= len(history) - n
            for kind in KINDS:
                of_kind = sets[method, n, kind]
                numbers = [removed.index(each) for each in of_kind]
                shares = {"speaking": speaking, "recent": recent}
                records.append(
                    {
                        "method": method,
                        "n": n,
                        "kind": kind,
                        **{name: float(values[numbers].mean()) for name, values in effects.items()},
                        **{f"{name}_share": float(has[np.array(of_kind)].mean()) for name, has in shares.items()},
                        "noise": noise,
                    }
                )
    return records


def _chosen_sets(attributions: np.ndarray, n: int) -> dict[str, list[tuple[int, ...]]]:
    """The places of the n items that each kind removes, as a single set. Of equal attributions the older is first."""
    order = np.argsort(-attributions, kind="stable")
    latest = np.arange(len(order))[-n:]
    return {"named": [_as_set(order[:n])], "recent": [_as_set(latest)], "against": [_as_set(order[-n:])]}


def _rank_without(
    recommender: Any, history: list, candidates: list, removed: Sequence[tuple[int, ...]]
) -> tuple[list, np.ndarray]:
    """Ids of the C candidates, best first without the first set of places, and scores (S, C) without each set."""
    histories = [[item for place, item in enumerate(history) if place not in each] for each in removed]
    ranked = recommender.rank(histories, candidates)
    ids = ranked[0].ids
    by_id = [dict(zip(each.ids, each.scores, strict=True)) for each in ranked]
    return ids, np.array([[scores[item] for item in ids] for scores in by_id])


def _effects(scores: np.ndarray, item: int, runner_up: int) -> dict[str, np.ndarray]:
    """From scores (S, C), of which row 0 is the whole history's, to each of `EFFECTS`, of shape (S,)."""
    from trl_dmpo.ranking.metrics import expected_ranks

    ranks = np.stack([expected_ranks(row) for row in scores])
    own = scores[:, item]
    log_odds = own - scores[:, runner_up]
    held_out = own - np.delete(scores, [item, runner_up], axis=1).mean(1)
    # One place less for who is behind the runner-up, half of it for a tie
    held_out_ranks = ranks[:, item] - (1 - np.sign(log_odds)) / 2
    first = own >= scores.max(1)
    return {
        # Noise may have made it the first one of `explain`, and then there is no first place to lose
        "changed": np.where(first[0], ~first, np.nan),
        "rank_change": ranks[:, item] - ranks[0, item],
        "held_out_rank_change": held_out_ranks - held_out_ranks[0],
        "log_odds_change": log_odds - log_odds[0],
        "held_out_log_odds_change": held_out - held_out[0],
        "log_prob_change": own - own[0],
        "moved": np.abs(ranks - ranks[0]).mean(1),
    }


def summarise_faithfulness(table: pl.DataFrame) -> list[dict]:
    """
    Means and 95% intervals over users of each method, n and kind, and how much more the named items do than others.

    Args:
        table (`pl.DataFrame`):
            What [`measure_faithfulness`] returned, or several of these one below the other.

    Returns:
        `list[dict]`: for each method, n and kind each of `EFFECTS` as `value`, `low`, `high` and `n` (users), and
        each of `SHARES` (with `_share`) and `noise` as a mean; `unstable_share` of the rows have no `changed`. The
        kind `named` has `less_random` and `less_recent`, too: for each effect the paired difference, with `p` and
        `p_holm`, which is adjusted over all tests returned. Both are `None` where the difference is true by
        definition. Plain values only.

    Raises:
        `ValueError`: a kind is of other users than the named items.
    """
    from trl_dmpo.ranking.intervals import bootstrap_means, holm

    results, tests = [], []
    for method, n in table.select("method", "n").unique(maintain_order=True).iter_rows():
        parts = {kind: table.filter(method=method, n=n, kind=kind) for kind in KINDS}
        for kind, part in parts.items():
            if not part["user_id"].equals(parts["named"]["user_id"]):
                raise ValueError(
                    f"the rows of {kind!r} and 'named' ({method}, n = {n}) are not of the same users in the same "
                    "order. Give tables as `measure_faithfulness` returns them."
                )
        for kind, part in parts.items():
            means = bootstrap_means({name: part[name].to_numpy() for name in EFFECTS}, part["user_id"].to_numpy())
            result = {"method": method, "n": n, "kind": kind}
            result |= {name: estimate._asdict() for name, estimate in means.items()}
            result |= {f"{name}_share": float(part[f"{name}_share"].mean()) for name in SHARES}
            result |= {"noise": float(part["noise"].mean()), "unstable_share": float(part["changed"].is_nan().mean())}
            if kind == "named":
                result |= {f"less_{baseline}": _compare(part, parts[baseline]) for baseline in BASELINES}
                tests += [test for baseline in BASELINES for test in result[f"less_{baseline}"].values()]
            results.append(result)
    tested = [test for test in tests if test["p"] is not None]
    for test, p_value in zip(tested, holm([test["p"] for test in tested]).tolist(), strict=True):
        test["p_holm"] = p_value
    return results


def _compare(named: pl.DataFrame, baseline: pl.DataFrame) -> dict[str, dict]:
    """The paired difference of each effect, row by row, with its p-value."""
    from trl_dmpo.ranking.intervals import paired_tests

    method, n = named["method"][0], named["n"][0]
    ours, theirs = ({name: part[name].to_numpy() for name in EFFECTS} for part in (named, baseline))
    found = paired_tests(ours, theirs, named["user_id"].to_numpy())
    return {
        name: test.difference._asdict()
        | {"p": None if is_by_definition(method, n, name) else test.p_value, "p_holm": None}
        for name, test in found.items()
    }


def is_by_definition(method: str, n: int, effect: str) -> bool:
    """Whether the named items cannot but have the largest effect."""
    return method == "ablation" and n == 1 and effect == "log_odds_change"


def faithfulness_table(results: Sequence[Mapping[str, Any]]) -> str:
    """In Markdown, for each method: the effects, and how much more the named items do; and what the figures mean."""
    parts = []
    for method in dict.fromkeys(result["method"] for result in results):
        of_method = [result for result in results if result["method"] == method]
        parts += [_effects_table(method, of_method), _differences_table(method, of_method)]
    return "\n\n".join([*parts, f"{LEGEND} {_describe_noise(results)}"])


def _describe_noise(results: Sequence[Mapping[str, Any]]) -> str:
    largest = max(result["noise"] for result in results)
    unstable = max(result["unstable_share"] for result in results)
    return (
        f"Scored twice, the log-odds against the runner-up differ by {largest:.3f} nats on average, by rounding; "
        f"the {100 * unstable:.1f}% of users for whom another item was first the second time do not count in "
        f"'{EFFECTS['changed']}'."
    )


def _effects_table(method: str, results: Sequence[Mapping[str, Any]]) -> str:
    header = [f"{method}, {results[0]['moved']['n']} users: n", "removed", *EFFECTS.values(), *SHARES.values()]
    lines = [
        [str(result["n"]), result["kind"]]
        + [_cell(result[name], signed=name.endswith("_change")) for name in EFFECTS]
        + [f"{100 * result[f'{name}_share']:.0f}%" for name in SHARES]
        for result in results
    ]
    return _markdown(header, lines)


def _differences_table(method: str, results: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for result in results:
        if result["kind"] == "named":
            for baseline in BASELINES:
                tests = result[f"less_{baseline}"]
                cells = [f"{_cell(test, signed=True)}, {_p_value(test['p_holm'])}" for test in tests.values()]
                lines.append([str(result["n"]), f"named less {baseline}", *cells])
    return _markdown([f"{method}: n", "difference", *EFFECTS.values()], lines)


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["--:", "---", *["--:"] * (len(header) - 2)], *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(estimate: Mapping[str, Any], signed: bool) -> str:
    form = "{value:+.2f} ({low:+.2f} to {high:+.2f})" if signed else "{value:.2f} ({low:.2f} to {high:.2f})"
    return form.format(**estimate)


def _p_value(value: float | None) -> str:
    if value is None:
        return "*"
    return f"p = {value:.3f}" if value >= 0.001 else "p < 0.001"


def plot_faithfulness(results: Sequence[Mapping[str, Any]], file: str | Path) -> None:
    """First places and ranks lost, with and without the runner-up, against n; bars are 95% intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {
        "changed": "Share of users with another item first",
        "rank_change": "Ranks lost by the explained item",
        "held_out_rank_change": "Ranks lost, runner-up not counted",
    }
    methods = list(dict.fromkeys(result["method"] for result in results))
    figure, panels = pyplot.subplots(
        len(methods), len(titles), figsize=(13, 4.2 * len(methods)), layout="constrained", squeeze=False
    )
    for row, method in zip(panels, methods, strict=True):
        for panel, (name, title) in zip(row, titles.items(), strict=True):
            for place, kind in enumerate(KINDS):
                of_kind = [result for result in results if (result["method"], result["kind"]) == (method, kind)]
                of_kind.sort(key=lambda result: result["n"])
                # Beside one another, so that bars do not hide each other
                ns = np.array([result["n"] for result in of_kind]) + 0.05 * (place - (len(KINDS) - 1) / 2)
                value, low, high = (
                    np.array([result[name][end] for result in of_kind]) for end in ("value", "low", "high")
                )
                spread = np.maximum([value - low, high - value], 0)  # rounding may put it below
                panel.errorbar(
                    ns, value, spread, color=COLOURS[place], marker="osD^"[place], capsize=3, label=KINDS[kind]
                )
            ticks = sorted({result["n"] for result in results if result["method"] == method})
            suffix = f" ({method})" if len(methods) > 1 else ""
            panel.set(title=f"{title}{suffix}", xlabel="Items removed from the history", xticks=ticks)
            panel.grid(alpha=0.3)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(KINDS))
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def write_cases(
    recommender: Any,
    users: Sequence[Mapping[str, Any]],
    folder: str | Path,
    count: int = 10,
    counts: Sequence[int] = (1, 2, 3),
    method: str = "ablation",
    budget: int = 100,
    seed: int = 0,
) -> Path:
    """
    Write `cases.html`: for some users, the explanation, and how the candidates rank without the named items.

    Args:
        recommender, users, method:
            As of [`measure_faithfulness`].
        folder (`str` or `Path`):
            Where to write. It is made if it is not there.
        count (`int`, *optional*, defaults to `10`):
            Number of users, drawn at random; all, if they are fewer.
        counts (`Sequence[int]`, *optional*, defaults to `(1, 2, 3)`):
            Numbers of named items to remove.
        budget (`int`, *optional*, defaults to `100`):
            Sets to try in search of each counterfactual, a prompt each. 0 for no search.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw, and of sampled Shapley values.

    Returns:
        `Path`: the file.
    """
    from rich.console import Console
    from rich.rule import Rule
    from rich.text import Text

    _check_options(counts, [method], 1)
    histories = [_history(recommender, user, max(counts)) for user in users]
    drawn = np.sort(np.random.default_rng(seed).permutation(len(users))[:count]).tolist()
    console = Console(record=True, width=100, file=io.StringIO(), highlight=False)
    console.print(
        f"{len(drawn)} of {len(users)} users, drawn at random (seed {seed}), not picked. Ranks are scored apart from "
        "the explanation: in half precision, items that are nearly equal may change places.",
        style="italic",
    )
    for place in drawn:
        console.print(
            Text(), Rule(Text(f"User {users[place]['user_id']}", style="bold"), align="left", style="grey50"), Text()
        )
        candidates = list(users[place]["candidate_ids"])
        console.print(*_case(recommender, histories[place], candidates, counts, method, seed, budget), sep="\n")
    file = Path(folder) / "cases.html"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(console.export_html(code_format=PAGE, inline_styles=True), encoding="utf-8")
    return file


def _case(
    recommender: Any, history: list, candidates: list, counts: Sequence[int], method: str, seed: int, budget: int
) -> tuple[Any, ...]:
    """An explanation, and a table of the candidates' ranks with and without the named items, for `rich`."""
    from rich.table import Table
    from rich.text import Text

    from trl_dmpo.ranking.explain import explain
    from trl_dmpo.ranking.metrics import expected_ranks

    explanation = explain(recommender, history, candidates=candidates, method=method, seed=seed, budget=budget)
    sets = [_chosen_sets(explanation.attributions, n)["named"][0] for n in counts]
    ids, scores = _rank_without(recommender, history, candidates, [(), *sets])
    ranks = np.stack([expected_ranks(row) for row in scores], axis=1)
    titles = dict(recommender.catalogue.select("item_id", "title").iter_rows())
    table = Table("Candidate", box=None, pad_edge=False)
    for n in (0, *counts):
        table.add_column(f"without {n}" if n else "whole history", justify="right")
    for item, of_item in zip(ids, ranks, strict=True):
        style = {explanation.item_id: "bold green", explanation.runner_up_id: "bold red"}.get(item, "")
        table.add_row(Text(titles[item]), *(f"{rank:g}" for rank in of_item), style=style)
    legend = Text(f"\nRanks with the whole history, and without the first {', '.join(map(str, counts))} of: ")
    order = np.argsort(-explanation.attributions, kind="stable")[: max(counts)]
    legend.append("; ".join(explanation.history[place] for place in order), style="italic")
    return explanation, legend, table
