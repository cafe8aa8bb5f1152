"""Tiny models and tokenizers, built locally once a session. Nothing here needs a network."""

import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"

# TRL 1.15 runs its LM head on Triton even without a GPU: in an interpreter, program by program
not_interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="takes Triton's interpreter minutes; runs with the newest TRL"
)

TITLES = ["Alien", "Aliens", "Heat", "Red Heat", "Big", "Babe", "Amélie", "Léon", "東京物語", "Se7en", "Fargo", "Jaws"]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [f"User {u} has watched {a}, {b}. Next: {a}" for u, (a, b) in enumerate(pairwise(TITLES))]
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_rows(count: int, negatives: int | list[int], seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        k = negatives if isinstance(negatives, int) else negatives[index % len(negatives)]
        titles = [TITLES[i] for i in torch.randperm(len(TITLES), generator=generator)]
        history, (chosen, *rejected) = titles[: 1 + index % 3], titles[3 : 4 + k]
        rows.append(
            {
                "prompt": f"User {index} has watched {', '.join(history)}. Next:",
                "chosen": f" {chosen}",
                "rejected": [f" {title}" for title in rejected],
            }
        )
    return rows


def make_dataset(count: int, negatives: int | list[int], seed: int = 0) -> Dataset:
    return Dataset.from_list(make_rows(count, negatives, seed))


ARCHITECTURES: dict[str, dict] = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256},
    "gemma3_text": {"head_dim": 16, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"sliding_window": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 0.0,
    },
}


def build_model(architecture: str, vocab_size: int, folder: Path, **overrides) -> Path:
    """A tiny model with random weights, saved, so that a reference model can be loaded from its path."""
    from transformers import CONFIG_MAPPING

    path = folder / architecture
    if not path.exists():
        common = {
            "vocab_size": vocab_size,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 512,
            "pad_token_id": 1,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        if architecture in ("gpt2", "bloom"):
            common = {name: common[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
        # Larger than usual, so that attention matters and a wrong mask shows
        config = CONFIG_MAPPING[architecture](
            **common, initializer_range=0.3, **ARCHITECTURES[architecture], **overrides
        )
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def model_path(tokenizer, tmp_path_factory):
    """From the name of an architecture to the folder of a tiny model of it."""
    folder = tmp_path_factory.mktemp("models")

    def build(architecture: str = "llama") -> str:
        path = build_model(architecture, len(tokenizer), folder)
        tokenizer.save_pretrained(path)
        return str(path)

    return build


@pytest.fixture
def make_args(tmp_path):
    """From options to a configuration that trains a few steps on the CPU, in float32."""

    def make(cls=None, **options):
        from trl_dmpo import DMPOConfig

        defaults = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 2,
            "max_steps": 2,
            "learning_rate": 1e-3,
            "beta": 0.1,  # of TRL and of ours, whose defaults differ
            "logging_steps": 1,
            "report_to": "none",
            "bf16": False,
            "gradient_checkpointing": False,
            "use_cpu": True,
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        return (cls or DMPOConfig)(**(defaults | options))

    return make
