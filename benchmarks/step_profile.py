"""Where the time of a step goes: the parts of a step of one script, and the kinds of work that torch does in it.

python benchmarks/step_profile.py                         grpo.py with its defaults, 8 x 8 completions
python benchmarks/step_profile.py --model PATH --max-new-tokens 64 --prompts 2 --micro-batch-size 8 --steps 4

The parts are timed as they are; the floor is what transformers' layers, autograd and AdamW take of them, which a script
that does nothing else would need too. The kinds are torch.profiler's, whose own cost swells what is called often, so
only their shares are told; "between the operators" is what is left of the wall clock: Python, and torch's dispatch.
"""

import contextlib
import io
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import grpo

import torch
import tyro
from torch.profiler import ProfilerActivity, profile

KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm"),
    "attention": ("_scaled_dot_product", "_flash_attention"),
    "softmax": ("_log_softmax", "_softmax"),
    "gather, index, copy": ("gather", "index", "scatter", "copy_", "cat", "slice_backward", "masked", "nonzero"),
    "AdamW and norms": ("_fused_adamw", "_foreach", "linalg_vector_norm"),
}
FLOOR = ("layers", "backward", "AdamW", "clipping")


@dataclass
class Args:
    model: str = "models/arithmetic"  # checkpoint folder or hub id
    prompts: int = 8  # in a step, with 8 samples each
    max_new_tokens: int = 8  # tokens in a completion
    micro_batch_size: int = 128  # of the update
    steps: int = 40  # of which the first quarter is not counted
    beta: float = 0.0  # above 0 there is a reference model too


def settings(args: Args, folder: str) -> grpo.Args:
    sizes = {"prompts_per_step": args.prompts, "max_new_tokens": args.max_new_tokens, "num_steps": args.steps}
    sizes |= {"micro_batch_size": args.micro_batch_size, "eval_every": 10**6, "eval_prompts": 1, "save_every": 0}
    if args.model != "models/arithmetic":  # which would fail at all sums alike, and leave the update no rows
        sizes["reward"] = (f"{Path(__file__).parent / 'peers.py'}:spread",)
    return grpo.Args(model=args.model, beta=args.beta, output_dir=folder, **sizes)


def parts_of_a_step(args: Args) -> dict[str, float]:
    """Median seconds of each part, by a clock around what main calls."""
    seconds, steps = defaultdict(float), []

    def timed(name, function):
        def call(*arguments, **keywords):
            start = time.perf_counter()
            result = function(*arguments, **keywords)
            seconds[name] += time.perf_counter() - start
            return result

        return call

    def log(run, step, metrics):
        now = time.perf_counter()
        steps.append({**seconds, "all": now - marks[-1]})
        marks.append(now)
        seconds.clear()
        original_log(run, step, metrics)

    def load_model(*arguments, **keywords):
        model, tokenizer = original_load(*arguments, **keywords)
        model.base_model.forward = timed("layers", model.base_model.forward)
        return model, tokenizer

    marks, original_log, original_load = [time.perf_counter()], common.Run.log, common.load_model
    kept = [(grpo, "rollout"), (grpo, "token_logprobs"), (torch.Tensor, "backward"), (torch.optim.AdamW, "step")]
    kept += [(torch.nn.utils, "clip_grad_norm_"), (common, "call_reward"), (common.Run, "log")]
    originals = [(owner, name, getattr(owner, name)) for owner, name in kept]
    names = {"token_logprobs": "forward", "step": "AdamW", "clip_grad_norm_": "clipping", "call_reward": "reward"}
    for owner, name, function in originals:
        setattr(owner, name, timed(names.get(name, name), function))
    common.Run.log, common.load_model = log, load_model
    try:
        run_quietly(args)
    finally:
        common.load_model = original_load
        for owner, name, function in originals:
            setattr(owner, name, function)
    steps = steps[1 + args.steps // 4 :]
    medians = {name: statistics.median(step.get(name, 0.0) for step in steps) for name in steps[0]}
    floor = sum(medians.pop(name) if name == "layers" else medians[name] for name in FLOOR)
    rest = medians["all"] - sum(value for name, value in medians.items() if name != "all")
    return medians | {"the rest: tokenising, padding, advantages, logging": rest, "the floor": floor}


def run_quietly(args: Args) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        grpo.main(settings(args, f"{folder}/run"))


def kinds_of_work(args: Args) -> dict[str, float]:
    """The share of each kind of operator in the wall clock of the last steps, by torch.profiler."""
    profiler, original, times = profile(activities=[ProfilerActivity.CPU]), common.Run.log, []

    def log(run, step, metrics):
        original(run, step, metrics)
        if step == args.steps // 4:
            profiler.start()
        if step in (args.steps // 4, args.steps):
            times.append(time.perf_counter())
        if step == args.steps:
            profiler.stop()

    common.Run.log = log
    try:
        run_quietly(args)
    finally:
        common.Run.log = original
    shares = defaultdict(float)
    for event in profiler.key_averages():
        name = event.key.removeprefix("aten::")
        kind = next((kind for kind, starts in KINDS.items() if name.startswith(starts)), "all other operators")
        if event.key.startswith("aten::"):
            shares[kind] += event.self_cpu_time_total / 1e6 / (times[1] - times[0])
    return dict(shares) | {"between the operators": 1 - sum(shares.values())}


def main(args: Args) -> None:
    parts = parts_of_a_step(args)
    print(f"a step of grpo.py, {args.prompts} x 8 completions of up to {args.max_new_tokens} tokens:")
    for name, seconds in sorted(parts.items(), key=lambda part: -part[1]):
        print(f"  {seconds * 1e3:8.1f} ms  {seconds / parts['all']:4.0%}  {name}")
    print("kinds of work:")
    for name, share in sorted(kinds_of_work(args).items(), key=lambda part: -part[1]):
        print(f"  {share:4.0%}  {name}")


if __name__ == "__main__":
    main(tyro.cli(Args))
