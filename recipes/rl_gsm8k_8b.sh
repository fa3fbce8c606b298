#!/usr/bin/env bash
# RL on GSM8K for an 8B model (Llama-3.1-8B-Instruct, Qwen3-8B) through LoRA, on one machine with 8 GPUs: train, export, evaluate.
#
#   NPROC=8 ./launch.sh recipes/rl_gsm8k_8b.sh TARGET [DRAFTER]
#
# TARGET: folder of the model. DRAFTER: bundle of a drafter for it, such as recipes/draft_8b.sh and heads_8b.sh make; responses are then
# generated faster and are the same. A run that was stopped is continued. WANDB_MODE=online with WANDB_API_KEY uploads the run at once;
# `wandb sync runs/rl-gsm8k-8b/wandb/offline-run-*` does so later.
# NOT RUN at this size yet: we have no machine that can hold it. recipes/rl_digits.sh is the same path at a small size, measured.
set -euo pipefail

target=${1:?usage: rl_gsm8k_8b.sh TARGET [DRAFTER]} run=runs/rl-gsm8k-8b flags=()
[ -z "${2:-}" ] || flags=(--model.drafter "$2" --model.speculate auto)
[ ! -e "$run/checkpoints/last.ckpt" ] || flags+=(--resume "$run")

RUN_DIR=$run ./launch.sh recipes/rl_gsm8k_8b.yaml ${flags[@]+"${flags[@]}"} --model.target "$target" \
    --trainer.logger configs/logger/wandb.yaml
./launch.sh export "$run/checkpoints/best.ckpt" models/rl-gsm8k-8b --dtype bfloat16
./launch.sh evaluate models/rl-gsm8k-8b --tasks gsm8k --chat true --dense "$target" --device cuda --dtype bfloat16
