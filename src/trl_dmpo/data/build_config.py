from dataclasses import dataclass, field
from typing import Any

from .negatives import NEGATIVES, Mixture
from .prompts import PROMPTS
from .spec import parse_choice, parse_mixture
from .splits import SPLITS


@dataclass
class BuildConfig:
    """
    What to build from an interaction log.

    `split`, `negatives` and `prompt` are objects, or text that names one: `"popularity"`, `"popularity(power=0.75)"`,
    and for negatives also `"0.5 * disliked + 0.5 * uniform"`.

    Parameters:
        split (`str` or split, *optional*, defaults to `"leave_one_out"`):
            Which interactions are to be predicted where: one of `SPLITS`.
        negatives (`str` or sampler, *optional*, defaults to `"popularity"`):
            Where rejected items come from: one of `NEGATIVES`, or a mixture of them.
        prompt (`str` or form, *optional*, defaults to `"next_item"`):
            What is asked: one of `PROMPTS`. In the words of the log's domain unless it names its own.
        num_negatives (`int`, *optional*, defaults to `15`):
            Rejected items of a row. More than are used in a step is a pool, of which the trainer draws its `num_negatives`.
        fewer_negatives (`bool`, *optional*, defaults to `True`):
            Whether a row may have fewer where no more are eligible. They are counted. If not, it is an error.
        ranking_negatives (`int`, *optional*, defaults to `99`):
            Candidates beside the chosen item in the configuration `ranking`, drawn from items that the user never met, all
            alike. Where a prompt lists its candidates, or takes no negatives, its own answers are the candidates.
        positive (`float`, *optional*, defaults to `3.0`):
            An item was liked if it was rated higher; `-inf` makes all that was rated liked. Without ratings, everything was.
        k_core (`int`, *optional*):
            Leave out users and items of fewer interactions, until there are none.
        min_history (`int`, *optional*, defaults to `1`):
            Leave out rows with a shorter history.
        max_history (`int`, *optional*, defaults to `20`):
            Items in a prompt at most, the latest.
        history_step (`int`, *optional*, defaults to `1`):
            How many items a full history of a training row lets go at once, the oldest. The next training rows of the user then
            start with the same item, so that they can share it in training (`trunk_column`): with 10, histories of 11 to 20
            items under the default `max_history`. Histories of validation and test are as long as they can be.
        train_targets (`int`, *optional*, defaults to `1`):
            Training rows per user at most, the latest. -1 for all.
        few_shot (`int`, *optional*):
            Train on this many users only. Those of a smaller number are among those of a larger one.
        max_prompt_tokens (`int`, *optional*):
            Leave out the oldest items of a history until the prompt has no more tokens. Needs a tokenizer.
        seed (`int`, *optional*, defaults to `0`):
            Seed of all that is drawn.

    Raises:
        `ValueError`: an option is out of its range; the message says what to write instead.
    """

    split: str = field(
        default="leave_one_out",
        metadata={
            "help": "Which interactions are to be predicted where: 'leave_one_out', 'leave_last_n(n=2)', "
            "'time(validation=0.8, test=0.9)', 'user(validation=0.1, test=0.1)'."
        },
    )
    negatives: str = field(
        default="popularity",
        metadata={
            "help": "Where rejected items come from: 'uniform', 'popularity(power=0.75)', 'disliked', 'shown', "
            "'shared_feature(feature=\"genres\")', 'nearest(source=\"scores.parquet\", top=50)', or a mixture: "
            "'0.5 * disliked + 0.5 * popularity'."
        },
    )
    prompt: str = field(
        default="next_item",
        metadata={
            "help": "What is asked: 'next_item', 'next_item_from_list', 'rank_two', 'rank_list', 'like', 'rating', or "
            "'template(prompt=\"...\")'. With options, such as 'next_item(chat=True, features=[\"genres\"])'."
        },
    )
    num_negatives: int = field(default=15, metadata={"help": "Rejected items of a row."})
    fewer_negatives: bool = field(
        default=True,
        metadata={
            "help": "Whether a row may have fewer rejected items where no more are eligible, or it is an error."
        },
    )
    ranking_negatives: int = field(
        default=99, metadata={"help": "Candidates beside the chosen item in the configuration `ranking`."}
    )
    positive: float = field(
        default=3.0,
        metadata={
            "help": "An item was liked if it was rated higher. All are with `--positive=-inf`, or without ratings."
        },
    )
    k_core: int | None = field(
        default=None,
        metadata={"help": "Leave out users and items of fewer interactions, until there are none."},
    )
    min_history: int = field(default=1, metadata={"help": "Leave out rows with a shorter history."})
    max_history: int = field(default=20, metadata={"help": "Items in a prompt at most, the latest."})
    history_step: int = field(
        default=1,
        metadata={
            "help": "How many items a full history of a training row lets go at once: more for rows to share a beginning."
        },
    )
    train_targets: int = field(default=1, metadata={"help": "Training rows per user at most, the latest. -1 for all."})
    few_shot: int | None = field(default=None, metadata={"help": "Train on this many users only."})
    max_prompt_tokens: int | None = field(
        default=None,
        metadata={"help": "Leave out the oldest items of a history until the prompt has no more tokens."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of all that is drawn."})

    def __post_init__(self):
        least = {
            "num_negatives": 1,
            "ranking_negatives": 1,
            "k_core": 1,
            "min_history": 0,
            "max_history": 1,
            "history_step": 1,
        }
        least |= {"train_targets": -1, "few_shot": 1, "max_prompt_tokens": 1, "seed": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"`{name}` is {value}, but it is at least {low}.")
        if self.train_targets == 0:
            raise ValueError("`train_targets` is 0, but it is at least 1, or -1 for all.")
        if self.min_history > self.max_history:
            raise ValueError(f"`min_history` ({self.min_history}) is more than `max_history` ({self.max_history}).")
        shortest = self.max_history - self.history_step + 1
        if shortest < max(self.min_history, 1):
            raise ValueError(
                f"`history_step` ({self.history_step}) leaves {max(shortest, 0)} of {self.max_history} items in a history, but "
                f"`min_history` is {self.min_history}, and one is the least. Lower `history_step`, or raise `max_history`."
            )
        self.make_split(), self.make_sampler(), self.make_form("item")

    def make_split(self) -> Any:
        """The split that `split` names."""
        return parse_choice(self.split, SPLITS, "split")

    def make_sampler(self) -> Any:
        """The sampler that `negatives` names."""
        sampler = parse_mixture(self.negatives, NEGATIVES, "negatives")
        return Mixture(tuple(sampler)) if isinstance(sampler, list) else sampler

    def make_form(self, domain: str) -> Any:
        """The form that `prompt` names, in the words of `domain` unless it has its own."""
        if not isinstance(self.prompt, str):
            return self.prompt
        return parse_choice(self.prompt, PROMPTS, "prompt", {"domain": domain})
