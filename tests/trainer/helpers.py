"""What several tests of the trainer share."""

import torch
from datasets import Dataset


def pair_dataset(rows: list[dict]) -> Dataset:
    """Rows of K rejected completions as TRL's pairs, K rows each."""
    return Dataset.from_list([{**row, "rejected": rejected} for row in rows for rejected in row["rejected"]])


def first_step(trainer) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one training step on all rows of the training set, before the optimizer."""
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-6, "a comparison of zeros proves nothing"
    return loss.item(), gradients


def assert_same_step(left, right, rtol: float = 1e-4, atol: float = 2e-5) -> None:
    """Loss and every gradient are equal up to float32 noise, relative to the largest gradient."""
    torch.testing.assert_close(torch.tensor(left[0]), torch.tensor(right[0]), rtol=rtol, atol=atol)
    assert left[1].keys() == right[1].keys()
    scale = max(gradient.abs().max().item() for gradient in left[1].values())
    for name, gradient in left[1].items():
        torch.testing.assert_close(
            gradient, right[1][name], rtol=rtol, atol=atol * max(scale, 1), msg=lambda m, n=name: f"{n}: {m}"
        )


def perturb(model, scale: float = 0.05, seed: int = 1) -> None:
    """Move the policy away from its reference, so that log-ratios are not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".ref." not in name:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
