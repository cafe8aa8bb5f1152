"""The configurations in `examples/accelerate_configs`, as `accelerate launch` reads them."""

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from tests.conftest import ROOT
from trl_dmpo.cli.arguments import resolve_launch_config


CONFIGS = sorted((ROOT / "examples" / "accelerate_configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_starts_what_its_name_says(path):
    launch_args = [*resolve_launch_config(["--accelerate_config", str(path)]), "train.py"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(launch_args))
    # Of `distributed_type: MULTI_CPU`, accelerate starts one process, whatever `num_processes` says
    assert (args.multi_gpu, args.use_fsdp, args.use_deepspeed) == (
        path.stem in ("cpu", "multi_gpu"),
        path.stem == "fsdp2",
        path.stem.startswith("deepspeed"),
    )
    assert args.num_processes >= 2
    assert args.use_cpu == (path.stem == "cpu")
    if args.use_fsdp:
        assert args.fsdp_version == 2
    if args.use_deepspeed:
        assert args.zero_stage == int(path.stem[-1])
