#!/usr/bin/env bash
# Study of the drafter refresh: tau of a drafter that stays as it was and of one that is refreshed, while the target moves, by
# supervised steps on other text (the hard case) and by RL. Tables: refresh.py. A part whose file exists is not made again.
#
#   ./launch.sh recipes/studies/rl/refresh.sh TARGET DRAFTER DATA TEXT OUT
#
# TARGET: folder of the target. DRAFTER: a bundle for it. DATA: folder with train.jsonl and test.jsonl of GSM8K. TEXT: a text file of
# another kind (Tiny Shakespeare). Environment: STEPS=60, LR=3e-4 (of the supervised steps).
set -euo pipefail

target=${1:?usage: refresh.sh TARGET DRAFTER DATA TEXT OUT} drafter=${2:?DRAFTER} data=${3:?DATA} text=${4:?TEXT} out=${5:?OUT}
steps=${STEPS:-60} lr=${LR:-3e-4}
mkdir -p "$out"

for positions in mixed all rejected; do
    [ -e "$out/$positions.jsonl" ] || {
        python recipes/studies/rl/refresh.py drift "$target" "$drafter" "$text" "$out/part.jsonl" "$steps" "$lr" "$positions"
        mv "$out/part.jsonl" "$out/$positions.jsonl"
    }
done

fit() { # NAME flags...
    [ -e "$out/rl-$1" ] || RUN_DIR=$out/rl-$1 ./launch.sh recipes/studies/rl/refresh.yaml --model.target "$target" \
        --model.drafter "$drafter" --data.train "$data/train.jsonl" --data.validation "$data/test.jsonl" "${@:2}"
}
fit frozen
fit refreshed --model.refresh Refresh --model.refresh.every 5 --model.refresh.batch 8 --model.refresh.lr 1e-4
fit joint --model.refresh JointRefresh --model.refresh.lr 1e-4

python recipes/studies/rl/refresh.py table "$out"/{mixed,all,rejected}.jsonl
python recipes/studies/rl/refresh.py curves "$out"/rl-{frozen,refreshed,joint}
