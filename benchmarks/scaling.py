"""What more processes, LoRA and gradient checkpointing change: the seconds of a step, and memory per parameter.

python benchmarks/scaling.py --model FOLDER --data train.jsonl

Each cell of the times has several runs: their medians, and how many times faster several processes were than one, with
the range of the rounds, as machines are noisy. Scoring counts as update. Memory is the most that a process had, as the
operating system counts it; bytes per parameter are those beyond what the embedded model's sft.py takes. On CPUs the
processes share the threads of one.
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
KL = ("--beta", "0.04")
SHORT = ("--prompts-per-step", "2", "--eval-prompts", "2", "--micro-batch-size", "1", "--max-new-tokens", "16")
LONG = ("--prompts-per-step", "8", "--eval-prompts", "2", "--micro-batch-size", "4", "--max-length", "512")
GROUP = ("--samples-per-prompt", "4", "--prompts-per-step", "4", "--eval-prompts", "2", "--micro-batch-size", "4")
TIMES = {"sft": LONG, "grpo": (*GROUP, *KL, "--max-new-tokens", "64")}
SFT = (*SHORT, "--max-length", "256")
RL = (*SHORT, "--samples-per-prompt", "2")
MEMORY = [  # a title's script and flags, and the flags that only make it small
    ("sft.py", SFT),
    ("sft.py --lora-rank 16", SFT),
    ("grpo.py --beta 0.04", RL),
    ("grpo.py --beta 0.04 --lora-rank 16", RL),
    ("ppo.py", (*RL, "--num-minibatches", "1")),
    ("ppo.py --lora-rank 16", (*RL, "--num-minibatches", "1")),
    ("sft.py --micro-batch-size 4 --max-length 512", LONG),
    ("sft.py --micro-batch-size 4 --max-length 512 --gradient-checkpointing", LONG),
]


@dataclass
class Args:
    model: str
    """of a size at which memory is that of parameters"""
    data: str
    """.jsonl with prompts, completions and answers"""
    processes: tuple[int, ...] = (1, 2)
    """of each run"""
    threads: int = os.cpu_count() or 1
    """of all processes together"""
    rounds: int = 3
    """runs of each cell of the times, one cell after the other in each round"""
    tables: tuple[str, ...] = ("times", "memory")
    """to make"""


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


def measure(script: str, flags: tuple, processes: int, threads: int, steps: int, **environment) -> dict[str, float]:
    """Medians of a run's seconds without those of its first step, and the most memory that one of its processes had."""
    with tempfile.TemporaryDirectory() as folder:
        start = [sys.executable]
        if processes > 1:
            start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        flags = (*flags, "--num-steps", str(steps), "--eval-every", "1000", "--save-every", "0")
        command = [*start, str(REPO / script), *flags, "--output-dir", f"{folder}/run"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads // processes), **environment}
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
    rollout = statistics.median(row.get("time/rollout", 0.0) for row in rows)
    update = statistics.median(row.get("time/score", 0.0) + row["time/update"] for row in rows)
    return {"rollout": rollout, "update": update, "memory": most}


def main(args: Args) -> None:
    parameters = AutoModelForCausalLM.from_pretrained(args.model).num_parameters()
    large = ("--model", args.model, "--data", args.data)
    heads = [f"{n} process{'es' if n > 1 else ''}" for n in args.processes]
    if "times" in args.tables:
        times(args, large, f"{parameters / 1e6:.0f} M", heads)
    if "memory" in args.tables:
        memory(args, large, parameters, heads)


def times(args: Args, large: tuple, size: str, heads: list[str]) -> None:
    """Print the table of seconds, of the embedded model and of the large one."""
    faster = [f"speed of {n} over {args.processes[0]}" for n in args.processes[1:]]
    print(
        f"| seconds of a step: rollout + update | {' | '.join(heads + faster)} |\n|---|{'---|' * len(heads + faster)}"
    )
    for script, sizes in TIMES.items():
        for title, flags in ((f"{script}.py", ()), (f"{script}.py, {size}", (*large, *sizes))):
            rounds = [
                [measure(f"{script}.py", flags, n, args.threads, 4 if flags else 20) for n in args.processes]
                for _ in range(args.rounds)
            ]
            cells = []
            for runs in zip(*rounds):
                rollout, update = (statistics.median(run[name] for run in runs) for name in ("rollout", "update"))
                cells.append(f"{rollout:.3g} + {update:.3g}")
            seconds = [[run["rollout"] + run["update"] for run in runs] for runs in zip(*rounds)]
            for several in seconds[1:]:
                ratios = sorted(one / more for one, more in zip(seconds[0], several))
                cells.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
            print(f"| {title} | {' | '.join(cells)} |", flush=True)


def memory(args: Args, large: tuple, parameters: int, heads: list[str]) -> None:
    """Print the table of memory, of the large model."""
    # glibc keeps what is freed unless it is told to map it: then the count is of what is held
    held = {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    base = measure("sft.py", ("--eval-prompts", "2"), 1, args.threads, 2, **held)["memory"]
    print(f"\nWithout a model a process has {base / 1e6:.0f} MB.\n")
    print(f"| MB of a process, bytes per parameter | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
    for title, small in MEMORY:
        script, *flags = title.split()
        runs = [measure(script, (*large, *small, *flags), n, args.threads, 2, **held) for n in args.processes]
        cells = [f"{run['memory'] / 1e6:.0f}, {(run['memory'] - base) / parameters:.1f}" for run in runs]
        print(f"| `{title}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
