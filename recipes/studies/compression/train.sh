#!/usr/bin/env bash
# Study of compression during training: which loss recovers a pruned model, and whether progressive gradient flow beats fixed masks.
# A row that exists is not run again, so the same command continues an interrupted study. Tables: train_tables.py.
#
#   ./launch.sh recipes/studies/compression/train.sh TARGET DATA OUT [GROUPS...]
#
# TARGET: folder of the dense model. DATA: folder with train.jsonl and test.jsonl. GROUPS: recovery, flow; both by default.
# Environment: STEPS=60, ROWS=2 (packed rows of a step), LENGTH=512, LR=2e-4, VALIDATION=100 (rows of test.jsonl), SEEDS="0 1 2".
set -euo pipefail

target=${1:?usage: train.sh TARGET DATA OUT [GROUPS...]} data=${2:?DATA} out=${3:?OUT}
shift 3
[ $# -gt 0 ] || set -- recovery flow
steps=${STEPS:-60} seeds=${SEEDS:-0 1 2}

# row NAME RECIPE FOLDER FLAGS...: trains OUT/NAME, or with STEPS 0 only validates it.
row() {
    local run=$out/$1 recipe=recipes/$2.yaml folder=$3
    shift 3
    [ ! -e "$run/done" ] || return 0
    rm -rf "$run"
    RUN_DIR=$run ./launch.sh "$recipe" --model.folder "$folder" --model.teacher "$target" --data.train "$data/train.jsonl" \
        --data.validation "$data/test.jsonl" --data.limit_validation "${VALIDATION:-100}" --data.cache "$out/prepared" \
        --data.batch_size "${ROWS:-2}" --data.length "${LENGTH:-512}" --model.optimizer.lr "${LR:-2e-4}" \
        --trainer.max_steps "$steps" --trainer.val_check_interval "$steps" --model.warmup_steps 5 "$@"
    rm -rf "$run/checkpoints"
    touch "$run/done"
}

# Every loss at equal tokens, from Wanda's masks without refinement; and the dense model with the same training, where its loss is
# not zero from the start, as it is with the teacher's distribution. Rows `start` take no step: learning rate 0.
recovery() {
    local sparsity loss
    local dense=(--model.compression GradualMagnitude --model.compression.sparsity 1e-9) # a share that prunes no weight
    row dense/start compress_sparse "$target" "${dense[@]}" --model.optimizer.lr 0 --trainer.max_steps 1 --trainer.val_check_interval 1
    row dense/CrossEntropy compress_sparse "$target" "${dense[@]}" --model.divergence CrossEntropy
    for sparsity in 2:4 0.6; do
        [ -e "$out/pruned-$sparsity/trainkit.json" ] || ./launch.sh compress "$target" "$out/pruned-$sparsity" --method wanda \
            --refine none --sparsity "$sparsity" --calibration "$data/train.jsonl" --length 512
        row "$sparsity/start" compress_recover "$out/pruned-$sparsity" --model.optimizer.lr 0 --trainer.max_steps 1 \
            --trainer.val_check_interval 1
        for loss in ForwardKL TV JSD CrossEntropy; do
            row "$sparsity/$loss" compress_recover "$out/pruned-$sparsity" --model.divergence "$loss"
        done
    done
}

# Methods of sparse training at equal steps, each with all seeds (order of the rows).
flow() {
    local sparsity seed flags
    flags=(--model.compression.sparsity)
    for seed in $seeds; do
        for sparsity in 2:8 1:8; do
            row "$sparsity/HardMask-$seed" compress_sparse "$target" --model.compression HardMask "${flags[@]}" "$sparsity" --seed_everything "$seed"
            row "$sparsity/SRSTE-$seed" compress_sparse "$target" --model.compression SRSTE "${flags[@]}" "$sparsity" --seed_everything "$seed"
            row "$sparsity/MaskDecay-$seed" compress_sparse "$target" "${flags[@]}" "$sparsity" --seed_everything "$seed"
            row "$sparsity/StructureDecay-$seed" compress_sparse "$target" --model.compression StructureDecay "${flags[@]}" "$sparsity" --seed_everything "$seed"
        done
    done
}

for group in "$@"; do "$group"; done
