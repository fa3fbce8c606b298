#!/usr/bin/env bash
# A draft of 147M parameters for Llama-3.1-8B, on one machine with 8 GPUs: pretrain, distil, fine-tune, trim, bench.
#
#   NPROC=8 ./launch.sh recipes/draft_8b.sh TARGET [PROMPTS]
#
# TARGET: folder of Llama-3.1-8B-Instruct. PROMPTS: chats whose user turns the target answers (file or hub name). Outputs that exist
# are not made again, and every stage continues where it was stopped.
# NOT RUN at this size yet: we have no machine that can hold it. recipes/studies/losses is the same pipeline at a small size, measured.
set -euo pipefail

target=${1:?usage: draft_8b.sh TARGET [PROMPTS]} prompts=${2:-HuggingFaceH4/ultrachat_200k@train_sft}

# fit RECIPE FOLDER FLAGS...: trains in runs/FOLDER, or resumes the run there.
fit() {
    local recipe=$1 run=runs/$2 resume=()
    shift 2
    [ ! -e "$run/checkpoints/last.ckpt" ] || resume=(--resume "$run")
    RUN_DIR=$run ./launch.sh "$recipe" ${resume[@]+"${resume[@]}"} "$@"
}

if [ ! -e models/draft-8b-pretrained/trainkit.json ]; then
    fit recipes/draft_8b/pretrain.yaml draft-8b-pretrain --data.tokenizer "$target"
    ./launch.sh export runs/draft-8b-pretrain/checkpoints/best.ckpt models/draft-8b-pretrained --dtype bfloat16
fi

./launch.sh distill --target "$target" --prompts "$prompts" --limit 50000 --out data/distilled-8b --temperatures "[0,0.3,0.7,1]" \
    --max_new_tokens 1024 --batch 64 --device cuda --dtype bfloat16

if [ ! -e models/draft-8b/trainkit.json ]; then
    fit recipes/draft_8b/finetune.yaml draft-8b-finetune --model.target "$target" --model.drafter.init models/draft-8b-pretrained
    ./launch.sh export runs/draft-8b-finetune/checkpoints/best.ckpt models/draft-8b --dtype bfloat16
fi

./launch.sh trim models/draft-8b models/draft-8b-trimmed --target "$target" --text data/distilled-8b --keep 0.25
for draft in models/draft-8b models/draft-8b-trimmed; do
    ./launch.sh bench --target "$target" --drafter "$draft" --prompts "$prompts" --limit 32 --device cuda --dtype bfloat16 \
        --depths "[2,3,4,6]" --json "$draft.bench.json"
done
