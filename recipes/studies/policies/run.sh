#!/usr/bin/env bash
# Study of draft-length policies: trains an acceptance predictor for a drafter on some test questions, compares it with the draft's
# own confidence on other questions, and compares the policies that use it with every fixed depth. Results: README.md. Tables:
# tables.py. Files that exist are not made again, so the same command continues an interrupted study.
#
#   ./launch.sh recipes/studies/policies/run.sh TARGET DATA CODE DRAFTER OUT
#
# TARGET: folder of the target. DATA: folder with test.jsonl, questions that the drafter was not trained on. CODE: JSONL file of
# prompts of another type (HumanEval). DRAFTER: a bundle, which is copied. Environment: SEEN=1000 (questions to train on), DEPTH=10,
# LIMIT=12 (prompts timed), REPEATS=5, TEMPERATURES="0 1", DEVICE=cpu.
set -euo pipefail

target=${1:?usage: run.sh TARGET DATA CODE DRAFTER OUT} data=${2:?DATA} code=${3:?CODE} drafter=${4:?DRAFTER} out=${5:?OUT}
seen=${SEEN:-1000} depth=${DEPTH:-10} limit=${LIMIT:-12} repeats=${REPEATS:-5} device=${DEVICE:-cpu}
mkdir -p "$out"

say() { printf '== %s (%d s so far)\n' "$1" "$SECONDS"; }

[ -e "$out/draft" ] || cp -r "$drafter" "$out/draft"
[ -e "$out/mixed.jsonl" ] || python recipes/studies/policies/tables.py prompts "$data/test.jsonl" "$code" "$seen" "$out"

say "record which draft tokens are accepted"
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

say "calibration on held-out questions"
./launch.sh predictor "$out/draft" --data "$out/records-held" --json "$out/calibration.json" --plot "$out/calibration.png"

# Wall-clock of every fixed depth and every policy, interleaved. Run nothing else meanwhile.
for t in ${TEMPERATURES:-0 1}; do
    for set in gsm8k mixed; do
        say "speed on $set at temperature $t"
        [ -e "$out/bench-$set-t$t.json" ] || ./launch.sh bench --target "$target" --drafter "$out/draft" --prompts "$out/$set.jsonl" \
            --limit "$limit" --max_new_tokens 128 --depths "[$(seq -s, 1 "$depth")]" --policy cost --policy cost-blind \
            --policy cost:logistic --policy logistic:0.6 --policy predictor:0.6 --policy confidence:0.6 --policy ema --repeats "$repeats" --baselines false --temperature "$t" \
            --device "$device" --json "$out/bench-$set-t$t.json"
        [ -e "$out/oracle-$set-t$t.json" ] || python recipes/studies/policies/tables.py oracle "$target" "$out/draft" "$out/$set.jsonl" "$t" \
            "$limit" "$out/oracle-$set-t$t.json"
        for seed in 0 1 2; do
            [ -e "$out/signals-$set-t$t-$seed.json" ] || python recipes/studies/policies/tables.py signals "$target" "$out/draft" \
                "$out/$set.jsonl" "$t" "$limit" "$seed" "$out/signals-$set-t$t-$seed.json"
        done
    done
done

say "a useless draft at batch 8"
[ -e "$out/useless.json" ] || python recipes/studies/policies/tables.py useless "$target" "$out/draft" "$out/gsm8k.jsonl" "$out/useless.json"
python recipes/studies/policies/tables.py table "$out"
say "done"
