"""Items for a user, best first: from a few candidates or from a whole catalogue."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import polars as pl

from ..data.prompts import PROMPTS, Form
from ..data.spec import parse_choice
from .asking import ask
from .beam import beam_search
from .catalogue import Catalogue, make_catalogue
from .generation import check_lengths, tokenize_prompt
from .models import load_model
from .recommender_files import load_options, read_prepared, save_recommender
from .scorer import Scorer
from .token_budget import TokenBudget
from .tokens import Completions


# Places of items in the catalogue
Places: TypeAlias = Sequence[int] | np.ndarray
# For so many users at a time a beam search holds what they may get
_USERS_AT_A_TIME = 16
# What errors call the prompt of a user
HISTORY_NAMES = "histories[{}]".format


class Recommendations(NamedTuple):
    """
    Items for one user, best first.

    Args:
        ids (`list`):
            Their ids in the catalogue.
        titles (`list[str]`):
            Their titles.
        scores (`list[float]`):
            The log-probability of each one's answer in nats, a sum or a mean over its tokens as of `normalize`.
    """

    ids: list
    titles: list[str]
    scores: list[float]


class Recommender:
    r"""
    Ranks items for users: every item is scored by the exact log-probability of the answer that names it.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        catalogue (`pl.DataFrame`, [`~datasets.Dataset`] or `list[str]`):
            The items: `item_id`, `title` and any features; or titles, which are then the ids.
        prompt (`str` or [`~trl_dmpo.data.prompts.Form`], *optional*, defaults to `"next_item"`):
            The form that the model was trained with, such as `"next_item(domain='film')"`. Its answers must name one item.
            One that lists its candidates can [`~Recommender.rank`], and not [`~Recommender.recommend`].
        normalize (`str`, *optional*, defaults to `"sum"`):
            `"sum"` or `"mean"` over the tokens of an answer.
        max_history (`int`, *optional*):
            Items of a history in a prompt at most, the latest. Will default to all.

    Raises:
        `ValueError`: the catalogue lacks a column or has fewer than two items, an id or a title is missing or an id
        repeated, there is no such form, or answers of this form do not name an item.

    An item of a history, of candidates or of items to exclude is given by its id or by its title. A text is an id if there
    is one of this name, and a title if not.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        catalogue: Any,
        prompt: str | Form = "next_item",
        normalize: str = "sum",
        max_history: int | None = None,
    ):
        self._items: Catalogue = make_catalogue(catalogue)
        self.form: Form = parse_choice(prompt, PROMPTS, "prompt")
        if self.form.answer(self._items.items[0]) is None:
            raise ValueError(
                f"`prompt`: an answer of the form {type(self.form).__name__} names no single item. Use 'next_item', "
                "'next_item_from_list' or 'template(...)'."
            )
        if normalize not in ("sum", "mean"):
            raise ValueError(f"`normalize` is {normalize!r}, but it is 'sum' or 'mean'.")
        if max_history is not None and max_history < 1:
            raise ValueError(f"`max_history` is {max_history}, but it is at least 1.")
        self.scorer = Scorer(model, tokenizer)
        self.normalize = normalize
        self.max_history = max_history
        self.answers: list = [self.form.answer(item) for item in self._items.items]
        # Items of one title have one answer, which is scored once
        title_numbers = {title: number for number, title in enumerate(dict.fromkeys(self._items.titles))}
        self._answer_of = np.array([title_numbers[title] for title in self._items.titles])
        self._distinct: list = [self.answers[place] for place in np.unique(self._answer_of, return_index=True)[1]]

    @property
    def catalogue(self) -> pl.DataFrame:
        """The items, in the order given."""
        return self._items.frame

    def prompts(self, histories: Sequence[Any], candidates: Sequence[Any] | None = None) -> list:
        """
        What the model is asked about each user.

        Args:
            histories (`list[list]`):
                N lists of items, oldest first, of which the latest `max_history` are used. A title that the catalogue lacks
                is used as it is, with one warning.
            candidates (`list` or `list[list]`, *optional*):
                For a form that lists them: one list for all users, or one each. They are listed in this order.

        Returns:
            `list`: N prompts, texts or message lists.

        Raises:
            `ValueError`: an id is not in the catalogue, or candidates are needed.
        """
        if self.form.listed and candidates is None:
            raise ValueError(
                f"the form {type(self.form).__name__} lists candidates in its prompt: give `candidates`, or use a form that "
                "does not, such as 'next_item'."
            )
        lists = [[0]] * len(histories) if candidates is None else self._candidate_places(candidates, len(histories))
        return self._write(self._read(histories), lists if self.form.listed else [[0]] * len(histories))

    def rank(self, histories: Sequence[Any], candidates: Sequence[Any]) -> Any:
        """
        The candidates of each user, best first.

        Args:
            histories (`list[list]` or `list`):
                N lists of items, oldest first; or one.
            candidates (`list` or `list[list]`):
                Items of the catalogue: one list for all users, or one each. A form that lists them does so in this order.

        Returns:
            `list[Recommendations]`, or [`Recommendations`] for one history. Candidates of equal scores are in the order given.

        Raises:
            `ValueError`: an item is not in the catalogue, or given twice for a user, or a user has no candidates.

        Example:

        ```python
        >>> recommender.rank([["Alien", "Heat"]], ["Aliens", "Big"])  # doctest: +SKIP
        [Recommendations(ids=['Aliens', 'Big'], titles=['Aliens', 'Big'], scores=[-3.1, -7.4])]
        ```
        """
        if _is_flat(histories, "histories"):
            return self.rank([histories], candidates)[0]
        lists = self._candidate_places(candidates, len(histories))
        prompts = self._write(self._read(histories), lists)
        scores = self._score(prompts, lists)
        return [self._best(places, each, len(places)) for places, each in zip(lists, scores, strict=True)]

    def recommend(
        self,
        histories: Sequence[Any],
        k: int = 10,
        exclude: Any = "history",
        method: str = "exact",
        num_beams: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Any:
        """
        The best items of the catalogue for each user.

        Args:
            histories (`list[list]` or `list`):
                N lists of items, oldest first; or one. A user without a history is an empty list among others: `[[]]`.
            k (`int`, *optional*, defaults to `10`):
                How many. A user gets fewer where fewer are left.
            exclude (`str`, `list` or `list[list]`, *optional*, defaults to `"history"`):
                Items not to recommend: `"history"`, all of the user's own, also those before `max_history`; `None`; or items,
                one list for all users or one each. A title excludes all items of this title, an id the one item.
            method (`str`, *optional*, defaults to `"exact"`):
                `"exact"` scores all items. `"beam"` searches for good ones and scores those exactly; it can miss some.
            num_beams (`int`, *optional*):
                For `"beam"`: how many beginnings of answers are followed at a time. Will default to 2 `k`, at least 20.
            progress (`Callable[[int], None]`, *optional*):
                Called with the number of users done since the last call.

        Returns:
            `list[Recommendations]`, or [`Recommendations`] for one history. Items of equal scores are in the catalogue's order.

        Raises:
            `ValueError`: an id, or an item to exclude, is not in the catalogue, the form lists its candidates, or an option is
            out of its range.

        Example:

        ```python
        >>> recommender.recommend(["Alien", "Heat"], k=2)  # doctest: +SKIP
        Recommendations(ids=['Aliens', 'Red Heat'], titles=['Aliens', 'Red Heat'], scores=[-3.1, -4.6])
        ```
        """
        if _is_flat(histories, "histories"):
            return self.recommend([histories], k, exclude, method, num_beams, progress)[0]
        self._check_options(k, method, num_beams)
        prompts = self._write(self._read(histories), [[0]] * len(histories))
        excluded = self._excluded(histories, exclude)
        progress = progress or (lambda users: None)
        if method == "exact":
            return self._exact(prompts, excluded, k, progress)
        return self._beam(prompts, excluded, k, num_beams or max(2 * k, 20), progress)

    def save_pretrained(self, folder: str | Path) -> None:
        """
        Save all that a recommender is: model (or PEFT adapter, as it is), tokenizer, catalogue and options.

        Args:
            folder (`str` or `Path`):
                Where to write. A recommender that is there is replaced.

        Raises:
            `FileExistsError`: something else is there.
            `ValueError`: the form is not one of `trl_dmpo.data.prompts.PROMPTS`, or the model is an adapter of a base model
            that was not loaded from anywhere, or its active adapter is not named `"default"`.
        """
        save_recommender(self, Path(folder).expanduser())

    @classmethod
    def from_pretrained(cls, folder: str | Path, **model_kwargs: Any) -> "Recommender":
        """
        Load what [`~Recommender.save_pretrained`] has saved.

        Args:
            folder (`str` or `Path`):
                Where it was saved.
            model_kwargs:
                As of [`~trl_dmpo.ranking.models.load_model`]: `dtype`, `device` and others.

        Returns:
            [`Recommender`]

        Raises:
            `FileNotFoundError`: the folder is not there or holds no recommender.
            `ValueError`: what it holds cannot be read.
        """
        folder = Path(folder).expanduser()
        options = load_options(folder)
        return cls(*load_model(folder, option="recommender", **model_kwargs), **options)

    @classmethod
    def from_prepared(cls, model: Any, tokenizer: Any, dataset: str | Path, normalize: str = "sum") -> "Recommender":
        """
        A recommender for the catalogue of a dataset that `trl-dmpo prepare` has made, which asks as that does.

        Args:
            model, tokenizer, normalize:
                As of [`Recommender`].
            dataset (`str` or `Path`):
                The folder of the dataset.

        Returns:
            [`Recommender`]

        Raises:
            `FileNotFoundError`: the folder is not there or holds no such dataset.
            `ValueError`: it has two catalogues, its prompts cannot be written again or were shortened to `max_prompt_tokens`,
            or its answers do not name an item.
        """
        return cls(model, tokenizer, **read_prepared(Path(dataset).expanduser()), normalize=normalize)

    def _check_options(self, k: int, method: str, num_beams: int | None) -> None:
        if self.form.listed:
            raise ValueError(
                f"the form {type(self.form).__name__} lists candidates in its prompt, and cannot list a whole catalogue. "
                "Give candidates to `rank`, or use a model of a form such as 'next_item'."
            )
        if k < 1:
            raise ValueError(f"`k` is {k}, but it is at least 1.")
        if method not in ("exact", "beam"):
            raise ValueError(f"`method` is {method!r}, but it is 'exact' or 'beam'.")
        if num_beams is not None and method == "exact":
            raise ValueError("`num_beams` is for `method='beam'`. Set it, or leave this out.")
        if num_beams is not None and num_beams < max(k, 2):
            raise ValueError(f"`num_beams` is {num_beams}, but it is at least {max(k, 2)}: `k`, and more than one.")

    def _exact(self, prompts: list, excluded: list, k: int, progress: Callable) -> list[Recommendations]:
        places = np.arange(len(self._answer_of))
        results: dict[int, Recommendations] = {}
        for user, scores in self.scorer.stream(prompts, self._distinct, self.normalize, HISTORY_NAMES):
            kept = np.delete(places, excluded[user])
            results[user] = self._best(kept, scores.numpy()[self._answer_of[kept]], k)
            progress(1)
        return [results[user] for user in range(len(prompts))]

    def _beam(
        self, prompts: list, excluded: list, k: int, num_beams: int, progress: Callable
    ) -> list[Recommendations]:
        completions = Completions(self._distinct, self.scorer.tokenizer)
        self._check_lengths(prompts, completions)
        budget = TokenBudget(self.scorer.model)
        results: list[Recommendations] = []
        for start in range(0, len(prompts), _USERS_AT_A_TIME):
            users = slice(start, start + _USERS_AT_A_TIME)
            places = self._search(prompts[users], excluded[users], num_beams, completions, budget)
            scores = self._score(prompts[users], places, start)
            results += [self._best(*each, k) for each in zip(places, scores, strict=True)]
            progress(len(results) - start)
        return results

    def _check_lengths(self, prompts: list, completions: Completions) -> None:
        """What is wrong with one user is better known before hours of searching for the others."""
        ids = [tokenize_prompt(self.scorer.tokenizer, prompt) for prompt in prompts]
        longest = max(map(len, completions.behind(prompts[0]).completions)) if prompts else 0
        check_lengths(self.scorer.model, ids, longest, HISTORY_NAMES)

    def _search(
        self, prompts: list, excluded: list, num_beams: int, completions: Completions, budget: TokenBudget
    ) -> list[np.ndarray]:
        """Where the items are that a beam search finds for each user."""
        kept = [np.delete(np.arange(len(self._answer_of)), left_out) for left_out in excluded]
        # An answer is excluded where all items that it names are
        numbers = np.arange(len(self._distinct))
        without = [np.setdiff1d(numbers, self._answer_of[places]).tolist() for places in kept]
        encoded = [completions.behind(prompt) for prompt in prompts]
        found = beam_search(self.scorer.model, encoded, without, num_beams, self.normalize, budget)
        return [left[np.isin(self._answer_of[left], numbers)] for left, numbers in zip(kept, found, strict=True)]

    def _score(self, prompts: list, places: Sequence[Places], first: int = 0) -> list[np.ndarray]:
        """Scores of the items at some places for each prompt, none if there are none. `first` is the number of the first user."""
        distinct = [np.unique(self._answer_of[np.asarray(each, dtype=int)], return_inverse=True) for each in places]
        some = [user for user, each in enumerate(places) if len(each)]
        # Users of the same answers get the same list, which is then tokenized once
        lists = {numbers.tobytes(): [self._distinct[number] for number in numbers] for numbers, _ in distinct}
        answers = [lists[distinct[user][0].tobytes()] for user in some]
        asked = [prompts[user] for user in some]
        scores = self.scorer.score(
            asked, answers, self.normalize, names=lambda number: HISTORY_NAMES(first + some[number])
        )
        found = [np.empty(0, dtype=np.float32) for _ in places]
        for user, each in zip(some, scores, strict=True):
            found[user] = each.numpy()[distinct[user][1]]
        return found

    def _best(self, places: Places, scores: np.ndarray, k: int) -> Recommendations:
        """The best `k` of the items at `places`, ties in their order."""
        # All that tie with the last one go on, for the stable sort to choose from
        least = np.partition(scores, -k)[-k] if k < len(scores) else -np.inf
        among = np.flatnonzero(scores >= least)
        order = among[np.argsort(-scores[among], kind="stable")][:k]
        best = [int(places[index]) for index in order]
        return Recommendations(
            [self._items.ids[place] for place in best],
            [self._items.titles[place] for place in best],
            scores[order].tolist(),
        )

    def _read(self, histories: Iterable[Any]) -> list[list[dict]]:
        """The items of each history that a prompt names."""
        unknown: list[str] = []
        read = []
        for user, history in enumerate(histories):
            if isinstance(history, (str, int)):
                raise ValueError(f"`histories[{user}]` is {history!r}; give a list of items for each user.")
            try:
                read.append(self._items.read(history, unknown))
            except ValueError as error:
                raise ValueError(f"`histories[{user}]`: {error}") from error
        self._items.warn_of(unknown)
        return [items[-self.max_history :] if self.max_history else items for items in read]

    def _write(self, histories: list[list[dict]], candidates: list[list[int]]) -> list:
        """The prompts. Candidates are of no account unless the form lists them."""
        items = self._items.items
        return [
            ask(self.form, history, [items[place] for place in places])
            for history, places in zip(histories, candidates, strict=True)
        ]

    def _candidate_places(self, candidates: Sequence[Any], count: int) -> list[list[int]]:
        lists = [candidates] * count if _is_flat(candidates, "candidates") else candidates
        if len(lists) != count:
            raise ValueError(
                f"`candidates` has {len(lists)} lists for {count} histories; give one each, or one for all."
            )
        found = []
        for user, items in enumerate(lists):
            try:
                found.append(self._items.distinct_places(items))
            except ValueError as error:
                raise ValueError(f"`candidates`, of `histories[{user}]`: {error}") from error
        return found

    def _excluded(self, histories: Sequence[Any], exclude: Any) -> list[list[int]]:
        """For each user, where the items are that must not be recommended."""
        if exclude is None:
            return [[] for _ in histories]
        if isinstance(exclude, str):
            if exclude != "history":
                raise ValueError(f"`exclude` is {exclude!r}, but it is 'history', None, or a list of items.")
            return [[place for item in history for place in self._items.places(item)] for history in histories]
        is_one = not len(exclude) or _is_flat(exclude, "exclude")
        lists = [exclude] * len(histories) if is_one else exclude
        if len(lists) != len(histories):
            raise ValueError(
                f"`exclude` has {len(lists)} lists for {len(histories)} histories; give one each, or one for all."
            )
        return [
            self._left_out(items, "`exclude`" if is_one else f"`exclude[{user}]`") for user, items in enumerate(lists)
        ]

    def _left_out(self, items: Sequence[Any], name: str) -> list[int]:
        try:
            return [place for item in items for place in self._items.known_places(item)]
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def _is_flat(items: Sequence[Any], option: str) -> bool:
    """Whether this is one list of items, and not a list of lists."""
    if isinstance(items, str):
        raise ValueError(f"`{option}` is {items!r}; give a list of items, such as [{items!r}].")
    return len(items) > 0 and not isinstance(items[0], (list, tuple, np.ndarray, pl.Series))
