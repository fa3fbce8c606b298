#!/usr/bin/env bash
# From a dense target to a compressed one with a drafter of its own: prune to 2:4 and quantise to int4 in one pass, measure the loss,
# train a draft model on the compressed target, verify that it is lossless, and measure its speed.
#
#   ./launch.sh recipes/compress_target.sh TARGET TRAIN TEST OUT
#
# TARGET: folder of the dense target. TRAIN and TEST: files of rows; calibration and training read TRAIN, evaluation TEST. What exists
# in OUT is not made again, so the same command continues where it was stopped. Environment: SPARSITY=2:4, BITS=4, STEPS=1200,
# LENGTH=512 (calibration and evaluation windows), SAMPLES=128, WINDOWS=64.
#
# Measured 2026-11-27, one core of an AMD EPYC, torch 2.13.0 (CPU), float32, a 14.2M target, GSM8K, STEPS=60 WINDOWS=32 SAMPLES=64, in
# 7 minutes:
#   perplexity 9.030 (dense 8.842), KL 0.0259 nats per token, agreement 0.915
#   all 7 promises kept, 0 of 144 texts differ from plain decoding; tau 1.69 / 1.85 at depth 2 / 3 after these few steps
#   plain decoding 449 tokens/s, transformers 129 in the same run; with this draft of 60 steps 327
set -euo pipefail

target=${1:?usage: compress_target.sh TARGET TRAIN TEST OUT} train=${2:?TRAIN} test=${3:?TEST} out=${4:?OUT}
length=${LENGTH:-512} steps=${STEPS:-1200} run=$out/run resume=()

[ -e "$out/target/trainkit.json" ] || ./launch.sh compress "$target" "$out/target" --method sparsegpt --sparsity "${SPARSITY:-2:4}" \
    --bits "${BITS:-4}" --calibration "$train" --samples "${SAMPLES:-128}" --length "$length"
[ -e "$out/quality.json" ] || ./launch.sh evaluate "$out/target" --dense "$target" --text "$test" --length "$length" \
    --limit "${WINDOWS:-64}" --record true --json "$out/quality.json"

if [ ! -e "$out/draft/trainkit.json" ]; then
    [ ! -e "$run/checkpoints/last.ckpt" ] || resume=(--resume "$run")
    RUN_DIR=$run ./launch.sh recipes/draft_gsm8k.yaml ${resume[@]+"${resume[@]}"} --model.target "$out/target" --data.train "$train" \
        --data.validation null --data.validation_share 0.01 --trainer.max_steps "$steps" --trainer.val_check_interval "$steps"
    ./launch.sh export "$run/checkpoints/last.ckpt" "$out/draft"
fi

./launch.sh verify "$out/draft" --target "$out/target" --prompts "$test" --limit 8
./launch.sh bench --target "$out/target" --drafter "$out/draft" --prompts "$test" --limit 8 --max_new_tokens 128 --depths "[2,3]" \
    --json "$out/bench.json"
