"""
What choosing negatives adds to a training step: `negative_selection="boundary"` with `dynamic_beta` against `"all"`.

```bash
python benchmarks/selection.py                                # CPU, float32, a quarter of an hour on two cores
python benchmarks/selection.py --device cuda --dtype bfloat16
```

One process, one trainer, one batch. A step is the trainer's forward, loss, metrics and backward, without the optimizer;
steps of the two settings take turns. What the selection adds is lost in the noise of a step, so that it is measured alone as
well: loss and backward down to the log-probabilities of the same batch, with and without it, in turns.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from step_cost import make_model, make_rows, make_tokenizer, now


SETTINGS = {
    "all": {"negative_selection": "all", "dynamic_beta": False},
    "boundary": {"negative_selection": "boundary", "dynamic_beta": True},
}


def make_trainer(options: argparse.Namespace, folder: str):
    from datasets import Dataset

    from trl_dmpo import DMPOConfig, DMPOTrainer

    policy, reference = make_model(options), make_model(options)
    args = DMPOConfig(
        folder,
        per_device_train_batch_size=options.batch,
        prefix_sharing=True,
        report_to="none",
        bf16=False,
        use_cpu=options.device == "cpu",
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    tokenizer = make_tokenizer(policy.config.vocab_size)
    dataset = Dataset.from_list(make_rows(options, options.batch, policy.config.vocab_size))
    return DMPOTrainer(policy, reference, args, train_dataset=dataset, processing_class=tokenizer)


def in_turns(work: Callable[[], None], args, rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of `work` under each of the settings, `rounds` times each; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for _ in range(rounds + 1):
        for name, settings in SETTINGS.items():
            for option, value in settings.items():
                setattr(args, option, value)
            start = now(device)
            work()
            times[name].append(now(device) - start)
    return {name: seconds[1:] for name, seconds in times.items()}


def measure(options: argparse.Namespace) -> dict:
    import torch

    from trl_dmpo.losses import dmpo
    from trl_dmpo.losses.selection import select_negatives

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(options, folder)
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    seen = []

    def keep(scores, config):
        seen.append(scores)
        return dmpo(scores, config)

    def step() -> None:
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, batch).backward()

    losses, trainer.losses = trainer.losses, [keep]
    step()
    trainer.losses = losses
    scores = replace(
        seen[0],
        **{
            field.name: value.detach()
            for field in fields(seen[0])
            if isinstance(value := getattr(seen[0], field.name), torch.Tensor)
        },
    )
    leaves = scores.chosen_logps.requires_grad_(), scores.rejected_logps.requires_grad_()

    def alone() -> None:
        loss = dmpo(select_negatives(scores, trainer.args), trainer.args).mean()
        torch.autograd.grad(loss, leaves)

    steps = in_turns(step, trainer.args, options.rounds, options.device)
    parts = in_turns(alone, trainer.args, options.repeats, options.device)
    on_gpu = options.device == "cuda"
    return {
        "settings": {
            name: getattr(options, name)
            for name in ("k", "batch", "prompt", "completion", "dtype", "rounds", "repeats")
        }
        | {"device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"},
        "step": {name: statistics.median(seconds) for name, seconds in steps.items()},
        "loss": {name: statistics.median(seconds) for name, seconds in parts.items()},
        "all_steps": steps,
    }


def table(figures: dict):
    from rich.table import Table

    settings, step, loss = figures["settings"], figures["step"], figures["loss"]
    out = Table(
        title=f"A step on {settings['batch']} prompt(s) of {settings['prompt']} tokens with {settings['k']} rejected "
        f"completions of {settings['completion']}, {settings['dtype']}, {settings['device']}"
    )
    for column in ("", "all", "boundary, dynamic beta", "added", "share of a step"):
        out.add_column(column, justify="right" if column else "left")
    for name, seconds, unit, scale in (("step", step, "s", 1), ("loss alone", loss, "ms", 1e3)):
        added = seconds["boundary"] - seconds["all"]
        out.add_row(
            name,
            *(f"{value * scale:.3f} {unit}" for value in (seconds["all"], seconds["boundary"], added)),
            f"{added / step['all']:.3%}",
        )
    return out


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--k", type=int, default=15, help="number of rejected completions")
    parser.add_argument("--batch", type=int, default=1, help="prompts of a batch")
    parser.add_argument("--prompt", type=int, default=300, help="tokens of a prompt")
    parser.add_argument("--completion", type=int, default=9, help="tokens of a completion")
    parser.add_argument("--rounds", type=int, default=15, help="measured steps of each setting")
    parser.add_argument("--repeats", type=int, default=300, help="measured losses of each setting")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    parser.add_argument("--tiny", action="store_true", help="a model of two thin layers, to see that the script runs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    from rich.console import Console

    options = parse()
    figures = measure(options)
    if options.output is not None:
        options.output.write_text(json.dumps(figures, indent=2) + "\n")
    Console(width=110).print(table(figures))
