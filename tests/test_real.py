"""A real model on rows of published files. Skipped where neither is present."""

import os
from pathlib import Path

import pytest
import torch

from tests.conftest import SHARED, not_interpreted
from trl_dmpo import DMPOTrainer
from trl_dmpo.data.formats import load_rows


ASSETS = Path(os.environ.get("TRL_DMPO_ASSETS", Path.home() / ".cache" / "trl-dmpo-assets"))
SMOLLM2 = ASSETS / "SmolLM2-135M-Instruct"
FILES = {"llara": SHARED / "data/llara/lastfm_val.json", "dmpo": SHARED / "data/dmpo/ml_1m_dpo_5.json"}

pytestmark = [
    not_interpreted,
    pytest.mark.real,
    pytest.mark.skipif(not SMOLLM2.exists(), reason="SmolLM2-135M-Instruct is absent: run real_assets.py smollm2"),
    pytest.mark.skipif(not all(map(Path.exists, FILES.values())), reason="the published data files are absent"),
]


@pytest.mark.parametrize(("name", "negatives"), [("llara", 19), ("dmpo", 1)])
def test_a_real_model_scores_real_rows_exactly(name, negatives, make_args):
    rows = load_rows(FILES[name], chat=True).select(range(4))
    assert len(rows[0]["rejected"]) == negatives
    trainer = DMPOTrainer(str(SMOLLM2), args=make_args(max_steps=1, learning_rate=1e-5), train_dataset=rows)
    row = trainer.train_dataset[0]
    batch = trainer.data_collator([row])
    with torch.no_grad():
        logps = trainer._token_logps(trainer.model, trainer._decide_layout(trainer.model, batch)).sum(-1)[0]
        for completion, value in list(zip([row["chosen_ids"], *row["rejected_ids"]], logps, strict=True))[:3]:
            ids = torch.tensor([row["prompt_ids"] + completion])
            plain = trainer.model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
            torch.testing.assert_close(value, plain[-len(completion) :].sum(), rtol=1e-4, atol=1e-3)
    assert trainer._sharing_is_exact
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert trainer.state.log_history[0]["grad_norm"] > 0
