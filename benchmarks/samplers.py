"""The sampler of grpo.py and that of examples/vllm_sampler.py side by side; examples/README.md has the install.

    python benchmarks/samplers.py agree
    python benchmarks/samplers.py learn --num-steps 20
    python benchmarks/samplers.py speed --model HuggingFaceTB/SmolLM2-135M-Instruct --data train.jsonl \\
        --prompts-per-step 8 --max-new-tokens 128

agree: how far vLLM's log-probs are from token_logprobs', after updates, and after one that is not handed over. learn: a
run of each script with these flags. speed: tokens a second of sampling alone, in turn.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import common
import grpo

import torch
import tyro
import vllm_sampler


def load(args):
    args = common.check_args(args)
    model, tokenizer = common.load_model(args.model, args.device, args)
    rows = common.load_data(args.data, args.eval_data, args.eval_prompts, ("prompt",))[0][: args.prompts_per_step]
    vllm_sampler.load_sampler(model, tokenizer, rows, args)
    sizes = {"samples_per_prompt": args.samples_per_prompt, "temperature": args.temperature}
    return model, common.prompt_batch(tokenizer, rows, model.device), sizes | {"max_new_tokens": args.max_new_tokens}


def agree(args, updates=4):
    model, prompts, sizes = load(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    for update in range(updates + 1):
        if missed := update == updates:
            model.vllm.collective_rpc = lambda *args, **kwargs: None  # vLLM keeps the weights that it has
        ids, mask, sampled, _ = vllm_sampler.rollout(model, *prompts, **sizes)
        logprobs = grpo.token_logprobs(model, *prompts, ids, mask, temperature=args.temperature)
        gap = (logprobs - sampled)[mask > 0].abs()
        name = f"{update} updates" + ", the last not handed over" * missed
        print(f"{name}: {len(gap)} log-probs differ by {gap.max():.1e} at most, {gap.mean():.1e} on average")
        (-logprobs.sum() / mask.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()


def learn(args):
    for script in ("grpo.py", "examples/vllm_sampler.py"):
        command = [sys.executable, script, *sys.argv[2:]]
        print(subprocess.run(command, check=True, text=True, capture_output=True).stdout.splitlines()[-1])


def speed(args, rounds=5):
    model, prompts, sizes = load(args)
    ratios = []
    for number in range(rounds + 1):
        sizes["max_new_tokens"] = args.max_new_tokens if number else 4  # the first warms up
        model.vllm.wake_up()
        start = time.perf_counter()
        model.vllm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(model.state_dict().items())})
        handing = time.perf_counter() - start
        model.vllm.sleep(level=2)
        rates = []
        for rollout, other in ((grpo.rollout, 0.0), (vllm_sampler.rollout, handing)):
            start = time.perf_counter() + other
            tokens = rollout(model, *prompts, **sizes)[1].sum()
            rates.append(float(tokens / (time.perf_counter() - start)))
        print("grpo.py {:.0f} tokens a second, vLLM {:.0f}".format(*rates), f"and {handing:.2f} s to hand over")
        ratios += [rates[1] / rates[0]] if number else []
    print(f"vLLM at {statistics.median(ratios):.2f} times the rate of grpo.py, {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    {"agree": agree, "learn": learn, "speed": speed}[sys.argv[1]](tyro.cli(vllm_sampler.Args, args=sys.argv[2:]))
