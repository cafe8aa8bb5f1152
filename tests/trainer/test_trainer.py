"""What `DMPOTrainer` takes, does and says."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig
from transformers.utils import logging as transformers_logging
from trl import DPOConfig

from tests.conftest import make_dataset, make_rows
from tests.trainer.helpers import assert_same_step, first_step
from trl_dmpo import DataCollatorForMultiPreference, DMPOTrainer


def conversational(row: dict) -> dict:
    def messages(text):
        return [{"role": "assistant", "content": text}]

    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": messages(row["chosen"]),
        "rejected": [messages(text) for text in row["rejected"]],
    }


def implicit(row: dict) -> dict:
    prompt = row["prompt"]
    return {"chosen": prompt + row["chosen"], "rejected": [prompt + text for text in row["rejected"]]}


def implicit_conversation(row: dict) -> dict:
    row = conversational(row)
    return {
        "chosen": row["prompt"] + row["chosen"],
        "rejected": [row["prompt"] + messages for messages in row["rejected"]],
    }


class TestRows:
    @pytest.mark.parametrize("form", [conversational, implicit_conversation], ids=["explicit", "implicit"])
    def test_conversations(self, form, build, tokenizer):
        rows = make_rows(4, [3, 1])
        trainer = build([form(row) for row in rows], per_device_train_batch_size=4)
        example = trainer.train_dataset[0]
        assert tokenizer.decode(example["prompt_ids"]) == f"<|user|>{rows[0]['prompt']}<|end|><|assistant|>"
        assert tokenizer.decode(example["chosen_ids"]) == f"{rows[0]['chosen']}<|end|>"
        assert [tokenizer.decode(ids) for ids in example["rejected_ids"]] == [
            f"{t}<|end|>" for t in rows[0]["rejected"]
        ]
        first_step(trainer)

    def test_implicit_prompt_is_the_explicit_one(self, build):
        rows = make_rows(4, [3, 1])
        explicit = build(rows, per_device_train_batch_size=4)
        found = build([implicit(row) for row in rows], per_device_train_batch_size=4)
        assert found.train_dataset["prompt_ids"][:] == explicit.train_dataset["prompt_ids"][:]
        assert_same_step(first_step(found), first_step(explicit))

    def test_bare_rejected_is_one(self, build):
        rows = make_rows(4, 1)
        bare = build([{**row, "rejected": row["rejected"][0]} for row in rows])
        assert bare.train_dataset["rejected_ids"][:] == build(rows).train_dataset["rejected_ids"][:]

    def test_bare_rejected_conversation_is_one(self, build):
        rows = [conversational(row) for row in make_rows(4, 1)]
        bare = build([{**row, "rejected": row["rejected"][0]} for row in rows])
        assert bare.train_dataset["rejected_ids"][:] == build(rows).train_dataset["rejected_ids"][:]

    def test_stream(self, build):
        rows = make_rows(8, [3, 1])
        stream = IterableDataset.from_generator(lambda: iter(rows))
        streamed, stored = build(stream, max_steps=3), build(rows, max_steps=3)
        batch = next(iter(streamed.get_train_dataloader()))
        assert batch["row_index"].tolist() == [0, 1]
        torch.testing.assert_close(
            batch["input_ids"], stored.data_collator([stored.train_dataset[0], stored.train_dataset[1]])["input_ids"]
        )
        streamed.train()
        assert streamed.state.global_step == 3

    def test_dict_of_evaluation_sets(self, build):
        evaluation = {"films": make_dataset(4, 3, seed=1), "books": make_dataset(3, [1, 2], seed=2)}
        trainer = build(
            make_dataset(4, 3), trainer_options={"eval_dataset": evaluation}, eval_strategy="steps", eval_steps=1
        )
        trainer.train()
        logged = {name for entry in trainer.state.log_history for name in entry}
        # As TRL has it, only the loss has the name of the set in its key
        assert {"eval_films_loss", "eval_books_loss", "eval_rewards/margins", "eval_ranking/mrr"} <= logged

    def test_dataset_dict_for_evaluation(self, build):
        evaluation = DatasetDict({"test": make_dataset(2, 2)})
        trainer = build(make_dataset(4, 3), trainer_options={"eval_dataset": evaluation})
        assert "eval_test_loss" in trainer.evaluate()

    def test_evaluate_on_a_raw_dataset(self, build):
        trainer = build(make_dataset(4, 3), eval_strategy="no")
        metrics = trainer.evaluate(make_dataset(3, [2, 4], seed=5))
        assert metrics["eval_loss"] > 0
        assert 0 < metrics["eval_ranking/mrr"] <= 1

    def test_loss_of_a_batch_is_the_mean_over_prompts(self, build):
        """Whatever the number of rejected completions, and whatever else is in the batch."""
        rows = make_rows(4, [1, 6, 3, 2])
        alone = [first_step(build([row], per_device_train_batch_size=1))[0] for row in rows]
        together = first_step(build(rows, per_device_train_batch_size=4))[0]
        assert together == pytest.approx(sum(alone) / 4, abs=1e-5)
        trainer = build(rows, per_device_eval_batch_size=3)
        assert trainer.evaluate(Dataset.from_list(rows))["eval_loss"] == pytest.approx(together, abs=1e-5)

    @pytest.mark.parametrize("loss_type", ["dmpo", "sdpo"])
    @pytest.mark.parametrize("prefix_sharing", [True, False])
    def test_by_hand_in_float64(self, loss_type, prefix_sharing, build):
        """Loss from log-probabilities of plain forwards, one completion at a time."""
        trainer = build(
            make_rows(3, [4, 1, 2]),
            loss_type=[loss_type],
            prefix_sharing=prefix_sharing,
            per_device_train_batch_size=3,
        )
        got, _ = first_step(trainer)
        models = [model.double() for model in (trainer.model, trainer.ref_model)]
        expected = []
        for row in trainer.train_dataset:
            ratios = []
            for completion in [row["chosen_ids"], *row["rejected_ids"]]:
                ids = torch.tensor([row["prompt_ids"] + completion])
                with torch.no_grad():
                    policy, reference = (
                        model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[-len(completion) :].sum()
                        for model in models
                    )
                ratios.append(policy - reference)
            chosen, *rejected = ratios
            if loss_type == "dmpo":
                expected.append(torch.log1p(torch.exp(-0.1 * (chosen - sum(rejected) / len(rejected)))))
            else:
                expected.append(torch.log1p(sum(torch.exp(0.1 * (r - chosen)) for r in rejected)))
        assert got == pytest.approx((sum(expected) / 3).item(), abs=1e-5)

    def test_padding_and_order_of_negatives_do_not_matter(self, build):
        rows = make_rows(3, [4, 1, 6])
        backwards = [{**row, "rejected": row["rejected"][::-1]} for row in rows]
        plain = first_step(build(rows, per_device_train_batch_size=3))
        assert_same_step(plain, first_step(build(backwards, per_device_train_batch_size=3)))
        assert_same_step(plain, first_step(build(rows, per_device_train_batch_size=3, pad_to_multiple_of=64)))


class TestTitles:
    """Texts that have broken other trainers: the log-probabilities are those of a plain forward all the same."""

    def assert_plain_logps(self, trainer, index=0):
        batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[index]]))
        logps = trainer._token_logps(trainer.model, trainer._decide_layout(trainer.model, batch)).sum(-1)[0]
        row = trainer.train_dataset[index]
        for completion, value in zip([row["chosen_ids"], *row["rejected_ids"]], logps, strict=True):
            ids = torch.tensor([row["prompt_ids"] + completion])
            plain = trainer.model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
            torch.testing.assert_close(value, plain[-len(completion) :].sum(), rtol=1e-5, atol=1e-4)

    def test_pad_token_in_a_title(self, build):
        row = {"prompt": "Next:", "chosen": " <|pad|>", "rejected": [" <|pad|><|pad|> Heat", " Big"]}
        self.assert_plain_logps(build([row] * 2))

    def test_titles_that_are_prefixes_of_one_another(self, build):
        self.assert_plain_logps(
            build([{"prompt": "Next:", "chosen": " Alien", "rejected": [" Aliens", " Alien 3", " A"]}] * 2)
        )

    def test_titles_beyond_ascii(self, build):
        self.assert_plain_logps(
            build([{"prompt": "次は", "chosen": "東京物語", "rejected": ["Amélie", "🎬", "Léon\n\n{x}"]}] * 2)
        )

    def test_tokens_that_merge_across_the_end_of_the_prompt(self, build, tokenizer, caplog):
        transformers_logging.warning_once.cache_clear()  # another test may have had the warning
        # " A" is one token: the space at the end of the prompt goes with it
        row = {"prompt": "Next: ", "chosen": "Alien", "rejected": ["Aliens", "Amélie"]}
        trainer = build([row] * 2)
        assert tokenizer.decode(trainer.train_dataset[0]["prompt_ids"]) == "Next:"
        assert tokenizer.decode(trainer.train_dataset[0]["chosen_ids"]) == " Alien<|endoftext|>"
        assert "The tokenized prompt is not a prefix" in caplog.text
        self.assert_plain_logps(trainer)

    def test_empty_prompt(self, build):
        trainer = build([{"prompt": "", "chosen": "Alien", "rejected": ["Heat", "Big"]}] * 2)
        row = trainer.train_dataset[0]
        assert row["prompt_ids"] == []
        batch = trainer.data_collator([row])
        got = trainer._token_logps(trainer.model, batch)[0, 0].sum()
        ids = torch.tensor([row["chosen_ids"]])
        plain = trainer.model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).sum()
        torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-4)


BAD_ROWS = {
    "no rejected": ({"rejected": []}, "rejected", "the list is empty"),
    "blank completion": ({"chosen": "  "}, "chosen", "is blank"),
    "chosen among rejected": (
        {"rejected": [" Heat", " Aliens"]},
        "rejected",
        "entry 1 is the chosen completion ' Aliens'",
    ),
    "repeated rejected": ({"rejected": [" Heat", " Big", " Heat"]}, "rejected", "entries 0 and 2 are both ' Heat'"),
    "no value": ({"chosen": None}, "chosen", "the value is None"),
}


class TestBadRows:
    good = {"prompt": "Next:", "chosen": " Aliens", "rejected": [" Heat", " Big"]}

    @pytest.mark.parametrize("reason", BAD_ROWS)
    @pytest.mark.parametrize("streaming", [False, True], ids=["stored", "stream"])
    def test_raise_names_the_place(self, reason, streaming, build):
        change, column, detail = BAD_ROWS[reason]
        rows = [self.good, self.good, {**self.good, **change}, self.good]
        dataset = IterableDataset.from_generator(lambda: iter(rows)) if streaming else rows
        with pytest.raises(
            ValueError, match=rf"train\[2\], column '{column}': .*{detail}.*on_invalid_row='drop'"
        ) as error:
            build(dataset).train()
        if not streaming:
            assert f"1 of 4 rows cannot be trained on: 1 {reason}" in str(error.value)

    @pytest.mark.parametrize("streaming", [False, True], ids=["stored", "stream"])
    def test_drop_counts_by_reason(self, streaming, build, caplog):
        rows = [
            self.good,
            *({**self.good, **change} for change, _, _ in BAD_ROWS.values()),
            {**self.good, "rejected": []},
        ]
        rows += [self.good] * 3
        dataset = IterableDataset.from_generator(lambda: iter(rows)) if streaming else rows
        trainer = build(dataset, on_invalid_row="drop")
        batches = list(trainer.get_eval_dataloader(trainer.train_dataset))
        assert torch.cat([batch["row_index"] for batch in batches]).tolist() == [0, 7, 8, 9]
        if not streaming:
            assert "6 of 10 rows dropped: 2 no rejected, 1 blank completion" in caplog.text
        else:
            assert "1 rows dropped so far: no rejected" in caplog.text

    @pytest.mark.parametrize("on_invalid_row", ["raise", "drop"])
    def test_a_bad_row_behind_many_good_ones(self, on_invalid_row, build, caplog):
        """The type of a column of problems must not be that of its first thousand rows, which have none."""
        rows = [self.good] * 1100 + [{**self.good, "rejected": [" Heat", " Heat"]}, self.good]
        if on_invalid_row == "raise":
            with pytest.raises(ValueError, match=r"train\[1100\], column 'rejected': entries 0 and 1"):
                build(rows)
            return
        assert build(rows, on_invalid_row="drop").train_dataset["row_index"][1100] == 1101
        assert "1 of 1102 rows dropped: 1 repeated rejected" in caplog.text

    def test_nothing_left(self, build):
        with pytest.raises(ValueError, match="train: no row is left, all 2 were dropped: 2 no rejected"):
            build([{**self.good, "rejected": []}] * 2, on_invalid_row="drop")

    def test_missing_column(self, build):
        rows = [{"prompt": "Next:", "choosen": " Aliens", "rejected": [" Heat"]}]
        with pytest.raises(
            ValueError, match=r"train\[0\], column 'chosen': there is no such column, only: choosen, prompt, rejected"
        ):
            build(rows)

    def test_text_and_messages_mixed(self, build):
        rows = [{**self.good, "prompt": [{"role": "user", "content": "Next?"}]}]
        with pytest.raises(ValueError, match="the prompt is messages, but `chosen` is text"):
            build(rows)

    def test_prompt_that_fills_the_length(self, build, caplog):
        long = {**self.good, "prompt": "Seen: " + ", ".join(["Alien"] * 40) + ". Next:"}
        trainer = build([self.good, long, self.good, long], max_length=32)
        assert trainer.train_dataset["row_index"][:] == [0, 2]
        assert "train: 2 of 4 rows dropped: the prompt alone has more than 31 tokens" in caplog.text
        with pytest.raises(ValueError, match="No row is left; raise `max_length`"):
            build([long], max_length=32)

    def test_template_that_leaves_out_the_answer(self, build, tokenizer, monkeypatch):
        monkeypatch.setattr(
            tokenizer, "chat_template", "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
        )
        with pytest.raises(ValueError, match=r"train\[0\], column 'chosen': a completion has no tokens of its own"):
            build([conversational(row) for row in make_rows(2, 2)])

    @pytest.mark.parametrize("split", ["train", "eval"])
    def test_images_are_refused(self, split, build):
        images = Dataset.from_list([{**self.good, "images": [1]}])
        plain = Dataset.from_list([self.good])
        with pytest.raises(ValueError, match=f"The {split} dataset has the column 'images'.*not supported yet"):
            build(
                images if split == "train" else plain,
                trainer_options={"eval_dataset": images if split == "eval" else None},
            )

    @pytest.mark.parametrize("streaming", [False, True], ids=["stored", "stream"])
    def test_no_rows(self, streaming, build):
        empty = Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []})
        with pytest.raises(ValueError, match="The train dataset has no rows"):
            build(IterableDataset.from_generator(lambda: iter([])) if streaming else empty)

    def test_evaluating_images_is_refused(self, build):
        trainer = build([self.good] * 2)
        with pytest.raises(ValueError, match="The eval dataset has the column 'image'"):
            trainer.evaluate(Dataset.from_list([{**self.good, "image": 1}]))

    def test_collator_of_another_kind_is_refused(self, build, tokenizer):
        from transformers import DataCollatorForLanguageModeling

        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        with pytest.raises(
            TypeError, match="must be a `DataCollatorForMultiPreference`, got `DataCollatorForLanguage"
        ):
            build([self.good] * 2, trainer_options={"data_collator": collator})

    def test_loss_of_the_wrong_shape_is_named(self, build):
        from trl_dmpo.losses.pairwise import sigmoid

        with pytest.raises(ValueError, match=r"The loss 'sigmoid' returned a tensor of shape \(2, 3\).*over_pairs"):
            first_step(build(make_rows(2, 3), loss_type=[sigmoid]))

    def test_config_of_dpo_is_refused(self, model_path, make_args, tokenizer):
        with pytest.raises(TypeError, match="must be a `DMPOConfig`, got `DPOConfig`"):
            DMPOTrainer(
                model_path(), args=make_args(DPOConfig), train_dataset=make_dataset(2, 1), processing_class=tokenizer
            )


class TestNonFinite:
    def test_policy(self, build):
        trainer = build(make_rows(4, 3), loss_type=["dmpo", "sft"])
        with torch.no_grad():
            trainer.model.lm_head.weight[0] = float("nan")
        with pytest.raises(
            FloatingPointError,
            match=r"loss at step 0 is nan. Not finite: policy .* of rows \[\d, \d\].*loss 'dmpo'.*learning_rate",
        ):
            trainer.train()

    def test_reference_of_one_row(self, build):
        trainer = build(make_rows(4, 3), per_device_train_batch_size=4)
        batch = next(iter(trainer.get_train_dataloader()))
        batch["ref_chosen_logps"] = torch.tensor([-1.0, float("inf"), -1.0, -1.0])
        batch["ref_rejected_logps"] = torch.zeros(4, 3)
        trainer.precompute_ref_logps = True
        row = batch["row_index"][1].item()
        with pytest.raises(
            FloatingPointError,
            match=rf"reference log-probabilities of the chosen completion of rows \[{row}\]; loss 'dmpo' of rows \[{row}\]",
        ):
            trainer.compute_loss(trainer.model, batch)


class TestReference:
    def test_precomputed_equals_live(self, build):
        rows = make_rows(6, [4, 1, 6])
        options = {"per_device_train_batch_size": 6}
        live, stored = (
            build(rows, **options),
            build(rows, precompute_ref_log_probs=True, precompute_ref_batch_size=2, **options),
        )
        assert stored.ref_model is None
        assert_same_step(first_step(live), first_step(stored))

    def test_precomputed_for_other_settings_is_not_reused(self, build, tmp_path, monkeypatch):
        """The cached file of one run must not serve another whose log-probabilities differ."""
        Dataset.from_list(make_rows(4, [3, 2])).save_to_disk(tmp_path / "rows")
        values, computed, original = {}, [], DMPOTrainer._token_logps
        monkeypatch.setattr(DMPOTrainer, "_token_logps", lambda *args: computed.append(1) or original(*args))
        runs = {"plain": {}, "ld": {"ld_alpha": 0.5}, "cut": {"max_length": 14}, "again": {}}
        for name, settings in runs.items():
            computed.clear()
            rows = Dataset.load_from_disk(tmp_path / "rows")
            trainer = build(rows, precompute_ref_log_probs=True, **settings)
            values[name] = trainer.train_dataset["ref_rejected_logps"][:]
            assert bool(computed) is (name != "again"), "the cached file serves the same settings, and only those"
        assert values["plain"] == values["again"]
        assert values["plain"] != values["ld"]
        assert values["plain"] != values["cut"]

    def test_precomputed_with_drawn_negatives(self, build):
        trainer = build(make_rows(4, 6), precompute_ref_log_probs=True, num_negatives=2, per_device_train_batch_size=4)
        batch = next(iter(trainer.get_train_dataloader()))
        assert batch["ref_rejected_logps"].shape == (4, 2)
        torch.testing.assert_close(
            batch["ref_rejected_logps"],
            build(make_rows(4, 6), perturbed=False)
            ._token_logps(build(make_rows(4, 6), perturbed=False).model, batch)
            .sum(-1)[:, 1:],
            rtol=1e-4,
            atol=1e-4,
        )

    @pytest.mark.filterwarnings("ignore:The `'keep_end'`")
    @pytest.mark.parametrize(
        "options", [{"peft": True}, {"ld_alpha": 0.5}, {"truncation_mode": "keep_end", "max_length": 14}], ids=str
    )
    def test_precomputed_equals_live_with(self, options, build):
        rows, steps, options = make_rows(6, [4, 1, 6]), [], dict(options)
        trainer_options = {"peft_config": LoraConfig(r=4)} if options.pop("peft", False) else {}
        for precompute in (False, True):
            torch.manual_seed(0)
            options |= {"precompute_ref_log_probs": precompute, "per_device_train_batch_size": 6}
            steps.append(first_step(build(rows, trainer_options=trainer_options, **options)))
        assert_same_step(*steps)

    def test_precomputing_for_a_stream_is_refused(self, build):
        rows = make_rows(4, 2)
        with pytest.raises(ValueError, match="not supported with IterableDataset"):
            build(IterableDataset.from_generator(lambda: iter(rows)), precompute_ref_log_probs=True)

    def test_sync(self, build):
        trainer = build(
            make_rows(8, 3), sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0, max_steps=2
        )
        trainer.train()
        for policy, reference in zip(trainer.model.parameters(), trainer.ref_model.parameters(), strict=True):
            torch.testing.assert_close(policy, reference)

    def test_base_weights_stay_with_lora(self, build):
        trainer = build(
            make_rows(8, 3), perturbed=False, trainer_options={"peft_config": LoraConfig(r=2)}, learning_rate=0.01
        )
        before = {n: p.clone() for n, p in trainer.model.named_parameters()}
        trainer.train()
        moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
        assert moved
        assert all("lora_" in name for name in moved)


class TestCollatorOfOnesOwn:
    """The public collator, passed by the user: the trainer still has the last word on layout, draw and seed."""

    def test_rule_and_options_apply(self, build, model_path):
        own = {"data_collator": DataCollatorForMultiPreference(pad_token_id=1)}
        plain = build(make_rows(2, 2), prefix_sharing=False, trainer_options=own)
        assert not plain.data_collator.prefix_sharing
        repeated = build(make_rows(2, 2), model=model_path("lfm2"), trainer_options=own)
        assert not repeated.data_collator.prefix_sharing
        assert not repeated._train_collator.prefix_sharing

    def test_it_draws_in_training_only(self, build):
        own = {"data_collator": DataCollatorForMultiPreference(pad_token_id=1, num_negatives=2)}
        options = {"precompute_ref_log_probs": True, "seed": 7, "per_device_train_batch_size": 4}
        trainer = build(make_rows(4, 6), trainer_options=own, **options)
        assert len(trainer.train_dataset["ref_rejected_logps"][0]) == 6
        assert trainer._train_collator.seed == 7
        assert next(iter(trainer.get_train_dataloader()))["ref_rejected_logps"].shape == (4, 2)
        evaluated = next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))
        assert evaluated["completion_lengths"].shape[1] == 7


class TestRuns:
    def test_a_resumed_run_is_the_run(self, build, tmp_path):
        """Weights, losses and drawn negatives of a run that stopped in the middle of its second epoch."""
        rows = make_rows(6, 6)
        options = {
            "num_negatives": 2,
            "max_steps": 8,  # three steps an epoch
            "save_strategy": "steps",
            "save_steps": 4,
            "perturbed": False,
        }
        whole = build(rows, output_dir=str(tmp_path / "whole"), **options)
        whole.train()
        shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "part" / "checkpoint-4")
        resumed = build(rows, output_dir=str(tmp_path / "part"), **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-4"))
        for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(a, b)
        for a, b in zip(whole.state.log_history[:-1], resumed.state.log_history[:-1], strict=True):
            for name in a:
                assert a[name] == b[name], name

    @pytest.mark.parametrize("streaming", [False, True], ids=["stored", "stream"])
    def test_negatives_change_with_the_epoch(self, streaming, build):
        """One batch an epoch, four epochs: what is drawn for a row in each."""
        rows, drawn = make_rows(2, 8), {}
        dataset = IterableDataset.from_generator(lambda: iter(rows)) if streaming else rows
        trainer = build(dataset, num_negatives=2, max_steps=4)
        draw = trainer._train_collator._draw

        def record(example):
            kept = draw(example)
            drawn.setdefault(example["row_index"], []).append(tuple(kept))
            return kept

        trainer._train_collator._draw = record
        trainer.train()
        assert drawn.keys() == {0, 1}
        for draws in drawn.values():
            assert len(draws) >= 4
            assert all(len(draw) == 2 for draw in draws)
            assert len(set(draws)) > 1, "the same negatives in every epoch"

    def test_workers_draw_the_same(self, build):
        logs = []
        for workers, persistent in ((0, False), (1, True)):
            trainer = build(
                make_rows(6, 6),
                num_negatives=2,
                max_steps=7,
                dataloader_num_workers=workers,
                dataloader_persistent_workers=persistent,
            )
            trainer.train()
            logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert logs[0] == pytest.approx(logs[1], abs=1e-6)

    def test_it_learns(self, build):
        trainer = build(
            make_rows(4, 3), perturbed=False, max_steps=30, learning_rate=3e-3, per_device_train_batch_size=4
        )
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
        assert history[-1]["loss"] < 0.5
        assert history[-1]["rewards/accuracies"] == 1.0
        assert history[-1]["rewards/margins"] > 0.5

    def test_every_metric_is_logged(self, build):
        trainer = build(make_rows(4, [3, 1]), ranking_k=[1, 2], max_steps=1)
        trainer.train()
        assert trainer.state.log_history[0].keys() == {
            *("loss", "grad_norm", "learning_rate", "epoch", "step"),
            *("entropy", "num_tokens", "mean_token_accuracy", "tokens/padding"),
            *(f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins", "hardest_margin")),
            *(f"{kind}/{side}" for kind in ("logps", "logits") for side in ("chosen", "rejected")),
            *("logps/chosen_change", "negatives/active", "negatives/violations"),
            *(f"ranking/{name}" for name in ("hit_rate@1", "hit_rate@2", "ndcg@1", "ndcg@2", "mrr")),
        }

    @pytest.mark.parametrize("options", [{}, {"ld_alpha": 0.5}], ids=["plain", "ld"])
    def test_metrics_of_ragged_rows_are_means_over_prompts(self, options, build):
        """Also under `ld_alpha`, where the chosen completion has one value for each pair."""
        rows, evaluated = make_rows(3, [1, 6, 2]), []
        for batch in (*([row] for row in rows), rows):
            trainer = build(batch, per_device_eval_batch_size=3, **options)
            evaluated.append(trainer.evaluate(Dataset.from_list(batch)))
        *single, together = evaluated
        rewards = [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")]
        for name in ("logps/chosen", "logps/rejected", *rewards, "ranking/mrr", "ranking/ndcg@5"):
            mean = sum(metrics[f"eval_{name}"] for metrics in single) / 3
            assert together[f"eval_{name}"] == pytest.approx(mean, abs=1e-4), name

    def test_tokens_are_those_computed(self, build):
        rows = make_rows(2, 5)
        counts = {}
        for sharing in (True, False):
            trainer = build(rows, prefix_sharing=sharing, max_steps=1)
            trainer.train()
            counts[sharing] = trainer.state.log_history[0]["num_tokens"]
        row_tokens = [
            (len(row["prompt_ids"]), [len(ids) for ids in [row["chosen_ids"], *row["rejected_ids"]]])
            for row in trainer.train_dataset
        ]
        assert counts[False] == sum(sum(prompt + length for length in lengths) for prompt, lengths in row_tokens)
        assert counts[True] == sum(prompt - 1 + sum(lengths) for prompt, lengths in row_tokens)

    def test_compute_metrics(self, build):
        given = {}

        def compute_metrics(prediction):
            given["predictions"], given["labels"] = prediction.predictions, prediction.label_ids
            return {"answer": 42.0}

        rows = make_rows(5, [3, 1, 2])
        trainer = build(rows, trainer_options={"compute_metrics": compute_metrics}, per_device_eval_batch_size=2)
        assert trainer.evaluate(Dataset.from_list(rows))["eval_answer"] == 42.0
        assert given["labels"].tolist() == [
            [1, 0, 0, 0],
            [1, 0, -100, -100],
            [1, 0, 0, -100],
            [1, 0, 0, 0],
            [1, 0, -100, -100],
        ]
        assert given["predictions"].shape == (5, 4)
        for row, predictions in zip(trainer.train_dataset, given["predictions"], strict=True):
            expected = trainer._token_logps(trainer.model, trainer.data_collator([row])).sum(-1)[0].detach()
            torch.testing.assert_close(torch.tensor(predictions[: len(expected)]), expected, rtol=1e-4, atol=1e-4)

    def test_model_card_and_saved_config(self, build, tmp_path):
        trainer = build(make_rows(4, 2), save_strategy="steps", save_steps=2, output_dir=str(tmp_path / "mine"))
        trainer.train()
        card = Path(tmp_path / "mine" / "README.md").read_text()
        for words in ("DMPO", "2405.16127", "Zhuoxi Bai", "trl", "dmpo"):
            assert words in card
        assert json.loads(trainer.args.to_json_string())["loss_type"] == ["dmpo"]

    def test_default_arguments(self, model_path, tokenizer, tmp_path, monkeypatch):
        from trl_dmpo import DMPOConfig

        monkeypatch.chdir(tmp_path)
        defaults = partial(DMPOConfig, bf16=False, report_to="none")  # a CPU has no bfloat16 to train in by default
        monkeypatch.setattr("trl_dmpo.trainer.dmpo_trainer.DMPOConfig", defaults)
        trainer = DMPOTrainer(model_path(), train_dataset=make_dataset(2, 2), processing_class=tokenizer)
        assert trainer.args.output_dir == "llama-DMPO"
        assert trainer.args.loss_type == ["dmpo"]

    def test_loss_of_ones_own(self, build):
        trainer = build(
            make_rows(4, 2),
            loss_type=[constant_loss, "sft"],
            loss_weights=[2.0, 1.0],
            max_steps=1,
            save_strategy="steps",
            save_steps=1,
        )
        step = first_step(trainer)[0]
        sft = first_step(build(make_rows(4, 2), loss_type=["sft"]))[0]
        assert step == pytest.approx(sft + 14, rel=1e-5)
        trainer.train()  # and its checkpoint can be written
        assert json.loads(trainer.args.to_json_string())["loss_type"] == ["constant_loss", "sft"]


def constant_loss(scores, config):
    return scores.chosen_logps * 0 + 7
