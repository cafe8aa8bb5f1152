"""The trainer that most tests here take."""

import pytest
from datasets import Dataset

from tests.trainer.helpers import perturb
from trl_dmpo import DMPOTrainer


@pytest.fixture
def build(model_path, tokenizer, make_args):
    """From rows and options to a trainer whose policy is no longer its reference."""

    def make(dataset, perturbed=True, model=None, trainer_options=None, **options):
        dataset = Dataset.from_list(dataset) if isinstance(dataset, list) else dataset
        trainer = DMPOTrainer(
            model or model_path(),
            args=make_args(**options),
            train_dataset=dataset,
            processing_class=tokenizer,
            **(trainer_options or {}),
        )
        if perturbed:
            perturb(trainer.model)
        return trainer

    return make
