import copy
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trl_dmpo.ranking.tokens import Completions
from trl_dmpo.trainer.tokenization import tokenize_row

from ..conftest import TITLES


ANSWERS = [f" {title}" for title in TITLES]


@pytest.fixture(scope="module")
def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2 has it: spaces are letters, one more stands in front of a text, and nothing else keeps words apart."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(
        [f"Seen: {title}\nNext: {title}. What next? {title}" for title in TITLES * 3], trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def assert_as_in_training(completions: Completions, prompt) -> None:
    first, *others = completions.texts
    row = {"prompt": prompt, "chosen": first, "rejected": others}
    ids = tokenize_row(row, completions.tokenizer, completions.tokenizer.eos_token)
    assert completions.behind(prompt) == (ids["prompt_ids"], [ids["chosen_ids"], *ids["rejected_ids"]])


@pytest.mark.parametrize("which", ["byte level", "metaspace"])
def test_tokens_are_those_of_training(which, tokenizer, metaspace_tokenizer):
    chosen = tokenizer if which == "byte level" else metaspace_tokenizer
    by_space, bare = Completions(ANSWERS, chosen), Completions(TITLES, chosen)

    @given(st.text("AHe \n.,東:", max_size=40), st.sampled_from(["\nNext movie:", " Next: ", "Heat", "\n\n", ""]))
    def check(start, end):
        assert_as_in_training(by_space, f"User {start}{end}")
        assert_as_in_training(bare, f"User {start}{end}")

    check()


def test_only_the_end_of_a_prompt_is_tokenized_for_every_completion(tokenizer, monkeypatch):
    completions = Completions(ANSWERS, tokenizer)
    prompts = [f"{title * 9} was liked.\nNext movie:" for title in TITLES]
    first = completions.behind(prompts[0])
    texts = []
    monkeypatch.setattr(
        completions,
        "_tokenize",
        lambda given, **kwargs: texts.extend(given) or tokenizer(text=given, **kwargs)["input_ids"],
    )
    others = [completions.behind(prompt) for prompt in prompts[1:]]
    assert all(other.completions is first.completions for other in others)
    assert len(texts) == 3 * len(others)


def test_what_merges_is_told(tokenizer, monkeypatch):
    told = []
    logger = SimpleNamespace(warning_once=told.append)
    monkeypatch.setattr("transformers.utils.logging.get_logger", lambda name: logger)
    Completions(["ed Heat", " Big", " Jaws"], tokenizer).behind("You have watched  ")
    assert not told
    found = Completions(["ed Heat", " Big", " Jaws"], tokenizer).behind("You have watched R")
    assert len(told) == 1
    assert "The tokenizer merges the end of a prompt with the beginning of a completion" in told[0]
    whole = [tokenizer(f"You have watched R{text}<|endoftext|>")["input_ids"] for text in ("ed Heat", " Big")]
    assert [found.prompt + completion for completion in found.completions[:2]] == whole


def test_a_completion_without_tokens_is_an_error(tokenizer):
    silent = copy.copy(tokenizer)
    silent.chat_template = (
        "{% for message in messages if message['role'] == 'user' %}{{ message['content'] }}{% endfor %}"
    )
    answers = [[{"role": "assistant", "content": title}] for title in ("Heat", "Big", "Jaws")]
    with pytest.raises(ValueError, match="a completion has no tokens of its own"):
        Completions(answers, silent).behind([{"role": "user", "content": "I saw Alien. What next?"}])


def test_chats(tokenizer):
    completions = Completions([[{"role": "assistant", "content": title}] for title in TITLES], tokenizer)
    for content in ("I saw Heat and Babe.\nWhat next?", "Heat", "東京物語"):
        assert_as_in_training(completions, [{"role": "user", "content": content}])


def test_a_template_that_writes_the_prompt_otherwise_with_an_answer(tokenizer):
    """As some do that drop earlier thoughts: the beginning of one is not that of the other."""
    changing = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    changing.chat_template = (
        "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ messages | length }}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    completions = Completions([[{"role": "assistant", "content": title}] for title in TITLES], changing)
    assert_as_in_training(completions, [{"role": "user", "content": "I saw Heat and Babe. What next?"}])
