from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from trl import DPOConfig

from ..losses import F_DIVERGENCE_LOSSES, LOSSES


@dataclass
class DMPOConfig(DPOConfig):
    r"""
    Configuration class for the [`DMPOTrainer`].

    This class includes only the parameters that are specific to DMPO. For the others, such as `beta`, `loss_weights` or
    `precompute_ref_log_probs`, see [`~trl.DPOConfig`] and [`~transformers.TrainingArguments`].

    Parameters:
        loss_type (`list[str]`, *optional*, defaults to `["dmpo"]`):
            Type of loss to use: `'dmpo'`, `'sdpo'`, or one of TRL's, which is then the mean over the K pairs of the
            chosen completion and a rejected one: `'sigmoid'`, `'hinge'`, `'ipo'`, `'exo_pair'`, `'nca_pair'`,
            `'robust'`, `'bco_pair'`, `'sppo_hard'`, `'aot'`, `'aot_unpaired'`, `'apo_zero'`, `'apo_down'`,
            `'discopop'`, `'sigmoid_norm'`; `'sft'` counts the chosen completion once. Several are combined with the
            weights in `loss_weights`. In Python, a function of [`Scores`] and this configuration, defined in a module, may
            stand for a name; under another `f_divergence_type` than the default it must be one of [`margins`].
        prefix_sharing (`bool` or `str`, *optional*, defaults to `"auto"`):
            Whether to compute the tokens that the completions of a prompt have in common once. `"auto"` does so where it
            is exact, which a rule on the kind of model and a comparison on the first batch decide, and otherwise says
            why not. `True` raises an error where it is not exact. `False` runs the prompt once for every completion.
        num_negatives (`int`, *optional*):
            Number of rejected completions to draw from those of a row each time the row is trained on, without
            replacement and reproducibly under `seed`. Rows with fewer keep all. If `None`, all are used. Evaluation
            always uses all.
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
            "help": "Type of loss to use: 'dmpo', 'sdpo', or one of TRL's ('sigmoid', 'hinge', 'ipo', 'exo_pair', "
            "'nca_pair', 'robust', 'bco_pair', 'sppo_hard', 'aot', 'aot_unpaired', 'apo_zero', 'apo_down', 'discopop', "
            "'sigmoid_norm'), which is then the mean over the K pairs; 'sft' counts the chosen completion once. Several "
            "are combined with the weights in `loss_weights`."
        },
    )
    # The strings are for the command line, which would read `bool | str` as `bool` and refuse "auto"
    prefix_sharing: Literal["auto", "true", "false", True, False] = field(
        default="auto",
        metadata={
            "help": "Whether to compute the tokens that the completions of a prompt have in common once. 'auto' does so "
            "where it is exact, 'true' raises an error where it is not, 'false' never does."
        },
    )
    num_negatives: int | None = field(
        default=None,
        metadata={
            "help": "Number of rejected completions to draw from those of a row each time the row is trained on. By "
            "default, all are used."
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
        if self.num_negatives is not None and self.num_negatives < 1:
            raise ValueError(
                f"`num_negatives` must be at least 1, got {self.num_negatives}. Leave it out to use every rejected "
                "completion of a row."
            )
        if self.on_invalid_row not in ("raise", "drop"):
            raise ValueError(f"`on_invalid_row` must be 'raise' or 'drop', got {self.on_invalid_row!r}.")
        if isinstance(self.ranking_k, int):
            self.ranking_k = [self.ranking_k]
        if not self.ranking_k or any(k < 1 for k in self.ranking_k):
            raise ValueError(f"`ranking_k` must be cut-offs of at least 1, such as [1, 5, 10]; got {self.ranking_k}.")
        super().__post_init__()

    def _check_loss_type(self) -> None:
        for name in self.loss_type:
            if callable(name):
                _check_importable(name)
            elif name not in LOSSES:
                raise ValueError(_unknown_loss(name))
        named = {name for name in self.loss_type if not callable(name)}
        if self.f_divergence_type != "reverse_kl" and not named <= F_DIVERGENCE_LOSSES:
            raise ValueError(
                f"`f_divergence_type={self.f_divergence_type!r}` needs losses that are functions of reward margins: "
                f"{', '.join(sorted(F_DIVERGENCE_LOSSES))}. Got {', '.join(sorted(named - F_DIVERGENCE_LOSSES))}; use "
                "`f_divergence_type='reverse_kl'` with it."
            )

    def _check_prefix_sharing(self) -> None:
        values: dict[str, Literal["auto", True, False]] = {"auto": "auto", "true": True, "false": False}
        value = values.get(str(self.prefix_sharing).lower())
        if value is None:
            raise ValueError(f"`prefix_sharing` must be 'auto', True or False, got {self.prefix_sharing!r}.")
        self.prefix_sharing = value

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a dict that can be written as JSON: functions in `loss_type` by their names."""
        return {**super().to_dict(), "loss_type": [loss_name(loss) for loss in self.loss_type]}


def _unknown_loss(name: Any) -> str:
    close = get_close_matches(str(name), LOSSES, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"Unknown `loss_type` {name!r}. {hint}It is one of: {', '.join(sorted(LOSSES))}."


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
