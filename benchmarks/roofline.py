"""What share of the machine rollout and update reach, and how time and memory grow with the sizes of a step.

python benchmarks/roofline.py                        the embedded model and a random Llama of 30 M parameters
python benchmarks/roofline.py --models PATH          another model, 2 x 8 x 64 and 8 x 8 x 24 tokens
python benchmarks/roofline.py --device cuda          on a GPU, in bfloat16

The roof is what torch's own matmul reaches on 2048 x 2048 matrices, and a copy of 256 MB. An update is counted as 6, a
forward pass as 2 floating-point operations for each parameter that multiplies and each token that is computed;
decoding reads each parameter once for each step of the batch. "Products" is the share of the rollout that its matrix
products take by themselves, as torch multiplies few rows far below the roof. Memory is the highest of the process
beyond what stood before the update, which is the parameters and their gradients. Each row is a process of its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import grpo

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def seconds(function, device, repeats=3):
    """The fastest of some calls, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def roof(device, autocast):
    """Floating-point operations and bytes a second."""
    a, b = torch.randn(2, 2048, 2048, device=device)
    source = torch.rand(2**26, device=device)  # not empty: the kernel keeps one page for all that was never written
    target = torch.empty_like(source)
    with autocast, torch.no_grad():
        flops = 2 * 2048**3 / seconds(lambda: torch.nn.functional.linear(a, b), device, 10)
    return flops, 2 * 4 * 2**26 / seconds(lambda: target.copy_(source), device, 10)


def build(name, device, vocab_size):
    if name != "random":
        return common.load_model(name, device)[0]
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=vocab_size, eos_token_id=0, tie_word_embeddings=True, **sizes)
    model = LlamaForCausalLM(config).to(device).eval()
    model.trunk, model.shares_prompts = model.model, True  # as common.load_model sets them
    return model


def memory_now(device):
    if device.type == "cuda":
        return torch.cuda.memory_allocated() / 2**20
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def memory_peak(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name, device_name, prompts, samples, prompt_tokens, tokens, vocab_size):
    """Seconds, shares of the roof and memory of one rollout and one forward and backward pass of the same sizes."""
    args = common.check_args(grpo.Args(device=device_name))
    device, autocast = torch.device(args.device), common.autocast(args)
    model = build(name, device, vocab_size)
    V, B = model.config.get_text_config().vocab_size, prompts * samples
    multiplying = sum(p.numel() for n, p in model.named_parameters() if p.dim() > 1 and "embed" not in n)
    head = V * model.config.get_text_config().hidden_size
    prompt_ids = torch.randint(1, min(V, 200), (prompts, prompt_tokens), device=device)
    completion_ids = torch.randint(1, min(V, 200), (B, tokens), device=device)
    mask = torch.ones(B, tokens, device=device)
    sampling = {"samples_per_prompt": samples, "max_new_tokens": tokens, "temperature": 1.0}
    model.generation_config.eos_token_id = [V + 1]  # nothing ends early
    with autocast:
        rollout = seconds(lambda: grpo.rollout(model, prompt_ids, torch.ones_like(prompt_ids), **sampling), device, 1)
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    inputs = [torch.rand(B, layer.in_features, device=device) for layer in layers]
    with autocast, torch.no_grad():
        products = tokens * seconds(lambda: [layer(x) for layer, x in zip(layers, inputs)], device, 10)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = memory_now(device)

    def update():
        with autocast:
            logprobs = grpo.token_logprobs(model, prompt_ids, torch.ones_like(prompt_ids), completion_ids, mask)
        logprobs.sum().backward()

    update = seconds(update, device, 2)
    memory = memory_peak(device) - before  # before the roof is measured, which takes memory too
    flops, bandwidth = roof(device, autocast)
    computed = prompts * prompt_tokens + B * (tokens - 1)
    return {
        "rollout": rollout,
        "rollout_flops": (2 * (multiplying * computed + head * B * tokens)) / rollout / flops,
        "rollout_bytes": 4 * (multiplying + head) * tokens / rollout / bandwidth,
        "products": products / rollout,
        "update": update,
        "update_flops": 6 * (multiplying * computed + head * B * tokens) / update / flops,
        "memory": memory,
        "roof": [flops, bandwidth],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["models/arithmetic", "random"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(**json.loads(args.measure))))
        return
    base = {"prompts": 8, "samples": 8, "prompt_tokens": 32, "tokens": 32, "vocab_size": 10_000}
    steps = [{}, {"prompts": 1}, {"prompts": 32}, {"samples": 1}, {"samples": 32, "prompts": 2}]
    steps += [{"prompt_tokens": 128}, {"tokens": 8}, {"tokens": 128}]
    columns = "model, prompts x samples, prompt + completion, V, rollout (s), of FLOP/s, of bandwidth, products, "
    columns += "update (s), of FLOP/s, memory (MB)"
    rows = ["| " + " | ".join(columns.split(", ")) + " |", "|" + "---|" * 11]
    more = {"random": [*steps, {"vocab_size": 150_000}], "models/arithmetic": steps}
    for name in args.models:
        for step in more.get(name, [{"prompts": 2, "tokens": 64}, {"tokens": 24}]):
            sizes = base | step | {"name": name, "device_name": args.device}
            command = [sys.executable, __file__, "--measure", json.dumps(sizes)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            got = json.loads(done.stdout.splitlines()[-1])
            if len(rows) == 2:
                print(f"roof: {got['roof'][0] / 1e9:.0f} GFLOP/s, {got['roof'][1] / 1e9:.0f} GB/s\n")
            vocabulary = f"{sizes['vocab_size']:,}" if name == "random" else ""
            rows.append(
                f"| {name} | {sizes['prompts']} x {sizes['samples']} | {sizes['prompt_tokens']} + {sizes['tokens']} "
                f"| {vocabulary} | {got['rollout']:.3f} | {got['rollout_flops']:.0%} | {got['rollout_bytes']:.0%} "
                f"| {got['products']:.0%} | {got['update']:.3f} | {got['update_flops']:.0%} | {got['memory']:.0f} |"
            )
            print(rows[-1], file=sys.stderr, flush=True)
    print("\n".join(rows))


if __name__ == "__main__":
    main()
