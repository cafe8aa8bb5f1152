# TRL's private hooks that this file overrides or reads are listed, with why, in `hooks.py`.

import contextlib
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from datasets.fingerprint import Hasher
from transformers import (
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalPrediction
from trl import DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import get_config_model_id, global_then_local_main_first, use_adapter

from ..losses import LIST_LOSSES, LOSSES, Scores
from ..losses.pairwise import PAIRWISE_LOSSES
from .attention import check_backward
from .checkpoints import Checkpoints
from .collator import DataCollatorForMultiPreference, is_nested
from .dmpo_config import DMPOConfig, loss_name
from .layout import LAYOUT_KEYS, Candidate, gather_completions, is_shared, unpack
from .lengths import LengthSampler, needs_lengths, row_lengths
from .metrics import MeanMetrics, preference_metrics, ranking_metrics
from .micro_batches import join_parts, split_batch
from .pairs import Logps, make_scores, per_prompt, select_for_each, split_chosen
from .quantization import keep_differentiable
from .reference_cache import describe_collator, describe_reference, discard_broken, hash_model, with_one_cache
from .row_checks import Needs
from .scoring import forward
from .sharing import compute_dtype, measure_sharing, sharing_obstacle
from .step_counts import COUNT_KEYS, chosen_nll, count_step, count_tokens, counted, mean_over_step
from .tokenization import prepare_dataset
from .trunks import TrunkSampler, check_trunk_column


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig

logger = get_logger(__name__)


class _EpochCallback(TrainerCallback):
    """
    Tells collator and sampler the epoch before their data loader starts, so that a resumed run has the same batches.

    Accelerate does not tell a sampler that several processes resume in the middle of an epoch.
    """

    def __init__(self, trainer: "DMPOTrainer"):
        self.trainer = trainer
        self.epoch = trainer._train_collator.epoch

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.epoch.fill_(-1)

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        # A stream that starts over is still in its first epoch to `Trainer`, which knows `max_steps` only
        self.epoch.fill_(max(int(state.epoch or 0), int(self.epoch) + 1))
        if self.trainer._epoch_sampler is not None:
            self.trainer._epoch_sampler.set_epoch(int(self.epoch))


@contextlib.contextmanager
def _as_trl_knows_it(args: DMPOConfig) -> Iterator[None]:
    """`args` while `DPOTrainer.__init__` checks them, which knows neither our losses nor training without a reference."""
    loss_type, precompute = args.loss_type, args.precompute_ref_log_probs
    args.loss_type = [loss if loss in PAIRWISE_LOSSES or loss == "sft" else "sigmoid" for loss in loss_type]
    # It keeps no reference model where it believes that its log-probabilities are computed beforehand
    args.precompute_ref_log_probs = precompute or args.reference_free
    # `Checkpoints` takes its place: it saves between two steps, and the same one in all processes
    saves_on_sigterm, args.enable_jit_checkpoint = args.enable_jit_checkpoint, False
    try:
        yield
    finally:
        args.loss_type, args.precompute_ref_log_probs = loss_type, precompute
        args.enable_jit_checkpoint = saves_on_sigterm


class DMPOTrainer(DPOTrainer):
    """
    Trainer for Direct Multi-Preference Optimization (DMPO): one chosen completion against several rejected ones.

    The method was introduced in [Finetuning Large Language Model for Personalized
    Ranking](https://huggingface.co/papers/2405.16127). This class is a drop-in replacement for [`~trl.DPOTrainer`]: with
    one rejected completion, `loss_type="sigmoid"` and the same `beta` it trains the same model and logs the same values, but for
    `num_tokens`, which counts a shared prompt once, and for new metrics: `ranking/*`, `negatives/*`,
    `rewards/hardest_margin` and `logps/chosen_change`.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained, as for [`~trl.DPOTrainer`].
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            Reference model. If `None`, the model as it is before training.
        args ([`DMPOConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        data_collator ([`~transformers.DataCollator`], *optional*):
            Function to form a batch from a list of examples: a [`DataCollatorForMultiPreference`], which is the default, or
            one derived from it. `prefix_sharing`, `num_negatives`, `seed`, `trunk_column` and `max_trunk_length` of `args`
            have the last word.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset to use for training. Its rows have a `"chosen"` completion, or a list of them, a list of `"rejected"`
            ones, whose length may differ from row to row, and, unless implicit, a `"prompt"`; each text or a list of
            messages. For losses that use it, `"relevance"` has a number for each completion, the chosen first.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`], [`~datasets.DatasetDict`], [`~datasets.IterableDatasetDict`] or `dict[str, Dataset | IterableDataset]`, *optional*):
            Dataset to use for evaluation. It must meet the same requirements as `train_dataset`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            Processing class used to process the data. If `None`, it is loaded from the model's name.
        compute_metrics (`Callable[[EvalPrediction], dict]`, *optional*):
            Function that computes metrics at evaluation. `predictions` are log-probabilities of completions, of shape
            (rows, C), the chosen ones first; `label_ids` of the same shape are 1 for the chosen completions, 0 for the
            rejected ones and -100 where there is none; there, `predictions` mean nothing.
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            List of callbacks to customize the training loop.
        optimizers (`tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None]`, *optional*, defaults to `(None, None)`):
            A tuple containing the optimizer and the scheduler to use.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization configuration used when loading the model from a model identifier.
        peft_config ([`~peft.PeftConfig`], *optional*):
            PEFT configuration used to wrap the model. If `None`, the model is not wrapped.

    Raises:
        `TypeError`: `args` is not a [`DMPOConfig`], or `data_collator` is not ours.
        `ValueError`: a row breaks the contract, an option does not fit the model, or a dataset is empty or has images.
        `FloatingPointError`: a loss is not finite; the message names the step, the rows and the term.

    Example:

    ```python
    from datasets import Dataset
    from trl_dmpo import DMPOConfig, DMPOTrainer

    dataset = Dataset.from_list(
        [{"prompt": "Watched: Alien. Next:", "chosen": " Aliens", "rejected": [" Heat", " Big", " Babe"]}]
    )
    trainer = DMPOTrainer(model="Qwen/Qwen3-0.6B", args=DMPOConfig("Qwen3-DMPO"), train_dataset=dataset)
    trainer.train()
    ```
    """

    data_collator: Any
    # What a callback has put in the place of the rejected completions of the training rows
    rejected_pools: Any = None
    # The folder from which `train` was last told to resume, of which callbacks are not told
    resumed_from: str | None = None
    _train_collator: Any = None  # until TRL has made its own
    _epoch_sampler: TrunkSampler | LengthSampler | None = None
    _precompute_model_hash: str | None
    _tag_names = ["trl", "dmpo"]
    _name = "DMPO"
    _paper = {
        "title": "Finetuning Large Language Model for Personalized Ranking",
        "id": "2405.16127",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{bai2024finetuning,
                title        = {{Finetuning Large Language Model for Personalized Ranking}},
                author       = {Zhuoxi Bai and Ning Wu and Fengyu Cai and Xinyi Zhu and Yun Xiong},
                year         = 2024,
                eprint       = {arXiv:2405.16127},
            }"""),
    }

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        ref_model: PreTrainedModel | None = None,
        args: DMPOConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
    ):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = DMPOConfig(f"{model_name.split('/')[-1]}-DMPO")
        elif not isinstance(args, DMPOConfig):
            raise TypeError(
                f"`args` must be a `DMPOConfig`, got `{type(args).__name__}`. Rename it: the options are the same."
            )
        _check_dataset(train_dataset, "train")

        self._sharing_is_exact: bool | None = None  # not measured yet
        self._measured: set[int] = set()  # the policy and, if there is one, the reference model
        self._pool_size: tuple[int, int] | None = None
        self._reference: tuple[str, ...] | None = None
        self._needs = Needs.of(args)
        self._running = {"train": MeanMetrics(), "eval": MeanMetrics()}  # sums of what is not logged yet
        if args.reference_free and ref_model is not None:
            raise ValueError("`reference_free=True` has no use for a `ref_model`. Leave one of them out.")
        with _as_trl_knows_it(args):
            super().__init__(
                model=model,
                ref_model=ref_model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        if self.aux_loss_enabled and args.max_tokens_per_batch is not None:
            raise ValueError(
                "The auxiliary loss of a mixture of experts is one of the whole batch: `max_tokens_per_batch` would change it. "
                "Leave it out, or load the model with `output_router_logits=False`."
            )
        self.precompute_ref_logps = args.precompute_ref_log_probs
        self.loss_types = args.loss_type
        self.losses = [LOSSES[loss] if isinstance(loss, str) else loss for loss in args.loss_type]
        self._adopt_collator()
        if self._train_collator.num_negatives is not None or args.trunk_column is not None or needs_lengths(args):
            self.add_callback(_EpochCallback(self))
        self._checkpoints = Checkpoints(self)
        self.add_callback(self._checkpoints)

    def _adopt_collator(self) -> None:
        """
        Put our collator in the place of TRL's, with its settings, and decide on the layout by rule.

        Training draws from the rejected completions of a row, precomputation and evaluation use all: two collators.
        """
        collator = self.data_collator
        if type(collator) is DataCollatorForPreference:
            settings = {field.name: getattr(collator, field.name) for field in fields(collator)}
            collator = DataCollatorForMultiPreference(**settings, num_negatives=self.args.num_negatives)
        elif not isinstance(collator, DataCollatorForMultiPreference):
            raise TypeError(
                f"`data_collator` must be a `DataCollatorForMultiPreference`, got `{type(collator).__name__}`, which knows "
                "nothing of several rejected completions. Leave it out, or derive yours from that class."
            )
        elif self.args.num_negatives is not None:
            collator = replace(collator, num_negatives=self.args.num_negatives)
        if self._train_collator is None:
            keep_differentiable(self.model)
            shares = collator.prefix_sharing and bool(self.args.prefix_sharing)
            obstacle = self._sharing_obstacle() if shares else None
            if obstacle is not None:
                self._refuse_sharing(obstacle)
            self._train_collator = replace(
                collator,
                prefix_sharing=shares and obstacle is None,
                seed=self.args.seed,
                trunk_column=self.args.trunk_column,
                max_trunk_length=self.args.max_trunk_length or self.args.max_tokens_per_batch,
            )
        self.data_collator = replace(self._train_collator, num_negatives=None)

    def _sharing_obstacle(self) -> str | None:
        if self._is_vlm:
            return "vision-language models place tokens in ways of their own"
        if self.aux_loss_enabled:
            return "the auxiliary loss of a mixture of experts counts every token, also those of a repeated prompt"
        models = (
            [self.model] if self.ref_model is None else [self.model, self.accelerator.unwrap_model(self.ref_model)]
        )
        return next((obstacle for obstacle in map(sharing_obstacle, models) if obstacle is not None), None)

    def _refuse_sharing(self, reason: str) -> None:
        if self.args.prefix_sharing is True:
            raise ValueError(
                f"`prefix_sharing=True`, but sharing prompts is not exact here: {reason}. Set `prefix_sharing='auto'` to "
                "run the prompt once for every completion instead."
            )
        logger.warning(f"Prompts are not shared, each is run once for every completion: {reason}.")

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        args: DMPOConfig,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        _check_dataset(dataset, dataset_name)
        if dataset_name == "train" and args.trunk_column is not None:
            check_trunk_column(dataset, args.trunk_column)
        with global_then_local_main_first():
            dataset = prepare_dataset(
                dataset, dataset_name, processing_class, self._tokenizer.eos_token, args, self._needs
            )
        if dataset_name == "train" and "mult_dpo" in self._needs.losses and isinstance(dataset, Dataset):
            chosen = dataset.select_columns("chosen_ids")["chosen_ids"]
            if not any(is_nested(ids) and len(ids) > 1 for ids in chosen):
                logger.warning("No row has several chosen completions: `mult_dpo` is `sdpo` with one.")
        return dataset

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        columns = ["row_index", "relevance"] if self._needs.relevance else ["row_index"]
        if self.args.trunk_column is not None:
            columns.append(self.args.trunk_column)
        if needs_lengths(self.args):
            columns.append(self.args.length_column_name)
        self._signature_columns += [column for column in columns if column not in self._signature_columns]

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler | None:
        column = self.args.trunk_column
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if column is None:
            sampler = super()._get_train_sampler(self._with_lengths(dataset, self._train_collator))
            if isinstance(sampler, LengthGroupedSampler):
                sampler = LengthSampler(sampler.batch_size, list(sampler.lengths), seed)
            if needs_lengths(self.args):
                self._epoch_sampler = sampler
            return sampler
        # A process gets a batch, or its part of one
        num_parts = self.accelerator.num_processes if self.accelerator.split_batches else 1
        users = dataset.select_columns(column)[column][:]
        self._epoch_sampler = TrunkSampler(users, self._train_batch_size // num_parts, seed)
        return self._epoch_sampler

    def _get_eval_sampler(self, eval_dataset: Dataset) -> torch.utils.data.Sampler | None:
        sampler = super()._get_eval_sampler(self._with_lengths(eval_dataset, self.data_collator))
        if isinstance(sampler, LengthGroupedSampler):
            sampler = LengthSampler(sampler.batch_size, list(sampler.lengths), self.args.seed)
        return sampler

    def _with_lengths(self, dataset: Any, collator: DataCollatorForMultiPreference) -> Any:
        """`dataset`, or in its place the lengths of its rows, if a sampler of transformers asks for them."""
        name = self.args.length_column_name
        if not needs_lengths(self.args) or not isinstance(dataset, Dataset) or name in dataset.column_names:
            return dataset
        of_first_epoch = replace(collator, epoch=torch.zeros((), dtype=torch.int64))
        return Dataset.from_dict({name: row_lengths(dataset, of_first_epoch)})

    def get_train_dataloader(self):
        collator, self.data_collator = self.data_collator, self._train_collator
        try:
            return self._checkpoints.protect_workers(super().get_train_dataloader())
        finally:
            self.data_collator = collator

    def get_eval_dataloader(self, *args, **kwargs):
        return self._checkpoints.protect_workers(super().get_eval_dataloader(*args, **kwargs))

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if self.args.reference_free:
            return dataset
        if isinstance(dataset, IterableDataset):
            return super()._precompute_ref_logps(dataset, name, batch_size)  # says that it cannot
        self._adopt_collator()
        model_hash, collator = self._precompute_model_hash, self.data_collator
        # TRL reuses a cached file by the hash of the model: it must not be one of other settings
        if self._reference is None:
            self._reference = self._describe_reference()
        self._precompute_model_hash = Hasher.hash((self._reference, describe_collator(collator), self.ld_alpha))
        if dataset._indices is not None:  # else TRL's file of log-probabilities would be copied once more
            dataset = dataset.flatten_indices()
        if self.accelerator.is_main_process:
            discard_broken(dataset, self._precompute_model_hash)
        self.accelerator.wait_for_everyone()
        # TRL concatenates the values of all batches: pad every row to the same numbers of completions
        chosen, rejected = (dataset.select_columns(name)[name] for name in ("chosen_ids", "rejected_ids"))
        self._pool_size = (max(map(len, chosen)) if is_nested(chosen[0]) else 0, max(map(len, rejected)))
        try:
            return super()._precompute_ref_logps(with_one_cache(dataset), name, batch_size)
        finally:
            self._precompute_model_hash, self._pool_size = model_hash, None

    def _describe_reference(self) -> tuple[str, ...]:
        """The weights of the reference, as hashes, and what else its log-probabilities depend on."""
        reference = self.model if self.ref_model is None else self.accelerator.unwrap_model(self.ref_model)
        if self.ref_model is None or self.is_deepspeed_enabled:
            # The processes of DeepSpeed may have a part of the weights each
            hashes = gather_object([hash_model(reference)]) if self.is_deepspeed_enabled else [hash_model(reference)]
        else:
            hashes = [self._precompute_model_hash]  # of before it was sharded
        return *hashes, describe_reference(reference, self.accelerator.mixed_precision)

    def _decide_layout(self, model: torch.nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """`inputs`, in the repeated layout if that is what it takes to be exact. Measures each model once."""
        if not is_shared(inputs):
            return inputs
        identity = id(self.accelerator.unwrap_model(model))
        if self._sharing_is_exact is not False and identity not in self._measured:
            self._measure_sharing(model, inputs)
            self._measured.add(identity)
        if self._sharing_is_exact:
            return inputs
        # Laid out before the verdict, by a worker of the data loader
        places = inputs["completion_lengths"].size(1)
        rows = [[*row, *[None] * (places - len(row))] for row in unpack(inputs)]
        repeated = self._lay_out(rows, False)
        return {key: inputs[key] for key in inputs if key not in LAYOUT_KEYS} | repeated

    def _lay_out(self, rows: list[list[Candidate | None]], prefix_sharing: bool) -> dict[str, Any]:
        return self._prepare_inputs(replace(self.data_collator, prefix_sharing=prefix_sharing).lay_out(rows))

    def _measure_sharing(self, model: torch.nn.Module, inputs: dict[str, Any]) -> None:
        unwrapped = self.accelerator.unwrap_model(model)
        dtype = compute_dtype(unwrapped, self.accelerator.mixed_precision)
        was_training = model.training
        model.eval()  # dropout differs between any two passes
        try:
            with self._no_grad():
                score = partial(self._token_logps, model)
                measured = measure_sharing(inputs, score, self._lay_out, dtype, unwrapped)
        finally:
            model.train(was_training)
        found = gather_object([None if measured.exact else measured.describe()])  # one verdict for all processes
        self._sharing_is_exact = not any(found)
        if not self._sharing_is_exact:
            self._stop_sharing(f"on the first batch, {next(filter(None, found))}")

    def _stop_sharing(self, reason: str) -> None:
        self._sharing_is_exact = self.data_collator.prefix_sharing = self._train_collator.prefix_sharing = False
        self._refuse_sharing(reason)

    @contextlib.contextmanager
    def _no_grad(self):
        # Calling the model inside `no_grad` with reentrant checkpointing triggers a harmless warning of PyTorch
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            self.accelerator.autocast(),
        ):
            yield

    def _forward(self, model: torch.nn.Module, inputs: dict[str, Any], **kwargs) -> Any:
        return forward(model, self.accelerator.unwrap_model(model), inputs, **kwargs)

    def _token_logps(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Log-probabilities of the tokens of each completion, of shape (B, C, L)."""
        return gather_completions(self._forward(model, inputs).log_probs, inputs)

    def _completion_logps(self, token_logps: torch.Tensor, inputs: dict[str, Any]) -> Logps:
        """
        Log-probabilities of the chosen, (B,), or (B, P) if there are several, and the rejected completions, (B, K).

        Under `ld_alpha` those of the chosen are (B, K): beyond the length that both completions of a pair have, tokens
        count only α ([LD-DPO](https://huggingface.co/papers/2409.06411)).
        """
        lengths, count = inputs["completion_lengths"], inputs["chosen_lengths"].size(1)
        if self.ld_alpha is None:
            logps = token_logps.sum(-1)
            return (logps[:, 0] if count == 1 else logps[:, :count]), logps[:, count:]
        both = torch.minimum(lengths[:, :1], lengths[:, 1:]).unsqueeze(-1)
        counts_fully = torch.arange(token_logps.size(2), device=lengths.device) < both
        weights = torch.where(counts_fully, 1.0, self.ld_alpha)
        return (token_logps[:, :1] * weights).sum(-1), (token_logps[:, 1:] * weights).sum(-1)

    def compute_ref_log_probs(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Logps:
        """
        Computes reference log probabilities of the chosen, (B,), or (B, P) if there are several, and the rejected
        completions, (B, K), of a batch.
        """
        adapter = contextlib.nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            # A new adapter is turned off; of a pretrained one, a copy was kept as "ref"
            unwrapped = self.accelerator.unwrap_model(self.model)
            adapter = use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None)
        inputs = self._decide_layout(model, inputs)
        # In training, the batch is split already
        parts = [inputs] if self._pool_size is None else self._split(counted(inputs, self.accelerator))
        with self._no_grad(), adapter:
            logps = [self._completion_logps(self._token_logps(model, part), part) for part in parts]
        chosen, rejected = join_parts(parts, logps)
        if self._pool_size is None:
            return chosen, rejected
        most_chosen, most_rejected = self._pool_size
        if self.ld_alpha is not None:
            chosen = F.pad(chosen, (0, most_rejected - chosen.size(1)))
        elif most_chosen > 0:
            chosen = chosen.view(len(chosen), -1)
            chosen = F.pad(chosen, (0, most_chosen - chosen.size(1)))
        return chosen, F.pad(rejected, (0, most_rejected - rejected.size(1)))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        check_backward(self.model.config, self.accelerator.device)
        self.resumed_from = self._checkpoints.find(resume_from_checkpoint)
        with self._checkpoints.training():
            return super().train(self.resumed_from, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        dtypes = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        # PEFT loads an adapter in float32, also one on quantized weights, which TRL trains in bfloat16
        for name, parameter in self.model.named_parameters():
            if parameter.dtype != dtypes.get(name, parameter.dtype):
                parameter.data = parameter.data.to(dtypes[name])

    def _save_checkpoint(self, model, trial):
        with self._checkpoints.saving(trial):
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        self._checkpoints.finish(Path(output_dir))

    def get_batch_samples(self, *args, **kwargs):
        if 0 < self.state.max_steps <= self.state.global_step:
            return [], None  # resumed from the last checkpoint: `Trainer` would look at it after one more step
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        if batches:
            count_step(batches, self.accelerator, self.callback_handler.train_dataloader)
        return batches, num_items

    def training_step(self, model, inputs, *args, **kwargs):
        inputs = counted(inputs, self.accelerator)
        if self.rejected_pools is not None:
            # Laid out anew: batches are collated ahead of the step, by a data loader that knows nothing of a change
            renewed = self._train_collator(self.rejected_pools.examples(inputs["row_index"].tolist()))
            inputs = renewed | {key: inputs[key] for key in COUNT_KEYS}
        if self.args.max_tokens_per_batch is not None:  # which the layout decides whether it has
            inputs = self._decide_layout(model, self._prepare_inputs(inputs))
        micro_batches = self._split(inputs)
        is_last_of_step, losses = self.accelerator.sync_gradients, []
        for index, micro_batch in enumerate(micro_batches):
            is_last = index == len(micro_batches) - 1
            self.accelerator.gradient_state._set_sync_gradients(is_last_of_step and is_last)
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, micro_batch, *args, **kwargs))
        if is_last_of_step:
            self._collect_metrics("train")
        return self._checkpoints.with_carried(sum(losses))

    def _split(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        """`inputs` in micro-batches within `max_tokens_per_batch`."""
        return split_batch(
            inputs, self.args.max_tokens_per_batch, self.accelerator, self.data_collator.pad_to_multiple_of
        )

    def _compute_loss(self, model, inputs, return_outputs):
        inputs = counted(self._decide_layout(model, inputs), self.accelerator)
        # MoE models: request router logits so that the model returns `outputs.aux_loss`
        outputs = self._forward(model, inputs, **({"output_router_logits": True} if self.aux_loss_enabled else {}))
        token_logps = gather_completions(outputs.log_probs, inputs)
        scores = self._scores(token_logps, outputs, inputs)
        terms = self._loss_terms(select_for_each(scores, self.args, inputs["chosen_lengths"]), inputs)
        loss = sum(
            weight * mean_over_step(term, inputs) for weight, term in zip(self.loss_weights, terms, strict=True)
        )
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
        self._require_finite(loss, terms, scores, inputs)
        self._add_metrics(scores, token_logps, outputs, inputs)
        if not return_outputs:
            return loss
        return loss, token_logps.sum(-1)

    def _reference_logps(self, inputs: dict[str, Any], logps: Logps) -> Logps:
        if self.args.reference_free:
            return torch.zeros_like(logps[0]), torch.zeros_like(logps[1])
        if not self.precompute_ref_logps:
            return self.compute_ref_log_probs(self.ref_model if self.ref_model is not None else self.model, inputs)
        chosen, rejected = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        # Where `chosen` is a list, also if it is of one in all rows of the batch
        return (chosen[:, 0] if chosen.dim() > logps[0].dim() else chosen), rejected

    def _scores(self, token_logps: torch.Tensor, outputs: Any, inputs: dict[str, Any]) -> Scores:
        """What the losses see, a row for each chosen completion."""
        weights = None
        if self.use_weighting:
            scored = (inputs["completion_positions"] >= 0).sum(-1)
            # Eq (2) of the WPO paper: https://huggingface.co/papers/2406.11827
            aligned = (token_logps - gather_completions(outputs.log_sum_sq_probs, inputs)).detach()
            weights = (aligned.sum(-1) / scored.clamp(min=1)).exp()
        logps = self._completion_logps(token_logps, inputs)
        nll = chosen_nll(token_logps, inputs)
        return make_scores(logps, self._reference_logps(inputs, logps), inputs, nll, weights)

    def _loss_terms(self, scores: Scores, inputs: dict[str, Any]) -> list[torch.Tensor]:
        """The losses of the prompts, each of shape (B,)."""
        terms = []
        for name, loss in zip(self.loss_types, self.losses, strict=True):
            term = loss(scores, self.args)
            by_prompt = name in LIST_LOSSES
            expected = (len(inputs["chosen_lengths"] if by_prompt else scores.rejected_mask),)
            if term.shape != expected:
                raise ValueError(
                    f"The loss {loss_name(name)!r} returned a tensor of shape {tuple(term.shape)}, expected one value for "
                    f"each chosen completion, {expected}. For a loss of pairs, use `trl_dmpo.losses.over_pairs`; one that "
                    "takes all `scores.answers` of a prompt at once is for rows with one chosen completion."
                )
            terms.append(term if by_prompt else per_prompt(term, inputs["chosen_lengths"]))
        return terms

    @torch.no_grad()
    def _add_metrics(self, scores: Scores, token_logps: torch.Tensor, outputs: Any, inputs: dict[str, Any]) -> None:
        """Add the sums of a batch to those that are not logged yet."""
        metrics = self._running["train" if self.model.training else "eval"]
        counts, lengths = inputs["counts"], inputs["chosen_lengths"]
        tokens = (inputs["completion_positions"] >= 0) & counts[:, None, None]
        metrics.add_total("num_tokens", count_tokens(inputs))
        padding = inputs["attention_mask"] == 0
        metrics.add("tokens/padding", padding, counts.any().expand_as(padding))
        if self.aux_loss_enabled:
            metrics.add("aux_loss", outputs.aux_loss)
        metrics.add("entropy", gather_completions(outputs.entropy, inputs), tokens)
        count = lengths.size(1)
        mean_logits = gather_completions(outputs.mean_logits, inputs)
        metrics.add("logits/chosen", mean_logits[:, :count], tokens[:, :count])
        metrics.add("logits/rejected", mean_logits[:, count:], tokens[:, count:])
        is_top1 = gather_completions(outputs.is_top1, inputs)
        metrics.add("mean_token_accuracy", is_top1[:, :count], tokens[:, :count])
        found = preference_metrics(scores, self.beta)
        chosen, rejected = split_chosen(token_logps.sum(-1), lengths)
        mask = F.pad(scores.rejected_mask, (1, 0), value=True)
        found |= ranking_metrics(torch.cat([chosen.unsqueeze(1), rejected], dim=1), mask, self.args.ranking_k)
        if self.args.reference_free:
            del found["logps/chosen_change"]
        for name, values in found.items():
            metrics.add(name, per_prompt(values, lengths), counts)

    def _collect_metrics(self, mode: str) -> None:
        """Means of what has been added since the last time, over all processes, to where TRL's `log` takes them from."""
        means = self._running[mode].reduce(self.accelerator)
        self._running[mode] = MeanMetrics()
        if not means:
            return
        num_tokens = round(means.pop("num_tokens"))
        if mode == "train":
            self._total_train_tokens += num_tokens // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        for name, value in means.items():
            self._metrics[mode][name].append(value)

    def log(self, *args, **kwargs) -> None:
        self._collect_metrics("train" if self.model.training else "eval")
        super().log(*args, **kwargs)

    def _require_finite(
        self, loss: torch.Tensor, terms: list[torch.Tensor], scores: Scores, inputs: dict[str, Any]
    ) -> None:
        """Raise a `FloatingPointError` on all processes if the loss of one is not finite."""
        if not self.accelerator.gather(torch.isfinite(loss.detach())[None]).all():
            raise FloatingPointError(self._describe_non_finite(loss, terms, scores, inputs))

    def _describe_non_finite(
        self, loss: torch.Tensor, terms: list[torch.Tensor], scores: Scores, inputs: dict[str, Any]
    ) -> str:
        parts = {
            "policy log-probabilities of the chosen completion": scores.chosen_logps,
            "policy log-probabilities of the rejected completions": scores.rejected_logps,
            "reference log-probabilities of the chosen completion": scores.ref_chosen_logps,
            "reference log-probabilities of the rejected completions": scores.ref_rejected_logps,
            **{f"loss {loss_name(name)!r}": term for name, term in zip(self.loss_types, terms, strict=True)},
        }
        rows = inputs.get("row_index", torch.arange(len(inputs["chosen_lengths"]))).tolist()
        of_chosen = [rows[prompt] for prompt in inputs["chosen_lengths"].nonzero()[:, 0].tolist()]
        found = []
        for name, values in parts.items():
            bad = (~torch.isfinite(values.detach()).reshape(len(values), -1).all(1)).tolist()
            named = of_chosen if len(bad) == len(of_chosen) else rows
            if any(bad):
                bad_rows = dict.fromkeys(row for row, is_bad in zip(named, bad, strict=True) if is_bad)
                found.append(f"{name} of rows {list(bad_rows)}")
        where = "; ".join(found) or "none of its terms in this process: another process's, or the auxiliary loss"
        return (
            f"The loss at step {self.state.global_step} is {loss.item()}. Not finite: {where}. The rows of the batch are "
            f"{rows}. If the log-probabilities are not finite, the weights are not: lower `learning_rate`, set "
            "`max_grad_norm`, or train in bfloat16 or float32 instead of float16."
        )

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys: list[str] | None = None):
        inputs = self._decide_layout(model, self._prepare_inputs(inputs))
        inputs = counted(inputs, self.accelerator)
        parts = self._split(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            found = [self.compute_loss(model, part, return_outputs=True) for part in parts]
        loss, logps = join_parts(parts, found)
        if prediction_loss_only:
            return loss, None, None
        # `Trainer` knows how many rows there are of a dataset, but not of a stream
        mask = (inputs["completion_lengths"] > 0) & inputs["counts"].unsqueeze(1)
        labels = torch.zeros_like(mask, dtype=torch.long)
        labels[:, : inputs["chosen_lengths"].size(1)] = 1
        # -100 is what `Trainer` pads with where batches differ in their number of completions
        return loss, logps.masked_fill(~mask, -100), labels.masked_fill(~mask, -100)


def _check_dataset(dataset: Any, name: str) -> None:
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return  # TRL says what it takes
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"The {name} dataset has no rows.")
    columns = {"image", "images"} & first.keys()
    if columns:
        raise ValueError(
            f"The {name} dataset has the column {columns.pop()!r}: datasets with images are not supported yet. Remove "
            "the column to train on the text, or use `trl.DPOTrainer` with one rejected completion."
        )
