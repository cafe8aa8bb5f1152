# /// script
# dependencies = [
#     "trl-dmpo",
#     "trackio",
#     "kernels",
# ]
# ///

"""
Train a model on one chosen completion against several rejected ones. The dataset, a name on the Hub, a folder, or a
`.json`, `.jsonl` or `.parquet` file, has the columns `prompt`, `chosen` and `rejected`, a list.

# Full training
```bash
python examples/scripts/dmpo.py \
    --dataset_name rows.jsonl \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --loss_type dmpo sft \
    --loss_weights 1.0 1.0 \
    --learning_rate 1.0e-6 \
    --num_train_epochs 1 \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 8 \
    --output_dir Qwen3-0.6B-DMPO
```

# LoRA
```bash
python examples/scripts/dmpo.py \
    --dataset_name rows.jsonl \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --loss_type dmpo sft \
    --loss_weights 1.0 1.0 \
    --learning_rate 1.0e-5 \
    --num_train_epochs 1 \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 8 \
    --output_dir Qwen3-0.6B-DMPO \
    --use_peft \
    --lora_r 32 \
    --lora_alpha 16
```

# QLoRA
```bash
pip install 'trl-dmpo[quantization]'
python examples/scripts/dmpo.py \
    --dataset_name rows.jsonl \
    --model_name_or_path Qwen/Qwen3-8B \
    --dtype bfloat16 \
    --load_in_4bit \
    --loss_type dmpo sft \
    --loss_weights 1.0 1.0 \
    --learning_rate 1.0e-5 \
    --num_train_epochs 1 \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 8 \
    --output_dir Qwen3-8B-DMPO \
    --use_peft \
    --lora_r 32 \
    --lora_alpha 16
```

On several GPUs, put `accelerate launch` in the place of `python`. `trl-dmpo train` takes the same options.
"""

from trl_dmpo.cli.train import main, make_parser


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
