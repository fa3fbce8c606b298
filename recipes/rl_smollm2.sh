#!/usr/bin/env bash
# RL fine-tunes SmolLM2-135M-Instruct through LoRA on a task of reasoning-gym, or, without that package, on sums of two numbers.
#
#   ./launch.sh recipes/rl_smollm2.sh TARGET OUT [TASK]
#
# TARGET: folder of SmolLM2-135M-Instruct, or another instruction-tuned model. OUT: folder of everything that is written; a run there is
# continued. TASK: a task of reasoning-gym whose answers are numbers, with its options; by default chain_sum of two numbers. `sums` takes
# the sums. Environment: STEPS=20 (optimiser steps).
set -euo pipefail

target=${1:?usage: rl_smollm2.sh TARGET OUT [TASK]} out=${2:?OUT} task=${3:-chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=2}
run=$out/run resume=() steps=${STEPS:-20}

if [ "$task" != sums ] && ! python -c "import reasoning_gym" 2>/dev/null; then
    echo "reasoning-gym is not installed, so the task is sums of two numbers; docs/rl.md says how to install it" >&2
    task=sums
fi
instruction="Answer with the number only."
if [ "$task" = sums ]; then
    python data/digit_sums.py "$out/tasks" --prompt "What is {a} + {b}? $instruction"
    data=(--data.train "$out/tasks/train.jsonl" --data.validation "$out/tasks/validation.jsonl")
else
    task=reasoning_gym:$task$([[ $task == *\?* ]] && echo "&" || echo "?")instruction=$instruction # and further options
    data=(--data.train "$task&size=2000&seed=1" --data.validation "$task&size=64&seed=2")
fi

[ ! -e "$run/checkpoints/last.ckpt" ] || resume=(--resume "$run")
RUN_DIR=$run ./launch.sh recipes/rl_smollm2.yaml ${resume[@]+"${resume[@]}"} --model.target "$target" --trainer.max_steps "$steps" \
    "${data[@]}"
./launch.sh export "$run/checkpoints/last.ckpt" "$out/policy" >/dev/null
echo "see $out: policy is the merged model, run/completions has responses"
