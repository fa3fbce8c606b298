#!/usr/bin/env bash
# EAGLE-3, Hydra++ or Medusa for Llama-3.1-8B or Qwen3-8B, on one machine with 8 GPUs: distil, choose the vocabulary, train, export,
# search the tree, bench.
#
#   NPROC=8 ./launch.sh recipes/heads_8b.sh TARGET [KIND [PROMPTS]]
#
# TARGET: folder of Llama-3.1-8B-Instruct or Qwen3-8B. KIND: a name in configs/drafter/, eagle by default. PROMPTS: chats in ShareGPT
# form whose user turns the target answers (file, folder or hub name); EAGLE-3's authors use several hundred thousand. Outputs that
# exist are not made again, and every stage continues where it was stopped.
# NOT RUN at this size yet: we have no machine that can hold it. recipes/studies/kinds is the same at a small size, measured.
set -euo pipefail

target=${1:?usage: heads_8b.sh TARGET [KIND [PROMPTS]]} kind=${2:-eagle} prompts=${3:-HuggingFaceH4/ultrachat_200k@train_sft}
run=runs/heads-8b-$kind drafter=models/heads-8b-$kind

./launch.sh distill --target "$target" --prompts "$prompts" --out data/distilled-8b --temperatures "[0,1]" --max_new_tokens 1024 \
    --batch 64 --device cuda --dtype bfloat16
[ -e data/distilled-8b-ids.json ] ||
    ./launch.sh vocab data/distilled-8b-ids.json --target "$target" --text data/distilled-8b --keep 32000

# Published settings: Medusa lr 1e-3; Hydra++ lr 5e-4, 100 warm-up steps, cosine to a third, weight decay 0.1; EAGLE-3 as in fit.yaml.
settings=()
case $kind in
medusa | hydra) settings=(--model.optimizer.lr 1.0e-3) ;;
hydra_plus)
    settings=(--model.optimizer.lr 5.0e-4 --model.optimizer.weight_decay 0.1 --model.warmup_steps 100 --model.final_lr 0.333)
    ;;
esac
if [ ! -e "$drafter/trainkit.json" ]; then
    resume=()
    [ ! -e "$run/checkpoints/last.ckpt" ] || resume=(--resume "$run")
    RUN_DIR=$run ./launch.sh recipes/heads_8b/fit.yaml ${resume[@]+"${resume[@]}"} --model.target "$target" \
        --model.drafter "$PWD/configs/drafter/$kind.yaml" --model.drafter.draft_vocab data/distilled-8b-ids.json \
        ${settings[@]+"${settings[@]}"}
    ./launch.sh export "$run/checkpoints/best.ckpt" "$drafter" --dtype bfloat16
fi

./launch.sh tree "$drafter" --target "$target" --prompts "$prompts" --device cuda --dtype bfloat16
./launch.sh bench --target "$target" --drafter "$drafter" --prompts "$prompts" --limit 32 --device cuda --dtype bfloat16 \
    --depths "[3,5]" --json "$drafter.bench.json"
