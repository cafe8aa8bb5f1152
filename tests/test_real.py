"""A real model on rows of published files. Skipped where neither is present."""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import SHARED, not_interpreted
from tests.trainer.test_layouts_agree import leak
from trl_dmpo import DMPOTrainer, Scorer
from trl_dmpo.data.formats import load_rows
from trl_dmpo.ranking.evaluate import score_rows
from trl_dmpo.ranking.models import load_model
from trl_dmpo.ranking.rows import load_ranking_rows


ASSETS = Path(os.environ.get("TRL_DMPO_ASSETS", Path.home() / ".cache" / "trl-dmpo-assets"))
SMOLLM2 = ASSETS / "SmolLM2-135M-Instruct"
FILES = {"llara": SHARED / "data/llara/lastfm_val.json", "dmpo": SHARED / "data/dmpo/ml_1m_dpo_5.json"}

pytestmark = [
    not_interpreted,
    pytest.mark.real,
    pytest.mark.slow,
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


@pytest.mark.parametrize(("name", "count"), [("llara/lastfm_val.json", 20), ("dmpo/ml_1m_eval.json", 2)])
def test_a_real_model_ranks_real_rows_exactly(name, count):
    rows = load_ranking_rows(SHARED / "data" / name, max_rows=1)
    model, tokenizer = load_model(SMOLLM2, dtype="float32", device="cpu")
    scorer = Scorer(model, tokenizer)
    for prompt, candidates, scores in zip(rows.prompts, rows.candidates, score_rows(scorer, rows), strict=True):
        assert len(candidates) == len(scores) == count
        for candidate, score in list(zip(candidates, scores, strict=True))[:3]:
            ids = torch.tensor([tokenizer(prompt + candidate + tokenizer.eos_token)["input_ids"]])
            with torch.no_grad():
                plain = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
            assert score == pytest.approx(plain[len(tokenizer(prompt)["input_ids"]) - 1 :].sum().item(), abs=1e-3)
    assert scorer._shares


@pytest.mark.parametrize("leaks", [False, True], ids=["right mask", "wrong mask"])
def test_what_a_real_model_rounds_away_in_half_precision_is_no_leak(leaks, make_args, monkeypatch):
    """
    Kernels may round the same for a prompt that is laid out alone, in either layout, and otherwise for a shared batch,
    which has another shape.
    """
    if leaks:
        monkeypatch.setattr("trl_dmpo.trainer.attention._mask", leak)
    rows = load_rows(FILES["llara"]).select(range(4, 8))
    model = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.bfloat16)
    trainer = DMPOTrainer(model, args=make_args(reference_free=True, num_negatives=5), train_dataset=rows)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    trainer._decide_layout(trainer.model, batch)
    assert trainer._sharing_is_exact is (not leaks)
