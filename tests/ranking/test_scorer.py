import logging
import random

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_dmpo import Scorer
from trl_dmpo.ranking import forward, token_budget
from trl_dmpo.trainer.tokenization import tokenize_row

from ..conftest import TITLES


PROMPTS = [
    "User 1 has watched Heat, Big.\nNext movie:",
    "User 2 has watched Amélie, 東京物語, Heat, Babe, Red Heat.\nNext movie:",
    "Next:",
]
CANDIDATES = [f" {title}" for title in TITLES]


def chat(role: str, content: str) -> list[dict]:
    return [{"role": role, "content": content}]


def load(path: str, dtype: torch.dtype = torch.float32, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **kwargs)


@torch.no_grad()
def plain_scores(model, tokenizer, prompts, lists) -> list[torch.Tensor]:
    """One forward of prompt and candidate at a time, nothing padded."""
    found = []
    for prompt, candidates in zip(prompts, lists, strict=True):
        first, *others = candidates
        ids = tokenize_row({"prompt": prompt, "chosen": first, "rejected": others}, tokenizer, tokenizer.eos_token)
        scores = []
        for completion in (ids["chosen_ids"], *ids["rejected_ids"]):
            sequence = torch.tensor([ids["prompt_ids"] + completion])
            logits = model(input_ids=sequence, attention_mask=torch.ones_like(sequence)).logits[
                0, -len(completion) - 1 : -1
            ]
            logps = logits.double().log_softmax(-1)[torch.arange(len(completion)), torch.tensor(completion)]
            scores.append(logps.sum())
        found.append(torch.stack(scores).float())
    return found


def assert_same(left, right, tolerance: float = 2e-4) -> None:
    assert len(left) == len(right)
    for mine, theirs in zip(left, right, strict=True):
        assert mine.dtype == torch.float32
        assert mine.device.type == "cpu"
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize(
    ("architecture", "shares"),
    [
        ("llama", True),
        ("gpt2", True),
        ("qwen3", True),
        ("gemma3_text", True),
        ("mistral", True),
        ("qwen3_moe", True),
        ("lfm2", False),
        ("bloom", False),
    ],
)
def test_scores_are_those_of_a_plain_forward(architecture, shares, model_path, tokenizer, caplog):
    model = load(model_path(architecture))
    scorer = Scorer(model, tokenizer)
    lists = [CANDIDATES, CANDIDATES[3:7], CANDIDATES[2:3]]
    with caplog.at_level(logging.WARNING):
        found = scorer.score(PROMPTS, lists)
    expected = plain_scores(model, tokenizer, PROMPTS, lists)
    assert_same(found, expected)
    lengths = [len(tokenizer(title)["input_ids"]) + 1 for title in CANDIDATES]  # and the EOS token
    means = scorer.score(PROMPTS[:1], lists[:1], normalize="mean")
    assert_same(means, [expected[0] / torch.tensor(lengths)])
    warnings = [record.getMessage() for record in caplog.records if "Prompts are not shared" in record.getMessage()]
    assert bool(warnings) is not shares
    assert scorer._shares is shares


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_scores_do_not_depend_on_batches_order_and_trees(
    architecture, implementation, model_path, tokenizer, monkeypatch
):
    model = load(model_path(architecture), attn_implementation=implementation)
    generator = random.Random(0)
    prompts = [
        f"User {user} has watched {', '.join(generator.sample(TITLES, 1 + user % 5))}.\nNext:" for user in range(9)
    ]
    expected = Scorer(model, tokenizer, prefix_sharing=False).score(prompts, CANDIDATES)
    monkeypatch.setattr(forward, "TREE_TOKENS", 7)
    shuffled = generator.sample(range(len(CANDIDATES)), len(CANDIDATES))
    for max_tokens in (1, 200):
        scorer = Scorer(model, tokenizer, prefix_sharing=True, max_tokens=max_tokens)
        found = scorer.score(prompts[::-1], [CANDIDATES[place] for place in shuffled])[::-1]
        assert_same([each[torch.tensor(shuffled).argsort()] for each in found], expected)


@pytest.mark.parametrize("adapter", ["lora", "prompt_tuning"])
def test_adapters(adapter, model_path, tokenizer, caplog):
    config = (
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        if adapter == "lora"
        else PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    torch.manual_seed(0)
    model = get_peft_model(load(model_path()), config).eval()
    found = Scorer(model, tokenizer).score(PROMPTS, CANDIDATES)
    assert_same(found, plain_scores(model, tokenizer, PROMPTS, [CANDIDATES] * 3))
    assert ("virtual tokens in front" in caplog.text) == (adapter == "prompt_tuning")


def test_an_adapter_that_transformers_has_put_in(model_path, tokenizer):
    model = load(model_path())
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    found = Scorer(model.eval(), tokenizer).score(PROMPTS, CANDIDATES)
    assert_same(found, plain_scores(model, tokenizer, PROMPTS, [CANDIDATES] * 3))


def test_the_window_is_less_by_the_virtual_tokens(model_path, tokenizer):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(load(model_path()), config).eval()
    with pytest.raises(ValueError, match="the model's window is 509"):
        Scorer(model, tokenizer).score(["Next" * 300], CANDIDATES)


def test_chats(model_path, tokenizer):
    model = load(model_path())
    prompts = [
        chat("user", "I saw Heat, Babe and Big.\nWhat next?"),
        chat("system", "Be brief.") + chat("user", "Jaws"),
    ]
    answers = [chat("assistant", title) for title in TITLES]
    found = Scorer(model, tokenizer).score(prompts, answers)
    assert_same(found, plain_scores(model, tokenizer, prompts, [answers, answers]))


def test_bfloat16(model_path, tokenizer):
    model = load(model_path(), torch.bfloat16)
    scorer = Scorer(model, tokenizer)
    found = scorer.score(PROMPTS, CANDIDATES)
    assert scorer._shares
    assert_same(found, plain_scores(model, tokenizer, PROMPTS, [CANDIDATES] * 3), tolerance=0.3)


def test_probabilities_of_all_completions_sum_to_one(model_path, tokenizer):
    """Over the tokens that may come first, with a tokenizer that has one for each byte."""
    model = load(model_path())
    prompt = tokenizer("User 1 has watched Heat. Next:")["input_ids"]
    rows = [forward.Encoded(prompt, [[token, 0] for token in range(len(tokenizer))])]
    with torch.no_grad():
        (logps,) = forward.score_shared(model, rows, 512)
    assert logps[:, 0].exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_the_model_stays_in_its_mode_and_progress_counts_prompts(model_path, tokenizer):
    model = load(model_path()).train()
    done = []
    Scorer(model, tokenizer, max_tokens=64).score(PROMPTS, CANDIDATES, progress=done.append)
    assert model.training
    assert sum(done) == 3
    assert len(done) > 1


def test_a_model_that_sharing_is_not_exact_for(model_path, tokenizer, monkeypatch, caplog):
    def leak(batch, implementation, dtype, window, past):
        rows, width = batch["subtree_end"].shape
        return torch.ones(rows, 1, width - past, width).tril(past).bool()

    monkeypatch.setattr("trl_dmpo.trainer.attention._mask", leak)
    model = load(model_path())
    with pytest.raises(ValueError, match="sharing prompts is not exact here: on the first prompts, log-probabilities"):
        Scorer(model, tokenizer, prefix_sharing=True).score(PROMPTS, CANDIDATES)
    found = Scorer(model, tokenizer).score(PROMPTS, CANDIDATES)
    assert "each is run once for every completion: on the first prompts, log-probabilities" in caplog.text
    assert_same(found, plain_scores(model, tokenizer, PROMPTS, [CANDIDATES] * 3))


def test_out_of_memory_halves_the_budget_and_goes_on(model_path, tokenizer, monkeypatch, caplog):
    model = load(model_path())
    real = forward.logits_at

    def limited(model, positions, **inputs):
        if inputs["input_ids"].numel() > 100:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(model, positions, **inputs)

    expected = Scorer(model, tokenizer).score(PROMPTS, CANDIDATES)
    monkeypatch.setattr(forward, "logits_at", limited)
    scorer = Scorer(model, tokenizer, max_tokens=4096)
    assert_same(scorer.score(PROMPTS, CANDIDATES), expected)
    assert [record.getMessage() for record in caplog.records if "Out of memory" in record.getMessage()] == [
        "Out of memory: scoring goes on with 2048 tokens at a time, and with fewer if it must. To start with fewer, set "
        "`max_tokens`."
    ]
    monkeypatch.setattr(forward, "logits_at", lambda *args, **kwargs: limited(*args, input_ids=torch.zeros(999)))
    with pytest.raises(torch.OutOfMemoryError):
        scorer.score(PROMPTS, CANDIDATES)


def test_the_budget_is_what_the_memory_holds(model_path, monkeypatch):
    model = load(model_path())
    assert token_budget.TokenBudget(model).tokens == 2048
    monkeypatch.setattr(token_budget, "_free_bytes", lambda device: 1000 * token_budget._bytes_per_token(model))
    assert token_budget.TokenBudget(model).tokens == 500
    with pytest.raises(ValueError, match="`max_tokens` must be at least 1, got 0"):
        token_budget.TokenBudget(model, 0)


@pytest.mark.parametrize(
    ("prompts", "candidates", "message"),
    [
        (["a", "b"], [[" x"], []], r"prompts\[1\] has no candidates"),
        (["a"], [], "There are 1 prompts and 0 lists of candidates"),
        (["a", "b"], [[" x"]], "There are 2 prompts and 1 lists"),
        (["a", "b"], [[" x"], [" y", "  "]], r"Candidate 1 of prompts\[1\] is empty"),
        (["a"], [" x", " y", " x"], r"Candidate 2 of prompts\[0\] is there twice: ' x'"),
        (["a"], [[chat("assistant", "x")]], r"Candidate 0 of prompts\[0\] is list, expected text, as the prompt"),
        (
            [chat("user", "a")],
            [" x"],
            r"Candidate 0 of prompts\[0\] is str, expected a list of messages, as the prompt",
        ),
        ("a", [" x"], "`prompts` is a single prompt"),
        ([7], [" x"], r"prompts\[0\] is int, expected text or a list of messages"),
        ([""], [" x"], r"prompts\[0\] has no tokens"),
        (
            ["a", "User " * 600],
            [" x"],
            r"prompts\[1\] has \d+ tokens and its longest candidate \d+, but the model's window is 512",
        ),
    ],
)
def test_bad_input_is_named(prompts, candidates, message, model_path, tokenizer):
    with pytest.raises(ValueError, match=message):
        Scorer(load(model_path()), tokenizer).score(prompts, candidates)


def test_a_chat_needs_a_template_and_options_are_checked(model_path, tokenizer):
    plain = AutoTokenizer.from_pretrained(model_path())
    plain.chat_template = None
    scorer = Scorer(load(model_path()), plain)
    with pytest.raises(ValueError, match=r"prompts\[0\] is a chat, but the tokenizer has no chat template"):
        scorer.score([chat("user", "Hi")], [chat("assistant", "Heat")])
    with pytest.raises(ValueError, match="`normalize` must be 'sum' or 'mean', got 'max'"):
        scorer.score(["a"], [" x"], normalize="max")
    with pytest.raises(ValueError, match="`prefix_sharing` must be 'auto', True or False, got 'yes'"):
        Scorer(load(model_path()), plain, prefix_sharing="yes")
    assert scorer.score([], [" x"]) == []


def test_a_single_candidate_tells_nothing_of_sharing(model_path, tokenizer):
    scorer = Scorer(load(model_path()), tokenizer)
    scorer.score(PROMPTS, CANDIDATES[:1])
    assert scorer._shares is None
    scorer.score(PROMPTS, CANDIDATES[:2])
    assert scorer._shares


def test_a_stream_checks_all_and_then_yields_one_by_one(model_path, tokenizer):
    model = load(model_path()).train()
    scorer = Scorer(model, tokenizer, max_tokens=1)
    with pytest.raises(ValueError, match="user 2 has 1200 tokens"):
        next(scorer.stream([*PROMPTS[:2], "Next" * 600], CANDIDATES, names="user {}".format))
    expected = scorer.score(PROMPTS, CANDIDATES)
    seen = []
    for index, scores in scorer.stream(PROMPTS, CANDIDATES):
        assert torch.is_grad_enabled()
        assert model.training
        seen.append(index)
        assert_same([scores], [expected[index]])
    assert sorted(seen) == [0, 1, 2]


def test_a_model_that_gives_nan_is_named(model_path, tokenizer):
    model = load(model_path())
    model.lm_head.weight.data[:] = float("nan")
    with pytest.raises(ValueError, match=r"The model gives NaN for the candidates of prompts\[2\]"):
        Scorer(model, tokenizer).score(PROMPTS, CANDIDATES)
