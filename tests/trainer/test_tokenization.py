"""Rows that keep the contract, and that a tokenizer or its chat template makes nothing of."""

import inspect
import logging
from types import SimpleNamespace

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers.utils import logging as transformers_logging

from tests.fuzz.tokenizers import byte_level, few_characters
from trl_dmpo.trainer.row_checks import Needs
from trl_dmpo.trainer.tokenization import check_row, prepare_dataset, split_implicit_prompt, tokenize_row


def said(text, role="assistant"):
    return [{"role": role, "content": text}]


CHAT = {"prompt": said("Next?", "user"), "chosen": said("Aliens"), "rejected": [said("Heat"), said("Big")]}
NO_USER = {**CHAT, "prompt": said("Next?")}
TEXT = {"prompt": "Next:", "chosen": " Aliens", "rejected": [" Heat", " Big"]}


def prepare(rows, tokenizer, on_invalid_row="drop", stream=False):
    dataset = Dataset.from_list(rows)
    dataset = dataset.to_iterable_dataset() if stream else dataset
    config = SimpleNamespace(
        on_invalid_row=on_invalid_row, max_length=None, truncation_mode="keep_start", dataset_num_proc=None
    )
    return list(prepare_dataset(dataset, "train", tokenizer, tokenizer.eos_token, config, Needs(())))


@pytest.fixture(autouse=True)
def loggers(monkeypatch):
    from accelerate import PartialState

    PartialState(cpu=True)  # which the logger of accelerate asks for
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    transformers_logging.warning_once.cache_clear()  # another test may have had the warning


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_row_that_the_template_refuses_costs_no_other(first, stream, caplog):
    tokenizer = few_characters()
    rows = [NO_USER, CHAT, CHAT] if first else [CHAT, NO_USER, CHAT]
    place = rows.index(NO_USER)
    with pytest.raises(
        ValueError,
        match=rf"^train\[{place}\], column 'prompt': the tokenizer or its chat template raises TemplateError: Roles must "
        r"alternate\.; mend or remove it\. .*set `on_invalid_row='drop'`",
    ):
        prepare(rows, tokenizer, "raise", stream)
    kept = prepare(rows, tokenizer, "drop", stream)
    assert [row["row_index"] for row in kept] == [index for index in range(3) if index != place]
    alone = tokenize_row(CHAT, tokenizer, tokenizer.eos_token)
    assert all({name: row[name] for name in alone} == alone for row in kept)
    assert "refused by the tokenizer" in caplog.text


@pytest.mark.parametrize(
    ("column", "change"), [("chosen", {"chosen": " é"}), ("rejected", {"rejected": [" Heat", " é"]})]
)
def test_a_character_that_the_tokenizer_does_not_know(column, change):
    texts = ["Next:", "Next: Aliens</s>", "Next: Heat</s>", "Next: Big</s>"]
    words = Words({text: place for place, text in enumerate(texts)})
    with pytest.raises(
        ValueError, match=rf"^train\[0\], column '{column}': the tokenizer .* raises Exception: WordLevel error"
    ):
        prepare([{**TEXT, **change}], words, "raise")


class Words:
    """A tokenizer of whole texts, with nothing for those that it does not know."""

    eos_token = "</s>"

    def __init__(self, vocabulary):
        self.words = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))

    def __call__(self, text):
        return {"input_ids": [self.words.encode(each).ids for each in text]}


def test_a_space_at_the_end_of_the_first_answer_is_no_prompt():
    row = split_implicit_prompt({"chosen": "Aliens ", "rejected": ["Heat", "Big"]})
    assert row == {"prompt": "", "chosen": "Aliens ", "rejected": ["Heat", "Big"]}


def test_conversations_with_nothing_in_common():
    row = {"chosen": said("a", "user") + said("b"), "rejected": [said("c", "user") + said("d")]}
    problem = check_row(row, Needs(()))
    assert (problem.reason, problem.column) == ("no prompt", "chosen")
    assert "not all its conversations begin with the same message" in problem.detail


class TestMarkers:
    """What is a special token of the tokenizer is one in a text, too, as in TRL: prompts are written with them."""

    def ids(self, row):
        tokenizer = byte_level()
        return tokenize_row(row, tokenizer, tokenizer.eos_token)["chosen_ids"], tokenizer.convert_tokens_to_ids(
            "<|end|>"
        )

    def test_in_text(self, caplog):
        ids, marker = self.ids({**TEXT, "chosen": " Alien<|end|>"})
        assert ids.count(marker) == 1
        assert not caplog.records

    def test_in_messages(self, caplog):
        ids, marker = self.ids({**CHAT, "chosen": said("Alien<|end|>")})
        assert ids.count(marker) == 2  # its own, and that of the template
        assert "A message has the text '<|end|>', which the tokenizer takes for its special token" in caplog.text

    def test_made_harmless(self, caplog):
        row = {**CHAT, "chosen": said("Alien<|end|>"), "chat_template_kwargs": {"sanitize_control_tokens": True}}
        if "sanitize_control_tokens" not in inspect.signature(byte_level().apply_chat_template).parameters:
            with pytest.raises(ValueError, match="`sanitize_control_tokens`, which this transformers does not know"):
                self.ids(row)
            return
        ids, marker = self.ids(row)
        assert ids.count(marker) == 1
        assert byte_level().decode(ids).startswith("Alien<|end|>")
        assert not caplog.records
