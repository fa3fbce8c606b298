#!/usr/bin/env bash
# An acceptance predictor for a drafter, and what it is worth: trained on test questions that are then set aside, held against the
# draft's own confidence on others, and as what paces drafting against every fixed depth. recipes/predictor.md has the results.
# What is there is not made again, so an interrupted run goes on where it stopped.
#
#   ./launch.sh recipes/predictor.sh TARGET DATA CODE DRAFTER OUT
#
# TARGET: the target's folder. DATA: a folder with test.jsonl, questions that the drafter was not trained on. CODE: a JSONL of
# prompts of another kind (HumanEval). DRAFTER: a bundle, which is copied. Environment: SEEN=1000 (questions to train on), DEPTH=10,
# LIMIT=12 (prompts timed), REPEATS=5, TEMPERATURES="0 1", DEVICE=cpu.
set -euo pipefail

target=${1:?usage: predictor.sh TARGET DATA CODE DRAFTER OUT} data=${2:?DATA} code=${3:?CODE} drafter=${4:?DRAFTER} out=${5:?OUT}
seen=${SEEN:-1000} depth=${DEPTH:-10} limit=${LIMIT:-12} repeats=${REPEATS:-5} device=${DEVICE:-cpu}
mkdir -p "$out"

say() { printf '== %s (%d s so far)\n' "$1" "$SECONDS"; }

[ -e "$out/draft" ] || cp -r "$drafter" "$out/draft"
[ -e "$out/mixed.jsonl" ] || python recipes/predictor.py prompts "$data/test.jsonl" "$code" "$seen" "$out"

say "what serving shows of the drafter"
records() {
    ./launch.sh acceptance "$out/draft" --target "$target" --prompts "$out/$1.jsonl" --out "$out/records-$1" --depth "$depth" \
        --temperatures "[0,1]" --max_new_tokens 128 --batch 16 --device "$device"
}
records seen
records held

if [ ! -e "$out/draft/predictor/model.safetensors" ]; then
    say "train"
    RUN_DIR=$out/run ./launch.sh recipes/predictor.yaml --data.train "$out/records-seen"
    ./launch.sh export "$out/run/checkpoints/best.ckpt" "$out/draft"
fi

say "on questions held out"
./launch.sh predictor "$out/draft" --data "$out/records-held" --json "$out/calibration.json" --plot "$out/calibration.png"

# Wall-clock, which wants the machine for itself: every fixed depth and every policy, interleaved.
for t in ${TEMPERATURES:-0 1}; do
    for set in gsm8k mixed; do
        say "speed on $set at temperature $t"
        [ -e "$out/bench-$set-t$t.json" ] || ./launch.sh bench --target "$target" --drafter "$out/draft" --prompts "$out/$set.jsonl" \
            --limit "$limit" --max_new_tokens 128 --depths "[$(seq -s, 1 "$depth")]" --policy cost --policy cost-blind \
            --policy predictor:0.6 --policy confidence:0.6 --policy ema --repeats "$repeats" --baselines false --temperature "$t" \
            --device "$device" --json "$out/bench-$set-t$t.json"
        [ -e "$out/oracle-$set-t$t.json" ] || python recipes/predictor.py oracle "$target" "$out/draft" "$out/$set.jsonl" "$t" \
            "$limit" "$out/oracle-$set-t$t.json"
        [ -e "$out/trees-$set-t$t.json" ] || python recipes/predictor.py trees "$target" "$out/draft" "$out/$set.jsonl" "$t" \
            "$limit" "$out/trees-$set-t$t.json"
    done
done

say "a useless draft at batch 8"
[ -e "$out/useless.json" ] || python recipes/predictor.py useless "$target" "$out/draft" "$out/gsm8k.jsonl" "$out/useless.json"
python recipes/predictor.py table "$out"
say "done"
