import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from trl import DPOConfig

from ..losses import (
    BATCH_LOSSES,
    DYNAMIC_BETA_LOSSES,
    F_DIVERGENCE_LOSSES,
    LOSSES,
    PAIRLESS_LOSSES,
    REFERENCE_FREE_LOSSES,
)


@dataclass
class DMPOConfig(DPOConfig):
    r"""
    Configuration class for the [`DMPOTrainer`].

    This class includes only the parameters that are specific to DMPO. For the others, such as `loss_weights` or
    `precompute_ref_log_probs`, see [`~trl.DPOConfig`] and [`~transformers.TrainingArguments`].

    Parameters:
        loss_type (`list[str]`, *optional*, defaults to `["dmpo"]`):
            Type of loss to use: `'dmpo'`, `'sdpo'`, `'infonca'`, `'nca'`, `'plackett_luce'`, `'lipo'`, `'mult_dpo'`, or one
            of TRL's, which is then the mean over the K pairs of the chosen completion and a rejected one: `'sigmoid'`, `'hinge'`, `'ipo'`, `'exo_pair'`, `'nca_pair'`,
            `'robust'`, `'bco_pair'`, `'sppo_hard'`, `'aot'`, `'aot_unpaired'`, `'apo_zero'`, `'apo_down'`,
            `'discopop'`, `'sigmoid_norm'`; `'sft'` counts the chosen completion once. Several are combined with the
            weights in `loss_weights`. In Python, a function of [`Scores`] and this configuration, defined in a module, may
            stand for a name; under another `f_divergence_type` than the default it must be one of [`margins`].
        beta (`float`, *optional*, defaults to `1.0`):
            Temperature β of the losses. TRL's default of 0.1 was the worst of 0.1, 1 and 5 for `'dmpo'` and `'sdpo'` in both
            experiments that told them apart (`docs/results.md`).
        prefix_sharing (`bool` or `str`, *optional*, defaults to `"auto"`):
            Whether to compute the tokens that the completions of a prompt have in common once. `"auto"` does so where it
            is exact, which a rule on the kind of model and a comparison on the first batch decide, and otherwise says
            why not. `True` raises an error where it is not exact. `False` runs the prompt once for every completion.
        trunk_column (`str`, *optional*):
            Column, such as `"user_id"`, of which equal values mark rows whose prompts are prefixes of one another, as the
            histories of a user are, up to a question. Such rows fall into the same batches, users in random order, and what
            their prompts have in common is computed once. If `None`, each row has its prompt to itself.
        max_trunk_length (`int`, *optional*):
            Length in tokens that a row of tokens of several prompts may have under `trunk_column`. By default
            `max_tokens_per_batch`, if that is set.
        num_negatives (`int`, *optional*):
            Number of rejected completions to draw from those of a row each time the row is trained on, without
            replacement and reproducibly under `seed`. Rows with fewer keep all. If `None`, all are used. Evaluation
            always uses all.
        negative_selection (`str`, *optional*, defaults to `"all"`):
            Which of the rejected completions of a row count in a step: `"all"`; `"hardest"`, the `num_hard_negatives` that
            the policy finds most likely; or `"boundary"`, those that the policy ranks at or above the chosen completion and,
            where there are none, the top cluster of three
            ([DynamicPO](https://huggingface.co/papers/2605.00327)). Logged metrics are over all.
        num_hard_negatives (`int`, *optional*):
            Number of rejected completions that count under `negative_selection="hardest"`.
        dynamic_beta (`bool`, *optional*, defaults to `False`):
            Whether to scale `beta` for each selected rejected completion by DynamicPO's dual margin, to between half and
            one and a half of it. Needs a `negative_selection` and losses of margins.
        dynamic_beta_margin (`float`, *optional*, defaults to `2.0`):
            Margin m of `dynamic_beta`, in nats. The code released with the paper has 6.0.
        reference_free (`bool`, *optional*, defaults to `False`):
            Whether to use log π_θ in the place of log π_θ/π_ref. No reference model is run, and none is loaded, but under
            FSDP, where TRL loads one and frees it before training.
        nca_alpha (`float`, *optional*, defaults to `1e-3`):
            Temperature α of relevance in the losses `'infonca'` and `'nca'`. The default is that of the trainer released with
            [NCA](https://huggingface.co/papers/2402.05369) and makes any difference in relevance all or nothing.
        plackett_luce_places (`int`, *optional*):
            How many places of the ranking, from the top, the loss `'plackett_luce'` takes into account. If `None`, all.
        max_tokens_per_batch (`int`, *optional*):
            Budget in tokens, padding included, of what goes through the model at once. A batch that has more is split into
            micro-batches of whole prompts, of which loss and gradients are those of the batch. What one prompt takes is not
            split. If `None`, batches are not split.
        on_invalid_row (`str`, *optional*, defaults to `"raise"`):
            What to do with a row that cannot be trained on: `"raise"` an error that names it, or `"drop"` it and log how
            many were dropped for which reason.
        ranking_k (`list[int]`, *optional*, defaults to `[1, 5, 10]`):
            Cut-offs of the logged `ranking/hit_rate@k` and `ranking/ndcg@k` of the chosen completion among all.

    Raises:
        `ValueError`: an option is out of its range; the message says what to write instead.

    Example:

    ```python
    >>> from trl_dmpo import DMPOConfig

    >>> DMPOConfig("out", loss_type="dmqo", bf16=False)
    Traceback (most recent call last):
    ...
    ValueError: Unknown `loss_type` 'dmqo'. Did you mean 'dmpo'? It is one of: aot, aot_unpaired, ...
    ```
    """

    loss_type: list[str] = field(
        default_factory=lambda: ["dmpo"],
        metadata={
            "help": "Type of loss to use: 'dmpo', 'sdpo', 'infonca', 'nca', 'plackett_luce', 'lipo', 'mult_dpo', or one of TRL's ('sigmoid', 'hinge', 'ipo', 'exo_pair', "
            "'nca_pair', 'robust', 'bco_pair', 'sppo_hard', 'aot', 'aot_unpaired', 'apo_zero', 'apo_down', 'discopop', "
            "'sigmoid_norm'), which is then the mean over the K pairs; 'sft' counts the chosen completion once. Several "
            "are combined with the weights in `loss_weights`."
        },
    )
    beta: float = field(default=1.0, metadata={"help": "Temperature of the losses. TRL's default is 0.1."})
    # The strings are for the command line, which would read `bool | str` as `bool` and refuse "auto"
    prefix_sharing: Literal["auto", "true", "false", True, False] = field(
        default="auto",
        metadata={
            "help": "Whether to compute the tokens that the completions of a prompt have in common once. 'auto' does so "
            "where it is exact, 'true' raises an error where it is not, 'false' never does."
        },
    )
    trunk_column: str | None = field(
        default=None,
        metadata={
            "help": "Column, such as 'user_id', of which equal values mark rows whose prompts are prefixes of one another: "
            "they fall into the same batches, and what their prompts have in common is computed once."
        },
    )
    max_trunk_length: int | None = field(
        default=None,
        metadata={"help": "Length in tokens that a row of tokens of several prompts may have under `trunk_column`."},
    )
    num_negatives: int | None = field(
        default=None,
        metadata={
            "help": "Number of rejected completions to draw from those of a row each time the row is trained on. By "
            "default, all are used."
        },
    )
    negative_selection: str = field(
        default="all",
        metadata={
            "help": "Which of the rejected completions of a row count in a step: 'all', the 'hardest' "
            "`num_hard_negatives`, or those at the 'boundary', which the policy ranks at or above the chosen completion.",
            "choices": ["all", "hardest", "boundary"],
        },
    )
    num_hard_negatives: int | None = field(
        default=None,
        metadata={"help": "Number of rejected completions that count under `negative_selection='hardest'`."},
    )
    dynamic_beta: bool = field(
        default=False,
        metadata={
            "help": "Whether to scale `beta` for each selected rejected completion by DynamicPO's dual margin. Needs a "
            "`negative_selection` and losses of margins."
        },
    )
    dynamic_beta_margin: float = field(
        default=2.0,
        metadata={"help": "Margin of `dynamic_beta`, in nats."},
    )
    reference_free: bool = field(
        default=False,
        metadata={
            "help": "Whether to use the policy's log-probabilities in the place of their ratios to the reference's. No "
            "reference model is run."
        },
    )
    nca_alpha: float = field(
        default=1e-3,
        metadata={"help": "Temperature of relevance in the losses 'infonca' and 'nca'."},
    )
    plackett_luce_places: int | None = field(
        default=None,
        metadata={
            "help": "How many places of the ranking, from the top, the loss 'plackett_luce' takes into account. By default, "
            "all."
        },
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Budget in tokens, padding included, of what goes through the model at once. A batch that has more is "
            "split into micro-batches with the same gradient."
        },
    )
    on_invalid_row: str = field(
        default="raise",
        metadata={
            "help": "What to do with a row that cannot be trained on: 'raise' an error or 'drop' it and log the count.",
            "choices": ["raise", "drop"],
        },
    )
    ranking_k: list[int] = field(
        default_factory=lambda: [1, 5, 10],
        metadata={"help": "Cut-offs of the logged ranking metrics."},
    )

    def __post_init__(self):
        if isinstance(self.loss_type, str) or callable(self.loss_type):
            self.loss_type = [self.loss_type]  # type: ignore[list-item]
        self._check_loss_type()
        self._check_prefix_sharing()
        self._check_trunks()
        self._check_selection()
        self._check_reference_free()
        if not self.nca_alpha > 0:
            raise ValueError(f"`nca_alpha` must be above 0, got {self.nca_alpha}.")
        places = self.plackett_luce_places
        if places is not None and (not isinstance(places, int) or places < 1):
            raise ValueError(
                f"`plackett_luce_places` must be a whole number of at least 1, got {places}. Leave it out to take the whole "
                "ranking into account."
            )
        if self.num_negatives is not None and self.num_negatives < 1:
            raise ValueError(
                f"`num_negatives` must be at least 1, got {self.num_negatives}. Leave it out to use every rejected "
                "completion of a row."
            )
        self._check_max_tokens()
        if self.on_invalid_row not in ("raise", "drop"):
            raise ValueError(f"`on_invalid_row` must be 'raise' or 'drop', got {self.on_invalid_row!r}.")
        if isinstance(self.ranking_k, int):
            self.ranking_k = [self.ranking_k]
        if not self.ranking_k or any(k < 1 for k in self.ranking_k):
            raise ValueError(f"`ranking_k` must be cut-offs of at least 1, such as [1, 5, 10]; got {self.ranking_k}.")
        super().__post_init__()
        self._check_dispatch()

    def _check_loss_type(self) -> None:
        for name in self.loss_type:
            if callable(name):
                _check_importable(name)
            elif name not in LOSSES:
                raise ValueError(_unknown_loss(name))
        named = self._named_losses()
        for option, is_set in (("ld_alpha", self.ld_alpha is not None), ("use_weighting", self.use_weighting)):
            if is_set and named & PAIRLESS_LOSSES:
                raise ValueError(
                    f"`{option}` is about the pairs of one chosen completion and each rejected one, which "
                    f"{_listed(named & PAIRLESS_LOSSES)} is no loss of. Leave it out, or use another loss."
                )
        if self.f_divergence_type != "reverse_kl" and not named <= F_DIVERGENCE_LOSSES:
            raise ValueError(
                f"`f_divergence_type={self.f_divergence_type!r}` needs losses that are functions of reward margins: "
                f"{_listed(F_DIVERGENCE_LOSSES)}. Got {_listed(named - F_DIVERGENCE_LOSSES)}; use "
                "`f_divergence_type='reverse_kl'` with it."
            )

    def _named_losses(self) -> set[str]:
        return {name for name in self.loss_type if isinstance(name, str)}

    def _check_selection(self) -> None:
        selection, count = self.negative_selection, self.num_hard_negatives
        if selection not in ("all", "hardest", "boundary"):
            raise ValueError(f"`negative_selection` must be 'all', 'hardest' or 'boundary', got {selection!r}.")
        if (selection == "hardest") != (count is not None):
            raise ValueError(
                "`negative_selection='hardest'` and `num_hard_negatives` go together: set both, such as 'hardest' and 4, or "
                f"neither; got {selection!r} and {count}."
            )
        if count is not None and (not isinstance(count, int) or count < 1):
            raise ValueError(f"`num_hard_negatives` must be a whole number of at least 1, got {count}.")
        if count is not None and self.num_negatives is not None and count > self.num_negatives:
            raise ValueError(
                f"`num_hard_negatives={count}` asks for more than the `num_negatives={self.num_negatives}` that are drawn. "
                "Raise the one or lower the other."
            )
        if selection != "all" and self.loss_type == ["sft"]:
            raise ValueError(
                "`negative_selection` has nothing to select: the loss 'sft' has no rejected completions. Leave it out, or add "
                "another loss."
            )
        if not math.isfinite(self.dynamic_beta_margin):
            raise ValueError(f"`dynamic_beta_margin` must be a finite number, got {self.dynamic_beta_margin}.")
        if not self.dynamic_beta:
            return
        if selection == "all":
            raise ValueError(
                "`dynamic_beta` compares the rejected completions that are selected with the others: set "
                "`negative_selection` to 'boundary', as DynamicPO does, or to 'hardest'."
            )
        if unfit := self._named_losses() - DYNAMIC_BETA_LOSSES:
            raise ValueError(
                f"`dynamic_beta` needs losses that are functions of reward margins: {_listed(DYNAMIC_BETA_LOSSES)}. Got "
                f"{_listed(unfit)}."
            )

    def _check_reference_free(self) -> None:
        if not self.reference_free:
            return
        if unfit := self._named_losses() - REFERENCE_FREE_LOSSES:
            raise ValueError(
                f"`reference_free` makes no sense with {_listed(unfit)}, which asks how each reward or their distribution "
                f"stands to the reference. Use one of: {_listed(REFERENCE_FREE_LOSSES)}."
            )
        for option, is_set in (
            ("precompute_ref_log_probs", self.precompute_ref_log_probs),
            ("sync_ref_model", self.sync_ref_model),
            (f"f_divergence_type={self.f_divergence_type!r}", self.f_divergence_type != "reverse_kl"),
        ):
            if is_set:
                raise ValueError(
                    f"`{option}` is about a reference, and `reference_free=True` has none. Leave one out."
                )

    def _check_dispatch(self) -> None:
        """A batch cannot be cut into slices for processes: its tensors point into one another."""
        if self.accelerator_config.dispatch_batches:
            raise ValueError(
                "`dispatch_batches=True` of `accelerator_config` has one process lay out the batches of all. Leave it out: "
                "each lays out its own, also those of a stream."
            )
        self.accelerator_config.dispatch_batches = False

    def _check_max_tokens(self) -> None:
        if self.max_tokens_per_batch is None:
            return
        if self.max_tokens_per_batch < 1:
            raise ValueError(
                f"`max_tokens_per_batch` must be at least 1, got {self.max_tokens_per_batch}. Leave it out to take batches "
                "as they are."
            )
        coupled = [name for name in self.loss_type if name in BATCH_LOSSES]
        if coupled:
            raise ValueError(
                f"The loss {coupled[0]!r} compares the rows of a batch with one another: `max_tokens_per_batch` would "
                "change it. Leave one of them out."
            )

    def _check_prefix_sharing(self) -> None:
        values: dict[str, Literal["auto", True, False]] = {"auto": "auto", "true": True, "false": False}
        value = values.get(str(self.prefix_sharing).lower())
        if value is None:
            raise ValueError(f"`prefix_sharing` must be 'auto', True or False, got {self.prefix_sharing!r}.")
        self.prefix_sharing = value

    def _check_trunks(self) -> None:
        length, budget = self.max_trunk_length, self.max_tokens_per_batch
        if self.trunk_column is None:
            if length is not None:
                raise ValueError(
                    "`max_trunk_length` is the length of rows that prompts share by `trunk_column`, which is not set. Set it, "
                    "to 'user_id' for example, or leave both out."
                )
            return
        if length is not None and length < 1:
            raise ValueError(
                f"`max_trunk_length` must be at least 1, got {length}. Leave it out for rows of any length."
            )
        if length is not None and budget is not None and length > budget:
            raise ValueError(
                f"Rows of `max_trunk_length={length}` tokens do not fit into `max_tokens_per_batch={budget}`. Lower the one or "
                "raise the other."
            )
        if self.prefix_sharing is False:
            raise ValueError(
                "`trunk_column` has several rows share one prompt, and under `prefix_sharing=False` not even the completions of "
                "a row do. Leave one of them out."
            )
        # Transformers 5.0 has `group_by_length`, what came after has `train_sampling_strategy`
        grouped = "group_by_length" if getattr(self, "group_by_length", False) else "random"
        strategy = getattr(self, "train_sampling_strategy", grouped)
        if strategy != "random":
            raise ValueError(
                f"`trunk_column` and {strategy!r} sampling each say which rows go into a batch. Leave one of them out: under "
                "`trunk_column`, rows are padded little."
            )

    def to_dict(self) -> dict[str, Any]:
        """
        The configuration as a dict that can be written as JSON: functions in `loss_type` by their names, and no token in
        `model_init_kwargs`.
        """
        values = super().to_dict()
        loading = _without_token(values["model_init_kwargs"])
        return values | {"loss_type": [loss_name(loss) for loss in self.loss_type], "model_init_kwargs": loading}

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled, into every checkpoint among others: no token."""
        loading = _without_token(self.model_init_kwargs)
        return {**self.__dict__, "hub_token": None, "model_init_kwargs": loading}

    def __copy__(self) -> "DMPOConfig":
        # What is copied in memory keeps its token
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> "DMPOConfig":
        memo[id(self)] = copied = object.__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


def _without_token(kwargs: Any) -> Any:
    return {name: value for name, value in kwargs.items() if name != "token"} if isinstance(kwargs, dict) else kwargs


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _unknown_loss(name: Any) -> str:
    close = get_close_matches(str(name), LOSSES, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"Unknown `loss_type` {name!r}. {hint}It is one of: {_listed(LOSSES)}."


def _check_importable(loss: Callable) -> None:
    """A checkpoint stores the configuration, and with it the function: by where it can be imported from."""
    name = getattr(loss, "__qualname__", None)
    if name is None or "<" in name:
        raise ValueError(
            f"`loss_type` has {name or loss!r}, which cannot be saved in a checkpoint. Define the loss as a function of a "
            "module (`def my_loss(scores, config): ...`) instead of a lambda, a local function or a partial."
        )


def loss_name(loss: str | Callable) -> str:
    """Name of an entry of `loss_type`, for logs and messages."""
    return loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)
