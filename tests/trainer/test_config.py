import copy
import pickle
import subprocess
import sys
from dataclasses import fields

import pytest
from trl import DPOConfig, TrlParser

from trl_dmpo import DMPOConfig


def make(**options) -> DMPOConfig:
    return DMPOConfig("out", bf16=False, report_to="none", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "dmqo"}, r"Unknown `loss_type` 'dmqo'. Did you mean 'dmpo'\? It is one of: aot"),
        ({"loss_type": ["sft", "xyz"]}, "Unknown `loss_type` 'xyz'. It is one of"),
        (
            {"loss_type": [lambda scores, config: scores]},
            "cannot be saved in a checkpoint. Define the loss as a function",
        ),
        ({"prefix_sharing": "maybe"}, "`prefix_sharing` must be 'auto', True or False, got 'maybe'"),
        ({"num_negatives": 0}, "`num_negatives` must be at least 1, got 0. Leave it out"),
        ({"on_invalid_row": "skip"}, "`on_invalid_row` must be 'raise' or 'drop', got 'skip'"),
        ({"ranking_k": []}, "`ranking_k` must be cut-offs of at least 1"),
        ({"ranking_k": [0, 5]}, "`ranking_k` must be cut-offs of at least 1"),
        (
            {"loss_type": "bco_pair", "f_divergence_type": "js_divergence"},
            "Got bco_pair; use `f_divergence_type='reverse_kl'`",
        ),
        ({"loss_weights": [1.0, 2.0]}, "`loss_weights` must have the same length"),
        ({"negative_selection": "random"}, "must be 'all', 'hardest' or 'boundary', got 'random'"),
        ({"negative_selection": "hardest"}, "go together: set both, such as 'hardest' and 4, or neither"),
        ({"num_hard_negatives": 3}, "go together.* got 'all' and 3"),
        (
            {"negative_selection": "hardest", "num_hard_negatives": 0},
            "`num_hard_negatives` must be a whole number of at least 1, got 0",
        ),
        (
            {"negative_selection": "hardest", "num_hard_negatives": 4, "num_negatives": 3},
            "`num_hard_negatives=4` asks for more than the `num_negatives=3` that are drawn",
        ),
        ({"dynamic_beta": True}, "set `negative_selection` to 'boundary', as DynamicPO does"),
        (
            {"dynamic_beta": True, "negative_selection": "boundary", "loss_type": ["dmpo", "ipo", "mult_dpo"]},
            "functions of reward margins: discopop, dmpo, .* Got ipo, mult_dpo",
        ),
        ({"reference_free": True, "loss_type": "nca"}, "makes no sense with nca, .*Use one of: .*dmpo"),
        (
            {"reference_free": True, "precompute_ref_log_probs": True},
            "`precompute_ref_log_probs` is about a reference",
        ),
        ({"reference_free": True, "sync_ref_model": True}, "`sync_ref_model` is about a reference"),
        (
            {"reference_free": True, "f_divergence_type": "forward_kl"},
            "`f_divergence_type='forward_kl'` is about a ref",
        ),
        ({"negative_selection": "boundary", "loss_type": "sft"}, "`negative_selection` has nothing to select"),
        (
            {"negative_selection": "boundary", "dynamic_beta": True, "dynamic_beta_margin": float("nan")},
            "`dynamic_beta_margin` must be a finite number, got nan",
        ),
        ({"plackett_luce_places": 1.5}, "`plackett_luce_places` must be a whole number of at least 1, got 1.5"),
        ({"nca_alpha": 0}, "`nca_alpha` must be above 0, got 0"),
        ({"nca_alpha": float("nan")}, "`nca_alpha` must be above 0, got nan"),
        ({"plackett_luce_places": 0}, "`plackett_luce_places` must be a whole number of at least 1, got 0"),
        (
            {"loss_type": "plackett_luce", "ld_alpha": 0.5},
            "`ld_alpha` is about the pairs .* plackett_luce is no loss of",
        ),
        (
            {"loss_type": ["sft", "lipo"], "use_weighting": True},
            "`use_weighting` is about the pairs .* lipo is no loss of",
        ),
    ],
)
def test_a_wrong_option_says_what_to_write(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("given", "kept"), [("auto", "auto"), (True, True), ("true", True), (False, False), ("False", False)]
)
def test_prefix_sharing_from_python_and_from_strings(given, kept):
    assert make(prefix_sharing=given).prefix_sharing is kept


def test_other_defaults_than_trls():
    ours, theirs = make(), DPOConfig("out", bf16=False, report_to="none")
    differ = {each.name for each in fields(DPOConfig) if getattr(ours, each.name) != getattr(theirs, each.name)}
    # Of the last, `dispatch_batches`: see `_check_dispatch`
    assert differ == {"loss_type", "beta", "accelerator_config"}
    assert (ours.loss_type, ours.beta, ours.accelerator_config.dispatch_batches) == (["dmpo"], 1.0, False)


def test_from_the_command_line():
    (config,) = TrlParser([DMPOConfig]).parse_args_and_config(
        [
            "--output_dir",
            "out",
            "--bf16",
            "false",
            "--loss_type",
            "dmpo",
            "sft",
            "--loss_weights",
            "1",
            "0.5",
            "--prefix_sharing",
            "false",
            "--num_negatives",
            "4",
            "--on_invalid_row",
            "drop",
            "--ranking_k",
            "1",
            "20",
            "--f_divergence_type",
            "js_divergence",
            *("--negative_selection", "boundary", "--dynamic_beta", "--dynamic_beta_margin", "6"),
            *("--nca_alpha", "1", "--plackett_luce_places", "3"),
        ]
    )
    assert (config.negative_selection, config.dynamic_beta, config.dynamic_beta_margin) == ("boundary", True, 6.0)
    assert (config.nca_alpha, config.plackett_luce_places, config.reference_free) == (1.0, 3, False)
    assert (config.loss_type, config.loss_weights) == (["dmpo", "sft"], [1.0, 0.5])
    assert config.prefix_sharing is False
    assert (config.num_negatives, config.on_invalid_row, config.ranking_k) == (4, "drop", [1, 20])


def test_from_yaml(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("output_dir: out\nbf16: false\nloss_type: [sdpo]\nprefix_sharing: true\nranking_k: [3]\n")
    (config,) = TrlParser([DMPOConfig]).parse_args_and_config(["--config", str(path)])
    assert (config.loss_type, config.prefix_sharing, config.ranking_k) == (["sdpo"], True, [3])


def test_defaults():
    config = make()
    assert (config.loss_type, config.prefix_sharing, config.num_negatives) == (["dmpo"], "auto", None)
    assert (config.on_invalid_row, config.ranking_k) == ("raise", [1, 5, 10])
    assert (config.negative_selection, config.num_hard_negatives, config.dynamic_beta) == ("all", None, False)
    assert (config.reference_free, config.nca_alpha, config.plackett_luce_places) == (False, 1e-3, None)


def test_importing_the_package_imports_nothing_else():
    code = "import sys, trl_dmpo; print([m for m in ('torch', 'trl', 'transformers', 'datasets', 'numpy') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_importing_the_data_package_imports_no_torch():
    code = "import sys, trl_dmpo.data.schema; print([m for m in ('torch', 'trl', 'transformers') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_unknown_names_are_attribute_errors():
    import trl_dmpo

    assert "DMPOTrainer" in dir(trl_dmpo)
    with pytest.raises(AttributeError, match="has no attribute 'DMPOTrainr'"):
        trl_dmpo.DMPOTrainr  # noqa: B018


@pytest.mark.parametrize(
    ("copied", "kept"),
    [(copy.copy, "secret"), (copy.deepcopy, "secret"), (lambda args: pickle.loads(pickle.dumps(args)), None)],
)
def test_what_is_written_has_no_token_and_what_is_copied_keeps_it(make_args, copied, kept):
    args = make_args(model_init_kwargs={"token": "secret", "revision": "main"}, beta=0.3)
    args.hub_token = "secret"
    other = copied(args)
    assert other.hub_token == kept
    assert other.model_init_kwargs == {"revision": "main"} | ({"token": kept} if kept else {})
    assert other.beta == 0.3
    assert type(other) is type(args)
    other.beta = 1.0
    assert args.beta == 0.3
    assert args.hub_token == "secret"
