#!/usr/bin/env bash
# The whole pipeline, small: pretrain a target, distil a draft for it, export both, decode, print how much faster the same text came.
# Run it as ./launch.sh quickstart [FOLDER]; everything it makes lies under FOLDER (default runs/quickstart).
set -euo pipefail

out=${1:-runs/quickstart}
stage() { printf '\n== %s (%d s so far)\n' "$1" "$SECONDS"; }

rm -rf "$out"
mkdir -p "$out"

stage "1/5 pretrain a target of 2.4M parameters on data/tiny (recipes/target_tiny.yaml)"
RUN_DIR=$out/target_run ./launch.sh recipes/target_tiny.yaml
./launch.sh export "$out/target_run/checkpoints/last.ckpt" "$out/target" >/dev/null

stage "2/5 distil a one-layer draft from it (recipes/draft_tiny.yaml)"
RUN_DIR=$out/draft_run ./launch.sh recipes/draft_tiny.yaml --model.target "$out/target"

stage "3/5 export the draft, reload it, compare, show its card"
./launch.sh export "$out/draft_run/checkpoints/last.ckpt" "$out/draft"
./launch.sh inspect "$out/draft" --target "$out/target" >/dev/null

stage "4/5 decode one question with both"
./launch.sh generate --target "$out/target" --drafter "$out/draft" --max_new_tokens 96 --prompt \
    "Maya picks 14 apples in the morning and twice as many in the afternoon. How many apples does she pick in all?"

stage "5/5 bench: the same text, plain and drafted"
./launch.sh bench --target "$out/target" --drafter "$out/draft" --prompts data/tiny/prompts.jsonl \
    --limit 16 --max_new_tokens 96 --depths "[2,4,6]" --json "$out/bench.json" --plot "$out/bench.png"
echo
echo "done in $SECONDS s; all of it lies in $out: target/ and draft/ load in transformers too, bench.json has every figure"
