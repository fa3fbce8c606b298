#!/usr/bin/env bash
# Medusa, Hydra, Hydra++, EAGLE-3 and a draft model, each trained on the same tokens for the same target, exported, given the best
# tree of so many nodes, and measured side by side. recipes/heads.md has the results, recipes/heads.py makes its tables.
# What is there is not made again, so an interrupted run goes on where it stopped.
#
#   ./launch.sh recipes/heads.sh TARGET DATA OUT [KINDS...]
#
# TARGET: the target's folder. DATA: a folder with train.jsonl and test.jsonl. KINDS: of configs/drafter/, by default all.
# Environment: STEPS=1500, DEPTH=3, KEEP=1024 (ids in the drafters' vocabulary), NODES=8 (rows verified), QUESTIONS=100,
# DEVICE=cpu.
set -euo pipefail

target=${1:?usage: heads.sh TARGET DATA OUT [KINDS...]} data=${2:?DATA} out=${3:?OUT}
shift 3
[ $# -gt 0 ] || set -- lm medusa hydra hydra_plus eagle
steps=${STEPS:-1500} depth=${DEPTH:-3} keep=${KEEP:-1024} nodes=${NODES:-8} device=${DEVICE:-cpu}
mkdir -p "$out/drafts"

say() { printf '== %s (%d s so far)\n' "$1" "$SECONDS"; }

# The target's own greedy answers to every training question, and the ids it writes most.
distilled() {
    say "answers to train on"
    ./launch.sh distill --target "$target" --prompts "$data/train.jsonl" --temperatures "[0]" --max_new_tokens 256 --batch 48 \
        --device "$device" --out "$out/greedy"
    [ -e "$out/ids.json" ] || ./launch.sh vocab "$out/ids.json" --target "$target" --text "$out/greedy" --keep "$keep"
}

# drafter KIND: trains and exports OUT/drafts/KIND, and searches its tree on questions that it was trained on.
drafter() {
    local kind=$1 run=$out/runs/$1 resume=() levels=()
    case $kind in
    medusa | hydra | hydra_plus) levels=(--model.drafter.num_heads "$depth") ;;
    eagle) levels=(--model.drafter.steps "$depth") ;;
    esac
    if [ ! -e "$out/drafts/$kind/trainkit.json" ]; then
        say "train $kind"
        [ ! -e "$run/checkpoints/last.ckpt" ] || resume=(--resume "$run")
        RUN_DIR=$run ./launch.sh recipes/heads.yaml ${resume[@]+"${resume[@]}"} --model.target "$target" \
            --model.drafter "$PWD/configs/drafter/$kind.yaml" ${levels[@]+"${levels[@]}"} \
            --model.drafter.draft_vocab "$out/ids.json" --model.depth "$depth" --model.teacher_cache "$out/states" \
            --data.train "$out/greedy" --data.cache "$out/prepared" --trainer.max_steps "$steps"
        ./launch.sh export "$run/checkpoints/last.ckpt" "$out/drafts/$kind"
    fi
    if [ ! -e "$out/drafts/$kind.tree.txt" ]; then
        say "search the tree of $kind"
        ./launch.sh tree "$out/drafts/$kind" --target "$target" --prompts "$data/train.jsonl" --depth "$depth" --nodes "$nodes" \
            --device "$device" >"$out/drafts/$kind.tree.partial"
        mv "$out/drafts/$kind.tree.partial" "$out/drafts/$kind.tree.txt"
    fi
}

distilled
drafts=()
for kind in "$@"; do
    drafter "$kind"
    drafts+=("$out/drafts/$kind")
done

# Tau on 100 test questions, chains and trees; tokens compared with plain decoding's.
say "tau"
python recipes/heads.py measure "$target" "$data/test.jsonl" "$out/tau.json" "$depth" "${drafts[@]}"

# Wall-clock, all beside one plain decoding.
say "speed"
[ -e "$out/bench.json" ] || ./launch.sh bench --target "$target" "${drafts[@]/#/--drafter=}" --prompts "$data/test.jsonl" --limit 8 \
    --max_new_tokens 128 --depths "[2,3]" --repeats 5 --device "$device" --json "$out/bench.json" --plot "$out/bench.png"
python recipes/heads.py table "$out"
say "done"
