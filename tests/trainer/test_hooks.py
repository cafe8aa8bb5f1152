"""The contract with TRL: runs against the lowest and the newest supported version."""

import ast
import importlib.metadata

import pytest
import trl
from packaging.specifiers import SpecifierSet

from tests.conftest import ROOT, make_rows
from trl_dmpo.trainer import hooks


def test_the_installed_trl_has_every_hook():
    assert hooks.missing_hooks() == []


def test_the_package_declares_the_versions_that_it_supports():
    requirements = importlib.metadata.requires("trl-dmpo")
    declared = next(r for r in requirements if r.startswith("trl"))
    assert SpecifierSet(declared.removeprefix("trl")) == SpecifierSet(hooks.SUPPORTED_TRL)
    assert SpecifierSet(hooks.SUPPORTED_TRL).contains(trl.__version__, prereleases=True)


@pytest.mark.parametrize(
    ("installed", "supported"), [("1.14.2", False), ("2.0.0", False), ("0.29.1", False), ("1.15.0", True)]
)
def test_unsupported_versions_give_one_import_error(installed, supported, monkeypatch):
    monkeypatch.setattr(hooks, "version", lambda name: installed)
    if supported:
        hooks.require_supported_trl()
        return
    with pytest.raises(ImportError, match=rf"supports trl>=1.15,<2, but trl=={installed} is installed. `pip install"):
        hooks.require_supported_trl()


def test_no_trl_at_all(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(hooks, "version", absent)
    with pytest.raises(ImportError, match="extends TRL, which is not installed"):
        hooks.require_supported_trl()


def test_a_hook_that_moved_is_named(monkeypatch):
    monkeypatch.delattr(trl.DPOTrainer, "compute_ref_log_probs")
    monkeypatch.setitem(hooks.FUNCTIONS, "trl.trainer.utils.no_such_function", "for this test")
    monkeypatch.setitem(hooks.TRAINER_ATTRIBUTES, "no_such_attribute", "for this test")
    with pytest.raises(ImportError, match=r"which lacks .*compute_ref_log_probs.*no_such_attribute.*no_such_function"):
        hooks.require_supported_trl()


def test_what_the_trainer_overrides_is_on_the_list():
    """An override of a method of TRL's that is not on the list would go unguarded."""
    from trl_dmpo import DMPOTrainer

    overridden = {
        name
        for name, value in vars(DMPOTrainer).items()
        if callable(value) and any(name in vars(base) for base in DMPOTrainer.__mro__[1:] if base is not object)
    } - {"__init__"}
    assert overridden == set(hooks.TRAINER_HOOKS)


def test_a_training_sets_what_is_restored(build):
    trainer = build(make_rows(2, 1), max_steps=1)
    trainer.train()
    assert all(hasattr(trainer, name) for name in hooks.TRAINING_STATE)


def test_private_imports_are_on_the_list():
    """What `src` imports from modules of TRL that it does not export at the top."""
    found = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trl."):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    by_the_trainer = {"trl.trainer.utils.add_fused_lm_head"}  # called by `DPOTrainer`, not imported here
    assert found == hooks.FUNCTIONS.keys() - by_the_trainer


def test_fused_head(model_path):
    import torch
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    model = AutoModelForCausalLM.from_pretrained(model_path())
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs"))
    ids = torch.tensor([[5, 6, 7]])
    inputs = {"fused_lm_head": True, "labels": ids, "shift_labels": torch.tensor([[6, 7, -100]])}
    assert inputs.keys() == set(hooks.FUSED_HEAD_ARGUMENTS)
    outputs = model(ids, **inputs)
    assert all(hasattr(outputs, name) for name in hooks.FUSED_HEAD_OUTPUTS)
    expected = model(ids).logits.log_softmax(-1)[0, [0, 1], [6, 7]]
    torch.testing.assert_close(outputs.log_probs[0], torch.cat([expected, torch.zeros(1)]), rtol=1e-4, atol=1e-4)
