"""Precomputed log-probabilities of the reference are used again only where they would be the same."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, load_from_disk
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.conftest import CHAT_TEMPLATE, make_dataset
from trl_dmpo import DMPOTrainer
from trl_dmpo.trainer import reference_cache
from trl_dmpo.trainer.reference_cache import hash_model


LORA = {"r": 2, "target_modules": ["q_proj"]}


@pytest.fixture
def rows(tmp_path) -> Path:
    """Rows in files, beside which the log-probabilities are kept."""
    make_dataset(4, [2, 3]).save_to_disk(tmp_path / "rows")
    return tmp_path / "rows"


@pytest.fixture
def batches(monkeypatch) -> list:
    """A list that grows with every batch of which the reference is computed."""
    computed = []
    compute = DMPOTrainer.compute_ref_log_probs

    def counted(self, model, inputs):
        computed.append(inputs)
        return compute(self, model, inputs)

    monkeypatch.setattr(DMPOTrainer, "compute_ref_log_probs", counted)
    return computed


@pytest.fixture
def build(model_path, tokenizer, make_args, rows):
    def make(model=None, data=None, peft=None, ref_model=None, processing_class=None, **options):
        return DMPOTrainer(
            model or model_path(),
            ref_model=ref_model,
            args=make_args(precompute_ref_log_probs=True, **options),
            train_dataset=load_from_disk(data or rows),
            processing_class=processing_class or tokenizer,
            peft_config=peft and LoraConfig(**peft),
        )

    return make


@pytest.fixture
def variant(model_path, tmp_path):
    """From a name and changes of the configuration to a copy of the model in another folder."""

    def make(name: str, **changes) -> str:
        path = tmp_path / name
        shutil.copytree(model_path(), path)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changes))
        return str(path)

    return make


def reference(trainer) -> torch.Tensor:
    return torch.tensor(trainer.train_dataset["ref_chosen_logps"])


class TestReused:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"beta": 0.5, "learning_rate": 1e-5, "num_negatives": 1, "seed": 7},
            {"prefix_sharing": False, "precompute_ref_batch_size": 1},
        ],
        ids=["same", "options of training", "other batches"],
    )
    def test_by_the_same_reference(self, build, batches, options):
        first = build()
        computed = len(batches)
        assert computed > 0
        again = build(**options)
        assert len(batches) == computed
        assert torch.equal(reference(first), reference(again))

    def test_by_another_adapter_on_the_same_model(self, build, batches, variant):
        torch.manual_seed(0)
        build(peft=LORA)
        computed = len(batches)
        torch.manual_seed(1)
        build(model=variant("elsewhere"), peft=LORA | {"r": 4})
        assert len(batches) == computed

    @pytest.mark.slow
    def test_by_another_process(self, model_path, rows, tmp_path):
        script = tmp_path / "train.py"
        script.write_text(_SCRIPT)
        outputs = [
            subprocess.run(
                [sys.executable, script, model_path(), rows, tmp_path / "out"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for _ in range(2)
        ]
        assert [output.split()[-1] for output in outputs] == ["2", "0"]


_SCRIPT = """
import sys
from datasets import load_from_disk
from trl_dmpo import DMPOConfig, DMPOTrainer

computed, compute = [], DMPOTrainer.compute_ref_log_probs
DMPOTrainer.compute_ref_log_probs = lambda self, *args: computed.append(1) or compute(self, *args)
args = DMPOConfig(sys.argv[3], precompute_ref_log_probs=True, use_cpu=True, bf16=False, precompute_ref_batch_size=2)
DMPOTrainer(sys.argv[1], args=args, train_dataset=load_from_disk(sys.argv[2]))
print(len(computed))
"""


class TestComputedAnew:
    @pytest.mark.parametrize(
        "options",
        [{"max_length": 12}, {"ld_alpha": 0.5}, {"bf16": True}],
        ids=["max_length", "ld_alpha", "mixed precision"],
    )
    def test_for_another_setting(self, build, batches, options):
        build()
        computed = len(batches)
        build(**options)
        assert len(batches) > computed

    def test_for_the_other_side_of_truncation(self, build, batches):
        build(max_length=12, truncation_mode="keep_start")
        computed = len(batches)
        build(max_length=12, truncation_mode="keep_end")
        assert len(batches) > computed

    def test_for_another_dtype(self, build, batches):
        build()
        computed = len(batches)
        build(model_init_kwargs={"dtype": "bfloat16"})
        assert len(batches) > computed

    def test_for_other_attention(self, build, batches):
        build()
        computed = len(batches)
        build(model_init_kwargs={"attn_implementation": "eager"})
        assert len(batches) > computed

    def test_for_other_weights(self, build, batches, variant):
        build()
        computed = len(batches)
        path = variant("other")
        model = AutoModelForCausalLM.from_pretrained(path)
        with torch.no_grad():
            model.model.norm.weight[3] += 1e-3
        model.save_pretrained(path)
        build(model=path)
        assert len(batches) > computed

    def test_for_the_same_weights_that_compute_something_else(self, build, batches, variant):
        first = build()
        computed = len(batches)
        other = build(model=variant("other", rope_parameters={"rope_type": "default", "rope_theta": 500.0}))
        assert len(batches) > computed
        assert not torch.allclose(reference(first), reference(other))

    def test_for_another_scale_of_a_pretrained_adapter(self, build, batches, model_path):
        found = []
        for alpha in (2, 8):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_pretrained(model_path())
            config = LoraConfig(**LORA, lora_alpha=alpha, init_lora_weights=False)
            before = len(batches)
            found.append(reference(build(model=get_peft_model(model, config))))
            assert len(batches) > before
        assert not torch.allclose(*found)

    def test_for_other_rows(self, build, batches, tmp_path):
        build()
        computed = len(batches)
        more = make_dataset(4, [2, 4])
        more.save_to_disk(tmp_path / "more")
        build(data=tmp_path / "more")
        assert len(batches) > computed

    def test_for_another_template(self, build, batches, tokenizer, tmp_path):
        rows = make_dataset(4, 2).map(_as_messages)
        rows.save_to_disk(tmp_path / "chat")
        build(data=tmp_path / "chat")
        computed = len(batches)
        other = type(tokenizer).from_pretrained(_saved(tokenizer, tmp_path / "tokenizer"))
        other.chat_template = CHAT_TEMPLATE.replace("<|end|>", "<|end|>\n")
        build(data=tmp_path / "chat", processing_class=other)
        assert len(batches) > computed


def _as_messages(row: dict) -> dict:
    def said(role: str, text: str) -> list[dict]:
        return [{"role": role, "content": text}]

    return {
        "prompt": said("user", row["prompt"]),
        "chosen": said("assistant", row["chosen"]),
        "rejected": [said("assistant", text) for text in row["rejected"]],
    }


def _saved(tokenizer, path: Path) -> Path:
    tokenizer.save_pretrained(path)
    return path


class TestBrokenFile:
    @pytest.mark.parametrize("kept", [0.0, 0.3, 0.8], ids=["empty", "in its head", "in its rows"])
    def test_is_not_read(self, build, batches, kept, monkeypatch):
        warned = []
        monkeypatch.setattr(reference_cache, "logger", SimpleNamespace(warning=warned.append))
        expected, computed = reference(build()), len(batches)
        path = _file_of(build())
        assert len(batches) == computed
        path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
        again = build()
        assert len(batches) == 2 * computed
        assert torch.equal(reference(again), expected)
        assert len(warned) == 1
        assert str(path) in warned[0]
        assert "computed anew" in warned[0]

    def test_is_not_read_if_it_ends_between_batches_of_rows(self, build, batches, tmp_path):
        path = _file_of(build())
        computed = len(batches)
        whole = Dataset.from_file(str(path))
        whole.select(range(3)).map(lambda row: row, cache_file_name=str(tmp_path / "short.arrow"))
        path.write_bytes((tmp_path / "short.arrow").read_bytes())
        build()
        assert len(batches) == 2 * computed

    def test_is_not_left_by_a_process_that_is_killed(self, build, batches, rows, monkeypatch):
        """What is written goes to a file of another name, which the last step renames."""
        files = set(rows.glob("cache-*"))
        monkeypatch.setattr("datasets.arrow_dataset.shutil.move", _die_before_the_logps)
        with pytest.raises(KeyboardInterrupt):
            build()
        assert not [path for path in set(rows.glob("cache-*")) - files if "ref_chosen_logps" in _columns(path)]
        monkeypatch.undo()


def _die_before_the_logps(source: str, target: str) -> None:
    if "ref_chosen_logps" in _columns(Path(source)):
        raise KeyboardInterrupt
    shutil.copyfile(source, target)


def _columns(path: Path) -> list[str]:
    return Dataset.from_file(str(path)).column_names


def _file_of(trainer) -> Path:
    files = [Path(each["filename"]) for each in trainer.train_dataset.cache_files]
    return next(path for path in files if "ref_chosen_logps" in _columns(path))


class TestHash:
    def test_knows_weights_that_deepspeed_has_partitioned(self):
        hashes = []
        for value in (1.0, 2.0):
            layer = torch.nn.Linear(2, 1, bias=False)
            layer.weight.data = torch.empty(0)
            layer.weight.ds_tensor = torch.full((2,), value)
            hashes.append(hash_model(layer))
        assert hashes[0] != hashes[1]
