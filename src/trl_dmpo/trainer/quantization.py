"""What weights quantized by bitsandbytes need to be trained."""

import torch


def keep_differentiable(model: torch.nn.Module) -> None:
    """
    Keep the 4-bit layers of `model` in the form through which gradients flow.

    On a CPU with AVX512-BF16, the first pass in evaluation mode would repack their weights in place for an inference kernel
    without a backward, which every later step of training then runs too: the layers below get no gradient through the frozen
    weights, and the scales of these are rounded to bfloat16.

    Args:
        model ([`~torch.nn.Module`]):
            The model to be trained; others are left as they are.

    Raises:
        `ValueError`: the weights are repacked already; the rounding cannot be undone.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"The 4-bit weights of `model` (first: {name}) were repacked for inference when it ran in evaluation mode "
                "on this CPU, and pass no gradients any more. Load the model anew, and train it before you run it; in "
                "`model.train()` it can be run without harm."
            )
        module.support_avx512bf16_for_cpu = False
