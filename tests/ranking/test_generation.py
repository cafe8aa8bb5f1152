import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig

from trl_dmpo.ranking import generation
from trl_dmpo.ranking.beam import beam_search
from trl_dmpo.ranking.generation import generate_answers, plain_generation
from trl_dmpo.ranking.tokens import Completions

from ..conftest import TITLES


PROMPTS = ["User 1 has watched Heat. Next:", "Next:", "User 2 has watched Amélie, Big, Red Heat. Next:"]
HOSTILE = {
    "do_sample": True,
    "temperature": 5.0,
    "top_k": 3,
    "repetition_penalty": 9.0,
    "no_repeat_ngram_size": 1,
    "length_penalty": 7.0,
    "num_beams": 3,
    "num_return_sequences": 2,
    "min_new_tokens": 9,
    "forced_eos_token_id": 7,
    "suppress_tokens": list(range(20, 300)),
    "bad_words_ids": [[11]],
    "max_new_tokens": 1,
    "early_stopping": True,
}


@pytest.fixture(scope="module")
def model(model_path):
    return AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()


@torch.no_grad()
def plain_answer(model, tokenizer, prompt, ends, length: int) -> str:
    """The likeliest token, again and again, without a cache and without padding."""
    ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
    made: list[int] = []
    while len(made) < length:
        token = model(torch.tensor([ids + made])).logits[0, -1].argmax().item()
        if token in ends:
            break
        made.append(token)
    return tokenizer.decode(made, skip_special_tokens=True)


def test_answers_are_the_likeliest_tokens(model, tokenizer):
    done: list[int] = []
    found = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=6, progress=done.append)
    assert found == [plain_answer(model, tokenizer, prompt, {0}, 6) for prompt in PROMPTS]
    assert sum(done) == 3
    chat = [[{"role": "user", "content": title}] for title in TITLES[:2]]
    ids = [tokenizer.apply_chat_template(each, add_generation_prompt=True, return_dict=False) for each in chat]
    assert generate_answers(model, tokenizer, chat, 4) == [
        plain_answer(model, tokenizer, each, {0}, 4) for each in ids
    ]


def test_an_answer_ends_where_the_model_ends_a_turn(model, tokenizer, monkeypatch):
    """A chat model says with what in its configuration alone."""
    first = tokenizer(PROMPTS[0])["input_ids"]
    with torch.no_grad():
        turn_end = model(torch.tensor([first])).logits[0, -1].argmax().item()
    monkeypatch.setattr(model, "generation_config", GenerationConfig(eos_token_id=[0, turn_end]))
    assert generate_answers(model, tokenizer, PROMPTS[:1], 6) == [""]
    assert generate_answers(model, tokenizer, PROMPTS, 6)[1:] == [
        plain_answer(model, tokenizer, prompt, {0, turn_end}, 6) for prompt in PROMPTS[1:]
    ]


@pytest.mark.parametrize("adapter", [False, True])
def test_a_hostile_generation_config_changes_nothing_and_comes_back(adapter, model_path, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    if adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.9))
        torch.nn.init.normal_(next(p for name, p in model.named_parameters() if "lora_B" in name))
    base = model.get_base_model() if adapter else model
    completions = Completions([f" {title}" for title in TITLES], tokenizer)
    encoded = [completions.behind(prompt) for prompt in PROMPTS]

    def run() -> tuple:
        return generate_answers(model, tokenizer, PROMPTS, 6), beam_search(model, encoded, [[], [1], []], 4)

    expected = run()
    hostile = base.generation_config = GenerationConfig(**HOSTILE)
    before = hostile.to_dict()
    model.train()
    assert run() == expected
    assert model.training
    assert base.generation_config is hostile
    assert model.generation_config.to_dict() == before


def test_settings_come_back_after_an_error(model):
    before = model.generation_config
    with pytest.raises(KeyError), plain_generation(model):
        raise KeyError
    assert model.generation_config is before


def test_memory_that_does_not_suffice_means_fewer_at_a_time(model, tokenizer, monkeypatch, caplog):
    pad_left, sizes = generation.pad_left, []

    def run_out(rows, device):
        sizes.append(len(rows))
        if len(rows) > 1:
            raise torch.OutOfMemoryError
        return pad_left(rows, device)

    expected = generate_answers(model, tokenizer, PROMPTS, 32)
    monkeypatch.setattr(generation, "pad_left", run_out)
    assert generate_answers(model, tokenizer, PROMPTS, 32) == expected
    assert sizes[0] == 3
    assert sizes[-3:] == [1, 1, 1]
    assert "Out of memory" in caplog.text


def test_what_cannot_be_generated_is_refused(model, model_path, tokenizer):
    with pytest.raises(ValueError, match=r"LlamaModel is no causal language model.*Score its answers instead"):
        generate_answers(AutoModel.from_pretrained(model_path()), tokenizer, PROMPTS)
    with pytest.raises(
        ValueError, match=r"prompts\[1\] has \d+ tokens, and with 500 .* window of 512. Shorten the history"
    ):
        generate_answers(model, tokenizer, [PROMPTS[1], PROMPTS[2]], max_new_tokens=500)
    with pytest.raises(ValueError, match=r"prompts\[1\] has no tokens"):
        generate_answers(model, tokenizer, ["Next:", ""])
