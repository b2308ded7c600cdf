"""What more processes, LoRA and gradient checkpointing change: seconds of a step, and memory per parameter.

python benchmarks/scaling.py --model FOLDER --data train.jsonl

Each line is a run of its own, the embedded model's and then that of --model. Memory is the largest of a process, as the
operating system counts it; bytes per parameter are those beyond what the same run of the embedded model takes. On CPUs
the processes share the threads that one would have.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from transformers import AutoModelForCausalLM

REPO = Path(__file__).parent.parent
LORA, AGAIN = ("--lora-rank", "16"), ("--gradient-checkpointing",)
KL = ("--beta", "0.04")
SETTINGS = {"sft": ((), AGAIN, LORA, (*LORA, *AGAIN)), "grpo": (KL, (*KL, *LORA)), "ppo": ((), LORA)}
STEPS = 3


@dataclass
class Args:
    model: str
    """of a size at which memory is that of parameters"""
    data: str
    """.jsonl with prompts, completions and answers"""
    scripts: tuple[str, ...] = ("sft", "grpo", "ppo")
    """to measure"""
    processes: tuple[int, ...] = (1, 2)
    """of each run"""
    threads: int = os.cpu_count() or 1
    """of all processes together"""


def workers(launcher: int) -> list[int]:
    """The processes of a script that this one started, and not torchrun's own."""
    found, known = [], [launcher]
    for pid in known:
        try:
            known += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
            if b"torch.distributed.run" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found


def peak(pid: int) -> int:
    """The most memory that a process had so far, in bytes."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def measure(script: str, flags: tuple, processes: int, threads: int) -> dict[str, float]:
    """Medians of a run's seconds without those of its first step, and the most memory that one of its processes had."""
    with tempfile.TemporaryDirectory() as folder:
        start = [sys.executable]
        if processes > 1:
            start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        flags = (*flags, "--num-steps", str(STEPS), "--eval-every", "1000", "--save-every", "0")
        command = [*start, str(REPO / f"{script}.py"), *flags, "--output-dir", f"{folder}/run"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads // processes)}
        most = 0
        with open(f"{folder}/log", "w+") as log:
            with subprocess.Popen(command, env=environment, stdout=log, stderr=log) as process:
                while process.poll() is None:
                    most = max([most, *map(peak, workers(process.pid))])
                    time.sleep(0.05)
            if process.returncode:
                log.seek(0)
                sys.exit(f"{' '.join(command)}\n{log.read()[-3000:]}")
        rows = [json.loads(line) for line in Path(f"{folder}/run/metrics.jsonl").read_text().splitlines()][2:]
    times = {name: statistics.median(row.get(f"time/{name}", 0.0) for row in rows) for name in ("rollout", "update")}
    return times | {"memory": most}


def main(args: Args) -> None:
    parameters = AutoModelForCausalLM.from_pretrained(args.model).num_parameters()
    shape = ["--prompts-per-step", "4", "--max-new-tokens", "64", "--eval-prompts", "2"]
    sizes = {
        "embedded": ["--eval-prompts", "2"],
        f"{parameters / 1e6:.0f} M": ["--model", args.model, "--data", args.data, *shape],
    }
    print("| script | model | processes | seconds of a step | rollout + update | MB of a process | bytes a parameter |")
    print("|---|---|---|---|---|---|---|")
    for script in args.scripts:
        group = ("--samples-per-prompt", "4", "--micro-batch-size", "4") if script != "sft" else ()
        for setting in SETTINGS[script]:
            for processes in args.processes:
                small = 0
                for name, flags in sizes.items():
                    flags = (*flags, *setting, *(group if name != "embedded" else ()))
                    run = measure(script, flags, processes, args.threads)
                    share = f"{(run['memory'] - small) / parameters:.1f}" if small else ""
                    small = run["memory"]
                    seconds = f"{run['rollout'] + run['update']:.3g} | {run['rollout']:.3g} + {run['update']:.3g}"
                    title = f"`{' '.join([f'{script}.py', *setting])}` | {name} | {processes}"
                    print(f"| {title} | {seconds} | {run['memory'] / 1e6:.0f} | {share} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
