#!/usr/bin/env bash
# Study of a draft model: which loss, which training text, which vocabulary and which size make it fast. Each row of the study is
# trained from the same start with three seeds, measured on all test questions and written to OUT/rows. A row that exists is not
# run again, so the same command continues an interrupted study. Results: README.md. Tables and plots: tables.py.
#
#   ./launch.sh recipes/studies/losses/run.sh TARGET DATA OUT [GROUPS...]
#
# TARGET: folder of the target. DATA: folder with train.jsonl and test.jsonl. GROUPS: groups of rows, all by default:
# losses policies pipeline scaling trimmed best speed. Environment: SEEDS="0 1 2", STEPS=250, PROMPTS=750, DEVICE=cpu.
set -euo pipefail

target=${1:?usage: run.sh TARGET DATA OUT [GROUPS...]} data=${2:?DATA} out=${3:?OUT}
shift 3
[ $# -gt 0 ] || set -- losses policies pipeline scaling trimmed best speed
seeds=${SEEDS:-0 1 2} steps=${STEPS:-250} prompts=${PROMPTS:-750} device=${DEVICE:-cpu}
mkdir -p "$out/rows" "$out/drafts"

say() { printf '== %s (%d s so far)\n' "$1" "$SECONDS"; }

# The target's own answers: to training prompts at temperatures 0 and 1 for training, to every test question for measuring.
sets() {
    local distill="./launch.sh distill --target $target --max_new_tokens 256 --batch 48 --device $device"
    $distill --prompts "$data/train.jsonl" --limit "$prompts" --temperatures "[0,1]" --out "$out/sets/target"
    $distill --prompts "$data/test.jsonl" --temperatures "[0]" --out "$out/sets/test_t0"
    $distill --prompts "$data/test.jsonl" --temperatures "[1]" --seed 1 --out "$out/sets/test_t1"
}

# draft NAME FLAGS...: trains and exports OUT/drafts/NAME unless it exists.
draft() {
    local name=$1 run=$out/runs/$1
    shift
    [ ! -e "$out/drafts/$name/trainkit.json" ] || return 0
    say "draft $name"
    rm -rf "$run"
    RUN_DIR=$run ./launch.sh recipes/studies/losses/draft.yaml --model.target "$target" --model.teacher_cache "$out/states" \
        --data.cache "$out/prepared" --trainer.max_steps "$steps" "$@" >"$out/runs-$name.log" 2>&1 || { tail -5 "$out/runs-$name.log" >&2; exit 1; }
    ./launch.sh export "$run/checkpoints/last.ckpt" "$out/drafts/$name" >/dev/null
    rm -rf "$run/checkpoints" "$out/runs-$name.log"
}

# measure NAME DRAFTS...: writes OUT/rows/NAME.t0.json and .t1.json, each measured on the target's answers at that temperature.
measure() {
    local name=$1 t served=()
    shift
    [ "${serve:-yes}" = no ] || served=(--prompts "$data/test.jsonl" --questions 100)
    for t in 0 1; do
        [ ! -e "$out/rows/$name.t$t.json" ] || continue
        say "measure $name at temperature $t"
        ./launch.sh alpha --target "$target" "${@/#/--drafter=}" --data "$out/sets/test_t$t" --temperatures "[$t]" --length 512 \
            ${served[@]+"${served[@]}"} --teacher_cache "$out/states" --device "$device" --json "$out/rows/$name.t$t.json.partial"
        mv "$out/rows/$name.t$t.json.partial" "$out/rows/$name.t$t.json"
    done
}

# row NAME FLAGS...: trains a draft for each seed and measures them together.
row() {
    local name=$1 seed drafts=()
    shift
    for seed in $seeds; do
        draft "$name-$seed" --seed_everything "$seed" "$@"
        drafts+=("$out/drafts/$name-$seed")
    done
    measure "$name" "${drafts[@]}"
}

corpus=(--data.train "$data/train.jsonl" --data.validation_share 0.02)
answers=(--data.train "$out/sets/target" --data.validation_share 0.02)
from_start=(--model.drafter.init "$out/drafts/start")

start() { draft start "${corpus[@]}" --model.divergence CrossEntropy; }
loss() { row "$1" "${answers[@]}" "${from_start[@]}" --model.divergence "${@:2}"; }

losses() {
    loss forward_kl ForwardKL
    loss tvdpp_position TVDpp
    loss tv TV
    loss ce CrossEntropy
    loss lk LK
    loss jsd JSD
    loss reverse_kl ReverseKL
    loss tvdpp_batch_sampled TVDpp --model.divergence.estimator sampled --model.divergence.normalise batch
    loss tvdpp_sharp TVDpp --model.divergence.temperature 0.5 # temperature of both distributions: closer to greedy decoding
    loss lk_hybrid LK --model.divergence.hybrid true
}

# policy NAME WEIGHTS FLAGS...: one data mixture, trained with forward KL. The row forward_kl of `losses` is the mixture {target: 1}.
policy() {
    row "policy_$1" "${from_start[@]}" --model.divergence ForwardKL --data MixtureData --data.weights "$2" --data.length 512 \
        --data.batch_size 4 --data.validation "$out/sets/target" --data.limit_validation 30 --data.limit_prompts "$prompts" \
        --data.refresh 25 "${@:3}"
}

policies() {
    policy target_corpus '{"target": 0.9, "corpus": 0.1}' --data.target "$out/sets/target" --data.corpus "$data/train.jsonl"
    policy corpus '{"corpus": 1}' --data.corpus "$data/train.jsonl" --data.limit $((prompts * 5 / 2)) # as many tokens as the distilled set
    policy draft '{"draft": 1}' --data.prompts "$data/train.jsonl"
    policy mixed '{"mixed": 1}' --data.prompts "$data/train.jsonl"
}

# One stage with as many tokens as pretraining and fine-tuning together.
pipeline() {
    row alone_corpus "${corpus[@]}" --model.divergence CrossEntropy --trainer.max_steps $((2 * steps))
    row alone_answers "${answers[@]}" --model.divergence ForwardKL --trainer.max_steps $((2 * steps))
}

# Acceptance by number of layers and of distilled tokens. One layer on all tokens is the row forward_kl of `losses`.
scaling() {
    local layers share serve=no
    for layers in 1 2 4; do
        [ "$layers" = 1 ] || draft "start$layers" "${corpus[@]}" --model.divergence CrossEntropy --model.drafter.num_layers "$layers"
        for share in 4 2 1; do
            [ "$layers/$share" != 1/1 ] || continue
            row "layers${layers}_of$share" "${answers[@]}" --data.limit $((2 * prompts / share)) --model.divergence ForwardKL \
                --model.drafter.init "$out/drafts/start${layers#1}"
        done
    done
}

# trim NAME SHARE: writes OUT/drafts/NAME-ofSHARE, the draft with 1/SHARE of the vocabulary.
trim() {
    [ -e "$out/drafts/$1-of$2/trainkit.json" ] || ./launch.sh trim "$out/drafts/$1" "$out/drafts/$1-of$2" --target "$target" \
        --text "$out/sets/target" --keep "$(awk "BEGIN { print 1 / $2 }")" >/dev/null
}

trimmed() {
    local share seed drafts
    for share in 2 4 8; do
        drafts=()
        for seed in $seeds; do
            trim "forward_kl-$seed" "$share"
            drafts+=("$out/drafts/forward_kl-$seed-of$share")
        done
        measure "trimmed_of$share" "${drafts[@]}"
    done
}

# A draft for greedy decoding: six million trained tokens of the target's greedy answers to every training question.
best() {
    ./launch.sh distill --target "$target" --max_new_tokens 256 --batch 48 --device "$device" --prompts "$data/train.jsonl" \
        --temperatures "[0]" --out "$out/sets/greedy"
    draft best --data.train "$out/sets/greedy" --data.validation_share 0.02 "${from_start[@]}" --model.divergence ForwardKL \
        --trainer.max_steps $((12 * steps))
    trim best 4
    measure best "$out/drafts/best" "$out/drafts/best-of4"
}

# Wall-clock at temperature 0 of whole and trimmed drafts, each beside plain decoding in the same run. Run nothing else meanwhile.
speed() {
    local name
    for name in forward_kl-0 forward_kl-0-of2 forward_kl-0-of4 forward_kl-0-of8 best best-of4; do
        [ -e "$out/rows/speed-$name.json" ] || ./launch.sh bench --target "$target" --drafter "$out/drafts/$name" --device "$device" \
            --prompts "$data/test.jsonl" --limit 12 --max_new_tokens 128 --depths "[2,3,4]" --repeats 5 --json "$out/rows/speed-$name.json"
    done
}

say "sets"
sets
start
for group in "$@"; do "$group"; done
say "done"
