#!/usr/bin/env bash
# A small chat model on GSM8K: sft.py on the train split, then the others from its model, dpo.py on pairs of its own
# samples. Exact match on the test split before and after is each run's closing line; data, runs, curves and a table are
# in OUT.
#
#   bash benchmarks/gsm8k.sh MODEL TRAIN.jsonl TEST.jsonl OUT
#
# MODEL: HuggingFaceTB/SmolLM2-135M-Instruct or another with a chat template; TRAIN and TEST: GSM8K's own files.
# Sizes are for one GPU of 80 GB. QUICK=1 makes a few small steps, to see that everything runs, on a CPU too; its pairs
# are of a shorter and a longer completion, as none is right yet.
# LAUNCH="torchrun --nproc-per-node 8" uses eight GPUs. A run that is there is not made again, and one that was cut off
# goes on. The curves need matplotlib.
set -euo pipefail
model=$1 out=$4 train=$4/train.jsonl test=$4/test.jsonl
here=$(cd "$(dirname "$0")/.." && pwd)
read -r -a launch <<< "${LAUNCH:-python}"
if [ -n "${QUICK:-}" ]; then
    sft_steps=2 steps=2 prompts=8 samples=2 tokens=24 micro=4 eval=4 eval_every=2 pairs=8
    reward=$here/examples/rewards.py:length cut=--truncated
else
    sft_steps=350 steps=300 prompts=32 samples=8 tokens=256 micro=64 eval=1319 eval_every=50 pairs=4000
    reward=exact_answer cut=--no-truncated
fi
evaluation=(--eval-data "$test" --eval-prompts "$eval" --eval-every "$eval_every" --max-new-tokens "$tokens")
sampling=(--data "$train" --prompts-per-step "$prompts" --samples-per-prompt "$samples" --micro-batch-size "$micro")

run() { # name, then a script and its flags
    local name=$1 script=$2 folder=$out/$1
    shift 2
    if [ -d "$folder/model" ]; then return; fi
    local flags=(--output-dir "$folder" "${evaluation[@]}" "$@")
    if [ -s "$folder/args.json" ]; then flags=(--resume "$folder"); fi
    "${launch[@]}" "$here/$script.py" "${flags[@]}" 2> >(tee -a "$out/$name.log" >&2)
}

rows='
import json, sys
for row in map(json.loads, sys.stdin):
    question = row["question"] + "\nThink step by step. End with #### and the number."
    prompt = [{"role": "user", "content": question}]
    print(json.dumps({"prompt": prompt, "completion": row["answer"], "answer": row["answer"]}))
'
mkdir -p "$out"
python -c "$rows" < "$2" > "$train"
python -c "$rows" < "$3" > "$test"
run sft sft --model "$model" --data "$train" --num-steps "$sft_steps" --prompts-per-step $((2 * prompts)) \
    --micro-batch-size "$micro" --learning-rate 2e-5 --warmup-steps $((sft_steps / 20))
start=(--model "$out/sft/model" --num-steps "$steps")
run rejection_sampling rejection_sampling "${start[@]}" "${sampling[@]}" --learning-rate 5e-6
run reinforce reinforce "${start[@]}" "${sampling[@]}" --learning-rate 2e-6
run ppo ppo "${start[@]}" "${sampling[@]}" --learning-rate 2e-6 --value-learning-rate 1e-5
run grpo grpo "${start[@]}" "${sampling[@]}" --learning-rate 2e-6
run grape grape "${start[@]}" "${sampling[@]}" --learning-rate 2e-6 --rubric "$here/examples/rubrics/gsm8k.json"
run trpo trpo "${start[@]}" "${sampling[@]}"

if [ ! -s "$out/pairs.jsonl" ]; then
    python "$here/benchmarks/pairs.py" --model "$out/sft/model" --data "$train" --output "$out/pairs.part" \
        --prompts "$pairs" --samples-per-prompt "$samples" --max-new-tokens "$tokens" --reward "$reward" "$cut"
    mv "$out/pairs.part" "$out/pairs.jsonl"
fi
run dpo dpo "${start[@]}" --data "$out/pairs.jsonl" --prompts-per-step "$prompts" --micro-batch-size "$micro" \
    --learning-rate 5e-7

python "$here/benchmarks/runs.py" "$out"/*/ > "$out/table.md"
cat "$out/table.md"
python "$here/benchmarks/plot.py" "$out"/{rejection_sampling,reinforce,ppo,grpo} --output "$out/curves.png"
