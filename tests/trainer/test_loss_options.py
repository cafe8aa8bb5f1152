"""Rows with several chosen completions, with relevance, without a reference, and with selected negatives."""

import math

import pytest
import torch
from datasets import Dataset, IterableDataset

from tests.conftest import make_rows, not_interpreted
from tests.trainer.helpers import assert_same_step, first_step
from trl_dmpo import DataCollatorForMultiPreference


def several_rows() -> list[dict]:
    """2, 1 and 3 chosen completions, and 3, 4 and 1 rejected ones."""
    rows = []
    for row, count, k in zip(make_rows(3, 6), (2, 1, 3), (3, 4, 1), strict=True):
        completions = [row["chosen"], *row["rejected"]]
        rows.append({**row, "chosen": completions[:count], "rejected": completions[count : count + k]})
    return rows


def plain_logps(model, row: dict) -> tuple[list[float], list[float]]:
    """Log-probabilities of the chosen and the rejected completions of a tokenized row, one plain forward each."""

    def logp(completion):
        ids = torch.tensor([row["prompt_ids"] + completion])
        with torch.no_grad():
            logits = model(ids).logits.double().log_softmax(-1)
        return logits[0, :-1].gather(1, ids[0, 1:, None])[-len(completion) :].sum().item()

    return [logp(ids) for ids in row["chosen_ids"]], [logp(ids) for ids in row["rejected_ids"]]


def log_ratios(trainer) -> list[tuple[list[float], list[float]]]:
    found = []
    for row in trainer.train_dataset:
        policy, reference = (plain_logps(model, row) for model in (trainer.model, trainer.ref_model))
        found.append(
            tuple([p - r for p, r in zip(*each, strict=True)] for each in zip(policy, reference, strict=True))
        )
    return found


def dmpo_in_turn(chosen, rejected):
    mean = sum(rejected) / len(rejected)
    return sum(math.log1p(math.exp(-0.1 * (r - mean))) for r in chosen) / len(chosen)


def mult_dpo_by_hand(chosen, rejected):
    total = sum(math.exp(0.1 * r) for r in chosen + rejected)
    return -0.1 * sum(chosen) + len(chosen) * math.log(total)


class TestSeveralChosen:
    @pytest.mark.parametrize(("loss", "by_hand"), [("dmpo", dmpo_in_turn), ("mult_dpo", mult_dpo_by_hand)])
    @pytest.mark.parametrize("prefix_sharing", [True, False])
    def test_by_hand_from_plain_forwards(self, loss, by_hand, prefix_sharing, build):
        trainer = build(several_rows(), loss_type=[loss], prefix_sharing=prefix_sharing, per_device_train_batch_size=3)
        expected = [by_hand(*ratios) for ratios in log_ratios(trainer)]
        assert first_step(trainer)[0] == pytest.approx(sum(expected) / 3, abs=1e-5)

    @not_interpreted
    def test_a_list_of_one_is_one(self, build):
        rows = make_rows(3, [3, 1])
        lists = [{**row, "chosen": [row["chosen"]]} for row in rows]
        assert_same_step(*(first_step(build(each, per_device_train_batch_size=3)) for each in (rows, lists)))

    @not_interpreted
    @pytest.mark.parametrize(
        ("loss", "options"),
        [("dmpo", {}), ("dmpo", {"use_weighting": True}), ("plackett_luce", {}), ("bco_pair", {})],
    )
    def test_losses_of_one_take_each_in_turn(self, loss, options, build):
        """A row of several chosen completions is the mean of rows of one."""
        rows = several_rows()
        together = first_step(build(rows, loss_type=[loss], per_device_train_batch_size=3, **options))[0]
        means = []
        for row in rows:
            alone = [{**row, "chosen": chosen} for chosen in row["chosen"]]
            trainer = build(alone, loss_type=[loss], per_device_train_batch_size=len(alone), **options)
            means.append(first_step(trainer)[0])
        assert together == pytest.approx(sum(means) / 3, abs=1e-5)

    def test_sft_counts_all_tokens_of_the_chosen(self, build):
        trainer = build(several_rows(), loss_type=["sft"], per_device_train_batch_size=3)
        logps = [plain_logps(trainer.model, row)[0] for row in trainer.train_dataset]
        tokens = sum(len(ids) for row in trainer.train_dataset for ids in row["chosen_ids"])
        assert first_step(trainer)[0] == pytest.approx(-sum(map(sum, logps)) / tokens, abs=1e-5)

    @pytest.mark.parametrize("loss", ["dmpo", "mult_dpo"])
    def test_precomputed_equals_live(self, loss, build):
        options = {"loss_type": [loss], "per_device_train_batch_size": 3}
        live = build(several_rows(), **options)
        computed = build(several_rows(), precompute_ref_log_probs=True, precompute_ref_batch_size=2, **options)
        assert_same_step(first_step(live), first_step(computed))

    def test_precomputed_of_lists_of_one(self, build):
        """As many rejected completions as rows: shapes that do not fit would be broadcast."""
        rows = [{**row, "chosen": [row["chosen"]]} for row in make_rows(2, 2)]
        live, computed = build(rows), build(rows, precompute_ref_log_probs=True)
        assert_same_step(first_step(live), first_step(computed))

    def test_metrics_are_means_over_prompts(self, build):
        trainer = build(several_rows(), per_device_eval_batch_size=3, ranking_k=[1])
        metrics = trainer.evaluate(Dataset.from_list(several_rows()))
        hits, violations, changes = [], [], []
        for row, (chosen, _) in zip(trainer.train_dataset, log_ratios(trainer), strict=True):
            liked, others = plain_logps(trainer.model, row)
            hits.append(sum(all(each > other for other in others) for each in liked) / len(liked))
            violations.append(sum(o >= each for each in liked for o in others) / (len(liked) * len(others)))
            changes.append(sum(chosen) / len(chosen))
        assert metrics["eval_ranking/hit_rate@1"] == pytest.approx(sum(hits) / 3, abs=1e-6)
        assert metrics["eval_negatives/violations"] == pytest.approx(sum(violations) / 3, abs=1e-6)
        assert metrics["eval_logps/chosen_change"] == pytest.approx(sum(changes) / 3, abs=1e-4)

    def test_labels_for_compute_metrics(self, build):
        given = {}

        def compute_metrics(prediction):
            given["labels"] = prediction.label_ids.tolist()
            return {}

        trainer = build(
            several_rows(), trainer_options={"compute_metrics": compute_metrics}, per_device_eval_batch_size=3
        )
        trainer.evaluate(Dataset.from_list(several_rows()))
        x = -100
        assert given["labels"] == [[1, 1, x, 0, 0, 0, x], [1, x, x, 0, 0, 0, 0], [1, 1, 1, 0, x, x, x]]

    def test_batch(self):
        examples = [
            {"prompt_ids": [1, 2], "chosen_ids": [[3], [4, 5]], "rejected_ids": [[6]], "relevance": [2, 1, 0.5]},
            {"prompt_ids": [1], "chosen_ids": [[7]], "rejected_ids": [[8], [9]], "relevance": None},
        ]
        batch = DataCollatorForMultiPreference(pad_token_id=0)(examples)
        assert batch["chosen_lengths"].tolist() == [[1, 2], [1, 0]]
        assert batch["completion_lengths"].tolist() == [[1, 2, 1, 0], [1, 0, 1, 1]]
        assert batch["relevance"].tolist() == [[2, 1, 0.5, 0], [1, 0, 0, 0]]
        assert (batch["completion_positions"][1, 1] == -1).all()

    def test_relevance_goes_with_the_drawn_negatives(self):
        collator = DataCollatorForMultiPreference(pad_token_id=0, num_negatives=3)
        ids = [[10 + index] for index in range(8)]
        example = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": ids, "row_index": 0}
        batch = collator([{**example, "relevance": [100, *range(10, 18)]}])
        drawn = [target for target in batch["targets"][0].tolist() if target >= 10]
        assert batch["relevance"].tolist() == [[100, *drawn]]
        assert len(drawn) == 3

    @not_interpreted
    def test_implicit_prompt(self, build):
        rows = several_rows()
        implicit = [
            {name: [row["prompt"] + text for text in row[name]] for name in ("chosen", "rejected")} for row in rows
        ]
        options = {"loss_type": ["mult_dpo"], "per_device_train_batch_size": 3}
        assert_same_step(first_step(build(rows, **options)), first_step(build(implicit, **options)))


class TestRelevance:
    def test_lipo_from_a_column(self, build):
        """One rejected completion: |2^3 - 2^1| |1/log 2 - 1/log 3| σ-loss; the ranks are those of the log-ratios."""
        rows = [{**row, "relevance": [3.0, 1.0]} for row in make_rows(2, 1)]
        trainer = build(rows, loss_type=["lipo"])
        margins = []
        for row in trainer.train_dataset:
            row = {**row, "chosen_ids": [row["chosen_ids"]]}
            policy, reference = (plain_logps(model, row) for model in (trainer.model, trainer.ref_model))
            margins.append(policy[0][0] - reference[0][0] - policy[1][0] + reference[1][0])
        weight = 6 * (1 / math.log(2) - 1 / math.log(3))
        expected = sum(weight * math.log1p(math.exp(-0.1 * margin)) for margin in margins) / 2
        assert first_step(trainer)[0] == pytest.approx(expected, abs=1e-4)

    @not_interpreted
    @pytest.mark.parametrize("relevance", ["high", [1.0]], ids=str)
    @pytest.mark.parametrize(
        "options", [{"precompute_ref_log_probs": True}, {"remove_unused_columns": False}], ids=str
    )
    def test_ignored_where_no_loss_uses_it(self, relevance, options, build):
        rows = [{**row, "relevance": relevance} for row in make_rows(2, 2)]
        assert_same_step(first_step(build(rows, **options)), first_step(build(make_rows(2, 2))))


ROW = {"prompt": "Next:", "chosen": " Aliens", "rejected": [" Heat", " Big"]}


class TestRowsThatDoNotFitTheLoss:
    @pytest.mark.parametrize(
        ("change", "options", "message"),
        [
            ({}, {"loss_type": ["lipo"]}, r"column 'relevance': the loss needs it"),
            (
                {"relevance": [31, 1, 0]},
                {"loss_type": ["lipo"]},
                "2 to the power of it, and 31 is above 30; use grades",
            ),
            (
                {"relevance": [4, 3, 1, 2], "rejected": [" Heat", " Big", " Babe"]},
                {"loss_type": ["plackett_luce"], "plackett_luce_places": 2, "num_negatives": 2},
                "order of preference, but rejected entry 1 has 1",
            ),
            ({"relevance": [1]}, {"loss_type": ["nca"]}, "1 entries for 1 chosen and 2 rejected completions"),
            (
                {"relevance": [3, 1, 2]},
                {"loss_type": ["plackett_luce"]},
                "needs the completions in order of preference, but rejected entry 0 has 1",
            ),
            (
                {"relevance": [1, 1, 0]},
                {"loss_type": ["plackett_luce"], "plackett_luce_places": 1},
                "order of preference, but the chosen completion has 1",
            ),
            (
                {},
                {"negative_selection": "hardest", "num_hard_negatives": 3},
                r"column 'rejected': there are 2, fewer than `num_hard_negatives=3`",
            ),
            ({"chosen": [" Aliens", " Jaws"]}, {"ld_alpha": 0.5}, "`ld_alpha` is for one chosen completion"),
        ],
    )
    @pytest.mark.parametrize("streaming", [False, True], ids=["stored", "stream"])
    def test_raise_names_the_place(self, change, options, message, streaming, build):
        dataset = (
            IterableDataset.from_generator(lambda: iter([{**ROW, **change}])) if streaming else [{**ROW, **change}]
        )
        with pytest.raises(ValueError, match=rf"train\[0\], .*{message}"):
            build(dataset, **options).train()

    def test_places_beyond_those_that_count_may_be_tied(self, build):
        rows = [{**ROW, "relevance": [3, 1, 1]}] * 2
        ranked = build(rows, loss_type=["plackett_luce"], plackett_luce_places=1)
        assert_same_step(first_step(ranked), first_step(build(rows, loss_type=["sdpo"])))

    def test_mult_dpo_without_lists_says_that_it_is_sdpo(self, build, caplog):
        build([ROW] * 2, loss_type=["mult_dpo"])
        assert "No row has several chosen completions: `mult_dpo` is `sdpo` with one" in caplog.text


class TestReferenceFree:
    @pytest.mark.parametrize("streaming", [False, True], ids=["stored", "stream"])
    def test_the_released_code_of_the_paper(self, streaming, build):
        """-log σ(β (log π(y_w) - log π(y_l))) - log π(y_w): its chosen reference is passed twice, and cancels."""
        rows = make_rows(2, 3)
        trainer = build(
            IterableDataset.from_generator(lambda: iter(rows)) if streaming else rows,
            loss_type=["sigmoid", "sft"],
            loss_weights=[1.0, 1.0],
            reference_free=True,
        )
        assert trainer.ref_model is None
        losses, nll, tokens = [], 0.0, 0
        for row in trainer.train_dataset:
            (chosen,), rejected = plain_logps(trainer.model, {**row, "chosen_ids": [row["chosen_ids"]]})
            losses.append(sum(math.log1p(math.exp(-0.1 * (chosen - r))) for r in rejected) / len(rejected))
            nll, tokens = nll - chosen, tokens + len(row["chosen_ids"])
        assert first_step(trainer)[0] == pytest.approx(sum(losses) / 2 + nll / tokens, abs=1e-5)
        assert "logps/chosen_change" not in trainer._metrics["train"]

    def test_trains_and_evaluates_without_one(self, build):
        trainer = build(make_rows(4, 2), reference_free=True, per_device_eval_batch_size=3)
        trainer.compute_ref_log_probs = None
        trainer.train()
        losses = []
        for row in build(make_rows(3, 2), model=trainer.model, perturbed=False).train_dataset:
            (chosen,), rejected = plain_logps(trainer.model, {**row, "chosen_ids": [row["chosen_ids"]]})
            losses.append(math.log1p(math.exp(-0.1 * (chosen - sum(rejected) / 2))))
        loss = trainer.evaluate(Dataset.from_list(make_rows(3, 2)))["eval_loss"]
        assert loss == pytest.approx(sum(losses) / 3, abs=1e-5)
        assert not trainer.args.precompute_ref_log_probs

    def test_a_reference_model_is_refused(self, build, model_path):
        from transformers import AutoModelForCausalLM

        reference = AutoModelForCausalLM.from_pretrained(model_path())
        with pytest.raises(ValueError, match="has no use for a `ref_model`"):
            build(make_rows(2, 2), reference_free=True, trainer_options={"ref_model": reference})


class TestSelection:
    @pytest.mark.parametrize("prefix_sharing", [True, False])
    def test_the_hardest_alone_are_learned_from(self, prefix_sharing, build):
        rows = make_rows(3, [4, 6, 3])
        options = {"prefix_sharing": prefix_sharing, "per_device_train_batch_size": 3}
        trainer = build(rows, negative_selection="hardest", num_hard_negatives=2, **options)
        kept = []
        for row, tokens in zip(rows, trainer.train_dataset, strict=True):
            _, rejected = plain_logps(trainer.model, {**tokens, "chosen_ids": [tokens["chosen_ids"]]})
            hardest = sorted(range(len(rejected)), key=rejected.__getitem__)[-2:]
            kept.append({**row, "rejected": [row["rejected"][index] for index in hardest]})
        assert_same_step(first_step(trainer), first_step(build(kept, **options)))

    @not_interpreted
    def test_of_several_chosen(self, build):
        """Boundary selection is another for each chosen completion; a list of all has those of any of them."""
        rows = several_rows()
        trainer = build(rows, loss_type=["mult_dpo"], negative_selection="boundary", per_device_train_batch_size=3)
        kept = []
        for row, tokens in zip(rows, trainer.train_dataset, strict=True):
            chosen, rejected = plain_logps(trainer.model, tokens)
            above = [index for index, value in enumerate(rejected) if value >= min(chosen)]
            kept.append({**row, "rejected": [row["rejected"][index] for index in above]})
        assert all(row["rejected"] for row in kept), "rows without a violation would need the clustering"
        expected = build(kept, loss_type=["mult_dpo"], per_device_train_batch_size=3)
        assert_same_step(first_step(trainer), first_step(expected))

    @not_interpreted
    def test_metrics_are_over_all(self, build):
        logged = []
        for options in ({}, {"negative_selection": "hardest", "num_hard_negatives": 1}):
            trainer = build(make_rows(3, 4), per_device_eval_batch_size=3, **options)
            logged.append(trainer.evaluate(Dataset.from_list(make_rows(3, 4))))
        assert logged[0]["eval_rewards/margins"] == pytest.approx(logged[1]["eval_rewards/margins"])
        assert logged[0]["eval_loss"] != pytest.approx(logged[1]["eval_loss"], abs=1e-4)
