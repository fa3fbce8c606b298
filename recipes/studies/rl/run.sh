#!/usr/bin/env bash
# Study of RL fine-tuning at a small size. Groups: `algorithms` (GRPO, DAPO, GSPO and others on the digit task), `thr` (token reweighting
# with p < 0, 0 and > 0 from a start that adds badly), `infalign` (the best-of-4 transform against the identity at several betas,
# on a graded reward). A run that exists is not made again, so the same command continues an interrupted study. Tables: tables.py.
#
#   ./launch.sh recipes/studies/rl/run.sh OUT [GROUPS...]
#
# Environment: SEEDS="0 1 2", STEPS=160 (optimiser steps), THR_STEPS=200, ALIGN_STEPS=60.
set -euo pipefail

out=${1:?usage: run.sh OUT [GROUPS...]}
shift
[ $# -gt 0 ] || set -- algorithms thr infalign
seeds=${SEEDS:-0 1 2}

# start NAME STEPS NOISE: a supervised start in OUT/NAME.
start() {
    [ ! -e "$out/$1/config.json" ] || return 0
    python data/digit_sums.py "$out/data-$1" --noise "$3"
    rm -rf "$out/run-$1"
    RUN_DIR=$out/run-$1 ./launch.sh recipes/rl_digits/start.yaml --data.train "$out/data-$1/start.jsonl" \
        --data.tokenizer "$out/data-$1/tokenizer" --trainer.max_steps "$2" --trainer.val_check_interval "$2"
    ./launch.sh export "$out/run-$1/checkpoints/last.ckpt" "$out/$1" >/dev/null
}

# rl GROUP/NAME START SEED STEPS FLAGS...: trains OUT/GROUP/NAME-SEED without a drafter, and exports the policy.
rl() {
    local run=$out/$1-$3 from=$2 seed=$3 steps=$4
    shift 4
    [ ! -e "$run/policy/config.json" ] || return 0
    rm -rf "$run"
    RUN_DIR=$run ./launch.sh recipes/rl_digits.yaml --model.target "$out/$from" --model.drafter null --model.refresh null \
        --data.train "$out/data-$from/train.jsonl" --data.validation "$out/data-$from/validation.jsonl" \
        --seed_everything "$seed" --trainer.max_steps "$steps" --trainer.val_check_interval "$steps" "$@"
    ./launch.sh export "$run/checkpoints/last.ckpt" "$run/policy" >/dev/null
    rm -rf "$run/checkpoints"
}

algorithms() {
    local name seed
    start noisy 2000 0.42
    for seed in $seeds; do
        for name in GRPO DAPO GSPO DrGRPO CISPO; do
            rl "algorithms/$name" noisy "$seed" "${STEPS:-160}" --model.algorithm "$name"
        done
    done
}

# A start on exact answers that was stopped early, so that greedy accuracy and pass@k have room.
thr() {
    local seed p flags
    start early 450 0
    flags=(--model.optimizer.lr 1e-4 --model.warmup_steps 10) # at 5e-4 this start falls apart in the first steps
    for seed in $seeds; do
        rl thr/none early "$seed" "${THR_STEPS:-200}" "${flags[@]}"
        for p in -0.1 0 0.1; do
            rl "thr/p$p" early "$seed" "${THR_STEPS:-200}" "${flags[@]}" --model.reweight THR --model.reweight.p "$p"
        done
    done
    measure thr early exact
}

# Both transforms at several betas: they are compared at equal measured KL, not at equal beta.
infalign() {
    local seed beta kind digits
    digits=$PWD/recipes/studies/rl/rewards.py:digits
    start noisy 2000 0.42
    ./launch.sh infalign "$out/calibration.json" --target "$out/noisy" --prompts "$out/data-noisy/train.jsonl" --limit 1000 \
        --reward "$digits" --samples 16 --max_new_tokens 5 --batch 256
    for seed in $seeds; do
        for beta in 0.03 0.1 0.3; do
            for kind in identity best; do
                rl "infalign/$kind@$beta" noisy "$seed" "${ALIGN_STEPS:-60}" --data.limit 1000 --model.rewards "[{function: $digits}]" \
                    --model.algorithm.beta "$beta" --model.algorithm.scale none --model.transform InfAlign \
                    --model.transform.calibration "$out/calibration.json" --model.transform.kind "$kind"
            done
        done
    done
    measure infalign noisy "$digits"
}

# measure GROUP START REWARD: compares every policy of a group with its start.
measure() {
    python recipes/studies/rl/measure.py "$out/$2" "$out/$1"/*/policy --tasks "$out/data-$2/validation.jsonl" --reward "$3" \
        --json "$out/$1.json" --samples 16 --batch 256
}

for group in "$@"; do "$group"; done
