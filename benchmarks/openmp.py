"""What OpenMP's spinning costs on an idle and on a busy machine: median seconds of a step of reinforce.py.

A thread that reaches a barrier spins GOMP_SPINCOUNT turns before it sleeps (libgomp's default: 300,000). Beside another
busy process it spins away the core that the others need. common.py sets what this table recommends, unless the user has
set GOMP_SPINCOUNT or OMP_WAIT_POLICY. Needs a machine with nothing else running; the settings take turns.

    python benchmarks/openmp.py
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SETTINGS = [{"GOMP_SPINCOUNT": count} for count in ("300000", "5000", "3000", "1000")]
SETTINGS += [{"OMP_WAIT_POLICY": "PASSIVE"}, {"OMP_NUM_THREADS": "1"}]
ROUNDS = 3
SCRIPT = Path(__file__).parent.parent / "reinforce.py"


def step_seconds(setting: dict[str, str]) -> float:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--num-steps", "30", "--eval-every", "100", "--eval-prompts", "64", "--output-dir", folder]
        command = [sys.executable, SCRIPT, *flags]
        subprocess.run(command, env=environment | setting, check=True, capture_output=True)
        rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return statistics.median(sum(row[f"time/{part}"] for part in ("rollout", "score", "update")) for row in rows[5:])


def table(title: str) -> None:
    rounds = [[step_seconds(setting) for setting in SETTINGS] for _ in range(ROUNDS)]
    print(f"\n{title:<40}{'seconds':>8}{'ratio to the default':>22}")
    for setting, seconds, ratios in zip(SETTINGS, zip(*rounds), zip(*([s / r[0] for s in r] for r in rounds))):
        name = " ".join(f"{key}={value}" for key, value in setting.items())
        print(f"{name:<40}{statistics.median(seconds):>8.3f}{statistics.median(ratios):>22.2f}", flush=True)


if __name__ == "__main__":
    table("idle")
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        table("beside one busy process")
    finally:
        busy.kill()
