"""`trl-dmpo train`: TRL's training script, for [`DMPOTrainer`] and for local files."""

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

from trl_dmpo.cli.errors import one_line_errors


if TYPE_CHECKING:
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

    from trl_dmpo import DMPOConfig, DMPOTrainer
    from trl_dmpo.cli.arguments import TrainParser


def make_parser(prog: str | None = None) -> "TrainParser":
    """The parser of all options, of a script or of the sub-command."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

    from trl_dmpo import DMPOConfig
    from trl_dmpo.cli.arguments import TrainParser

    return TrainParser((ScriptArguments, DMPOConfig, ModelConfig, DatasetMixtureConfig), prog=prog)


def build_trainer(
    script_args: "ScriptArguments",
    training_args: "DMPOConfig",
    model_args: "ModelConfig",
    dataset_args: "DatasetMixtureConfig",
) -> "DMPOTrainer":
    """The trainer that the options describe."""
    from trl import get_peft_config, get_quantization_config

    from trl_dmpo import DMPOTrainer
    from trl_dmpo.cli.dataset import load_splits, select_splits

    if model_args.model_name_or_path is None:
        raise ValueError("Give a model: `--model_name_or_path`, a name on the Hub or a folder.")
    if (model_args.load_in_4bit or model_args.load_in_8bit) and find_spec("bitsandbytes") is None:
        raise ValueError("Loading in 4 or 8 bits needs bitsandbytes: pip install 'trl-dmpo[quantization]'")
    train_dataset, eval_dataset = select_splits(load_splits(script_args, dataset_args), script_args, training_args)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    trainer = DMPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    if script_args.ignore_bias_buffers:
        import torch

        # https://github.com/huggingface/transformers/issues/22482#issuecomment-1595790992
        trainer.model._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool
        ]
    return trainer


def main(
    script_args: "ScriptArguments",
    training_args: "DMPOConfig",
    model_args: "ModelConfig",
    dataset_args: "DatasetMixtureConfig",
) -> None:
    """Train as the options say, and save the model."""
    with one_line_errors():
        trainer = build_trainer(script_args, training_args, model_args, dataset_args)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.accelerator.print("✅ Training completed.")

    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"💾 Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"🤗 Model pushed to the Hub in https://huggingface.co/{trainer.hub_model_id}.")
    if hasattr(trainer, "end"):  # since transformers 5.18: finishes the trackers and the process group
        trainer.end()


def run(argv: list[str]) -> int:
    """Run the sub-command, through `accelerate launch` if one of its options is given; returns the exit code."""
    parser = make_parser(prog="trl-dmpo train")
    parsed, launch_args = parser.parse_with_launch_args(argv, include_config=True)
    if launch_args:
        launch(launch_args, argv)
    else:
        main(*parsed)
    return 0


def launch(launch_args: list[str], argv: list[str]) -> None:
    """Run this file, with all that was given, in the processes that `launch_args` asks for."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    from trl_dmpo.cli.arguments import resolve_launch_config

    # Quiet: an error of the training is on the screen already, without that of a process that has failed
    args = [*resolve_launch_config(launch_args), "--quiet", "--module", "trl_dmpo.cli.train", *argv]
    launch_command(launch_command_parser().parse_args(args))


if __name__ == "__main__":  # in a process of `accelerate launch`: options for it have done their work
    parsed, _ = make_parser(prog="trl-dmpo train").parse_with_launch_args(sys.argv[1:])
    main(*parsed)
