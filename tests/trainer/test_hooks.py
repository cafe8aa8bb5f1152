"""The contract with TRL: runs against the lowest and the newest supported version."""

import importlib.metadata

import pytest
import trl
from packaging.specifiers import SpecifierSet

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
