#!/usr/bin/env bash
# Study of compression and acceptance: a target is compressed in several ways; a draft model that was trained on the dense target
# drafts for each, then one that was trained for it; and the draft model itself is compressed. Results: README.md.
# Files that exist are not made again, so the same command continues an interrupted study.
#
#   ./launch.sh recipes/studies/compression/run.sh TARGET DATA OUT
#
# TARGET: folder of the dense target. DATA: folder with train.jsonl and test.jsonl.
# Environment: STEPS=300 (of each draft model), SAMPLES=128 and LENGTH=512 (calibration), QUESTIONS=40, DEPTH=3.
set -euo pipefail

target=${1:?usage: run.sh TARGET DATA OUT} data=${2:?DATA} out=${3:?OUT}
steps=${STEPS:-300} calibration=(--calibration "$data/train.jsonl" --samples "${SAMPLES:-128}" --length "${LENGTH:-512}")
mkdir -p "$out/targets" "$out/drafts"

say() { printf '== %s (%d s so far)\n' "$1" "$SECONDS"; }

# squeeze FOLDER NAME FLAGS...: compresses FOLDER into OUT/NAME.
squeeze() {
    local folder=$1 name=$2
    shift 2
    [ -e "$out/$name/trainkit.json" ] || { say "$name" && ./launch.sh compress "$folder" "$out/$name" "$@"; }
}

# draft NAME TARGET: trains a draft model for TARGET.
draft() {
    local resume=()
    [ ! -e "$out/drafts/$1/trainkit.json" ] || return 0
    say "train a draft model for $1"
    [ ! -e "$out/runs/$1/checkpoints/last.ckpt" ] || resume=(--resume "$out/runs/$1")
    RUN_DIR=$out/runs/$1 ./launch.sh recipes/draft_gsm8k.yaml ${resume[@]+"${resume[@]}"} --model.target "$2" \
        --data.train "$data/train.jsonl" --data.validation null --data.validation_share 0.01 --trainer.max_steps "$steps" \
        --trainer.val_check_interval "$steps"
    ./launch.sh export "$out/runs/$1/checkpoints/last.ckpt" "$out/drafts/$1"
}

draft dense "$target"
squeeze "$target" targets/int8 --method gptq --bits 8 "${calibration[@]}"
squeeze "$target" targets/int4 --method gptq --bits 4 --group 128 "${calibration[@]}"
squeeze "$target" targets/int4g32 --method gptq --bits 4 --group 32 "${calibration[@]}"
squeeze "$target" targets/2of4 --method sparsegpt --sparsity 2:4 "${calibration[@]}"
squeeze "$target" targets/s60 --method sparsegpt --sparsity 0.6 "${calibration[@]}"
squeeze "$target" targets/s70 --method sparsegpt --sparsity 0.7 "${calibration[@]}"
draft int4 "$out/targets/int4"
draft 2of4 "$out/targets/2of4"
squeeze "$out/drafts/dense" drafts/dense-int8 --method rtn --bits 8
squeeze "$out/drafts/dense" drafts/dense-int4 --method gptq --bits 4 --group 128 "${calibration[@]}"
squeeze "$out/drafts/dense" drafts/dense-50 --method sparsegpt --sparsity 0.5 "${calibration[@]}"
squeeze "$out/drafts/dense" drafts/dense-2of4 --method sparsegpt --sparsity 2:4 "${calibration[@]}"
squeeze "$out/drafts/dense" drafts/dense-70 --method sparsegpt --sparsity 0.7 "${calibration[@]}"

say "tau of every pair"
pairs=()
for name in int8 int4 int4g32 2of4 s60 s70; do pairs+=("$out/targets/$name:$out/drafts/dense"); done
for name in int4 2of4; do pairs+=("$out/targets/$name:$out/drafts/$name"); done
for name in int8 int4 50 2of4 70; do pairs+=("$target:$out/drafts/dense-$name"); done
python recipes/studies/compression/tables.py measure "$data/test.jsonl" "$out/tau.json" "$target:$out/drafts/dense" "${pairs[@]}"
python recipes/studies/compression/tables.py table "$out/tau.json"
say "done"
