"""A made-up world to learn from: a catalogue, users with tastes, and what they picked among what they were shown."""

from dataclasses import dataclass

import numpy as np


GENRES = {
    "space": (
        ["Distant", "Silent", "Orbital", "Frozen", "Last", "Burning", "Lost"],
        ["Nebula", "Starship", "Colony", "Asteroid", "Signal", "Horizon", "Moon"],
    ),
    "crime": (
        ["Dirty", "Cold", "Midnight", "Crooked", "Blind", "Second", "Paper"],
        ["Alibi", "Detective", "Heist", "Verdict", "Informant", "Ransom", "Witness"],
    ),
    "romance": (
        ["Parisian", "Summer", "Secret", "Gentle", "Unsent", "Golden", "Foolish"],
        ["Hearts", "Wedding", "Letters", "Kisses", "Promise", "Waltz", "Bouquet"],
    ),
    "horror": (
        ["Crawling", "Hollow", "Bloody", "Whispering", "Cursed", "Rotting", "Buried"],
        ["Cellar", "Graveyard", "Doll", "Scream", "Asylum", "Shadows", "Teeth"],
    ),
    "western": (
        ["Dusty", "Lonesome", "Rusty", "Outlaw", "Crimson", "Broken", "Wild"],
        ["Saddle", "Canyon", "Sheriff", "Revolver", "Prairie", "Stagecoach", "Gulch"],
    ),
    "fantasy": (
        ["Enchanted", "Elder", "Silver", "Forgotten", "Dragon's", "Shattered", "Moonlit"],
        ["Throne", "Wizard", "Sword", "Kingdom", "Prophecy", "Griffin", "Tower"],
    ),
    "war": (
        ["Iron", "Fallen", "Distant", "Final", "Muddy", "Brave", "Winter"],
        ["Regiment", "Trenches", "Convoy", "Battalion", "Armistice", "Siege", "Squadron"],
    ),
    "comedy": (
        ["Clumsy", "Accidental", "Awkward", "Reluctant", "Lucky", "Noisy", "Absurd"],
        ["Roommates", "Vacation", "Uncle", "Butler", "Reunion", "Neighbours", "Interns"],
    ),
    "sports": (
        ["Underdog", "Extra", "Champion", "Rookie", "Undefeated", "Barefoot", "Comeback"],
        ["Season", "Coach", "Marathon", "Goalkeeper", "Sprint", "Ringside", "Trophy"],
    ),
    "nature": (
        ["Hidden", "Emerald", "Wandering", "Ancient", "Northern", "Deep", "Untamed"],
        ["Glacier", "Rainforest", "Whales", "Savanna", "Reef", "Wolves", "Tundra"],
    ),
}
MAX_ITEMS = sum(len(adjectives) * len(nouns) for adjectives, nouns in GENRES.values())

SLATE_SIZE = 50  # titles shown each time, of which a user picks one
HISTORY_LENGTH = (4, 8)  # fewest and most titles of a history
CHOICES_PER_USER = 2  # the latest, for DMPO; SFT has them all, in the prompts


@dataclass(frozen=True)
class Catalogue:
    """
    Titles and what makes users pick them.

    Args:
        titles (`list[str]`):
            One title an item, all different.
        genres (`np.ndarray`):
            Genre of each item, int of shape (items,).
        appeal (`np.ndarray`):
            How much every user likes an item, of shape (items,).
        exposure (`np.ndarray`):
            How often an item is shown, of shape (items,), adding up to 1. It has nothing to do with appeal.
        sequels (`np.ndarray`):
            For each item, the items that users like to pick after it, int of shape (items, 3).
    """

    titles: list[str]
    genres: np.ndarray
    appeal: np.ndarray
    exposure: np.ndarray
    sequels: np.ndarray


@dataclass(frozen=True)
class Choice:
    """
    One pick of one user.

    Args:
        history (`list[int]`):
            Items the user has picked before, oldest first.
        chosen (`int`):
            The item picked.
        passed_over (`list[int]`):
            The items that were shown with it.
    """

    history: list[int]
    chosen: int
    passed_over: list[int]


def make_catalogue(items: int, rng: np.random.Generator) -> Catalogue:
    """A catalogue of `items` titles, spread evenly over the genres."""
    pools = [
        rng.permutation([f"{adjective} {noun}" for adjective in adjectives for noun in nouns])
        for adjectives, nouns in GENRES.values()
    ]
    genres = np.arange(items) % len(pools)
    titles = [str(pools[genre][index // len(pools)]) for index, genre in enumerate(genres)]
    exposure = 1 / (1 + rng.permutation(items))
    same_genre = genres[:, None] == genres[None]
    sequels = np.array([rng.choice(np.flatnonzero(row), 3) for row in same_genre])
    return Catalogue(titles, genres, rng.normal(size=items), exposure / exposure.sum(), sequels)


def simulate_user(catalogue: Catalogue, rng: np.random.Generator) -> list[Choice]:
    """The picks of a user with a taste of their own, one after another."""
    taste = np.log(rng.dirichlet(np.full(len(GENRES), 0.15)) + 1e-3)
    history: list[int] = []
    choices = []
    for _ in range(rng.integers(*HISTORY_LENGTH, endpoint=True) + 1):
        shown = _draw_slate(catalogue, history, rng)
        utility = taste[catalogue.genres[shown]] + catalogue.appeal[shown] + rng.gumbel(size=len(shown))
        if history:
            utility += 3.5 * np.isin(shown, catalogue.sequels[history[-1]])
        chosen = int(shown[utility.argmax()])
        choices.append(Choice(list(history), chosen, [int(item) for item in shown if item != chosen]))
        history.append(chosen)
    return choices


def _draw_slate(catalogue: Catalogue, history: list[int], rng: np.random.Generator) -> np.ndarray:
    """Items not in the history; the more popular, the likelier."""
    weights = catalogue.exposure.copy()
    weights[history] = 0
    return rng.choice(len(weights), SLATE_SIZE, replace=False, p=weights / weights.sum())


def to_row(catalogue: Catalogue, choice: Choice, negatives: int, rng: np.random.Generator) -> dict:
    """`choice` as a row of `prompt`, `chosen` and `rejected`, the latter drawn from what was passed over."""
    rejected = rng.choice(choice.passed_over, negatives, replace=False)
    seen = "; ".join(catalogue.titles[item] for item in choice.history)
    return {
        "prompt": f"Watched: {seen}. Next:",
        "chosen": f" {catalogue.titles[choice.chosen]}",
        "rejected": [f" {catalogue.titles[item]}" for item in rejected],
    }


@dataclass(frozen=True)
class Rows:
    """
    Rows of `prompt`, `chosen` and `rejected`.

    Args:
        sft (`list[dict]`):
            The last choice of each user to train on; its prompt has all the choices before.
        dmpo (`list[dict]`):
            Choices of the same users, with some of what was passed over.
        held_out (`list[dict]`):
            The last choice of each other user, with all that was passed over.
    """

    sft: list[dict]
    dmpo: list[dict]
    held_out: list[dict]


def make_rows(users: int, held_out_users: int, items: int, negatives: int, seed: int) -> Rows:
    """A world, and the rows that a recommender there would be trained and tested on."""
    rng = np.random.default_rng(seed)
    catalogue = make_catalogue(items, rng)
    seen = [simulate_user(catalogue, rng) for _ in range(users)]
    unseen = [simulate_user(catalogue, rng) for _ in range(held_out_users)]
    return Rows(
        sft=[to_row(catalogue, choices[-1], negatives, rng) for choices in seen],
        dmpo=[to_row(catalogue, choice, negatives, rng) for choices in seen for choice in choices[-CHOICES_PER_USER:]],
        held_out=[to_row(catalogue, choices[-1], SLATE_SIZE - 1, rng) for choices in unseen],
    )
