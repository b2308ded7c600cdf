#!/usr/bin/env bash
# What a CPU cannot show, in ten minutes on one GPU: sft, grpo, ppo, dpo and grpo with adapters, 20 steps each, in
# bfloat16; then the same log-probs from the sampler and from the update. From the project's root:
#
#     bash benchmarks/gpu.sh [MODEL]              # a chat model's folder or hub id; DEVICE=cpu tries it without a GPU
set -euo pipefail
model=${1:-HuggingFaceTB/SmolLM2-135M-Instruct} device=${DEVICE:-cuda} steps=${STEPS:-20} out=${OUT:-runs/gpu}
mkdir -p "$out"
python - "$out/data.jsonl" <<'PY'
import json, sys
with open("models/arithmetic/sums.jsonl") as rows, open(sys.argv[1], "w") as file:
    for row in list(map(json.loads, rows))[::9]:
        row["prompt"] = [{"role": "user", "content": f"{row['prompt']} Answer with the number alone."}]
        for name in ("completion", "chosen", "rejected"):
            row[name] = [{"role": "assistant", "content": row[name].strip()}]
        print(json.dumps(row), file=file)
PY
flags="--model $model --data $out/data.jsonl --device $device --dtype bfloat16 --num-steps $steps --eval-every $steps
    --eval-prompts 32 --save-every 0 --learning-rate 1e-5"
long="--max-new-tokens ${LONG:-512} --prompts-per-step 16 --samples-per-prompt 8 --micro-batch-size 32"
python sft.py $flags --max-new-tokens 32 --prompts-per-step 64 --output-dir "$out/sft"
python dpo.py $flags --max-new-tokens 32 --prompts-per-step 32 --output-dir "$out/dpo"
python grpo.py $flags $long --output-dir "$out/grpo"
python grpo.py $flags $long --max-new-tokens ${SHORT:-64} --output-dir "$out/grpo-short"
python grpo.py $flags $long --lora-rank 16 --output-dir "$out/grpo-lora"
python ppo.py $flags $long --output-dir "$out/ppo"
python - "$out" "$model" "$device" ${SHORT:-64} ${LONG:-512} <<'PY'
import json, math, sys
from pathlib import Path
import common, grpo, torch
out, model, device, *lengths = sys.argv[1:]
print("| run | seconds a step | tokens a second | GB | grad_norm | last evaluation |\n|---|---|---|---|---|---|")
for file in sorted(Path(out).glob("*/metrics.jsonl")):
    rows = [json.loads(line) for line in file.open()]
    assert all(value is not None and math.isfinite(value) for row in rows[1:] for value in row.values()), file
    half = rows[1 + len(rows) // 2 :]
    mean = lambda name: sum(row.get(name, math.nan) for row in half) / len(half)
    seconds = sum(mean(name) for name in ("time/rollout", "time/score", "time/update") if name in half[0])
    last = next(value for name, value in rows[-1].items() if name.startswith("eval/"))
    print(f"| {file.parent.name} | {seconds:.2f} | {mean('tokens_per_second'):.0f} | {mean('memory/peak'):.1f} "
          f"| {mean('grad_norm'):.2f} | {last:.3f} |")
args = common.check_args(grpo.Args(model=model, device=device, dtype="bfloat16", micro_batch_size=16))
policy, tokenizer = common.load_model(args.model, args.device, args)
rows = [json.loads(line) for line in open(f"{out}/data.jsonl")][:8]
prompts = common.prompt_batch(tokenizer, rows, policy.device)
for length in map(int, lengths):
    torch.manual_seed(0)
    with common.autocast(args):
        ids, mask, sampled, _ = grpo.rollout(
            policy, *prompts, max_new_tokens=length, samples_per_prompt=8, temperature=1.0
        )
    batch, minibatches = (*prompts, ids, mask), torch.randperm(8).chunk(2)
    old = grpo.batch_logprobs(policy, batch, minibatches, args)
    for minibatch in minibatches:  # with gradients, as in the first update: the ratio must be 1, to the last bit
        for micro, inputs in common.micro_batches(batch, minibatch, args.micro_batch_size):
            with common.autocast(args):
                assert torch.equal(grpo.token_logprobs(policy, *inputs, temperature=1.0).detach(), old[micro])
    gap = (sampled - old)[mask > 0].abs()
    print(f"{length} tokens: ratio 1 in each micro-batch; sampler against update: mean {gap.mean():.4f}, max {gap.max():.3f}")
PY
