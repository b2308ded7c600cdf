"""Runs of scripts in float64 whose results do not depend on the number of processes.

python worker.py JOBS, or torchrun --nproc-per-node N worker.py JOBS, where JOBS is a JSON file with a list of
{"script": name, "args": {...}}, and "die": [rank, step] for a process that is to be killed in that step.
"""

import importlib
import json
import os
import signal
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import common

import torch

FLOAT = torch.Tensor.float
torch.Tensor.float = torch.Tensor.double
torch.set_default_dtype(torch.float64)
from_pretrained = common.AutoModelForCausalLM.from_pretrained


def load_double(*args, dtype, **kwargs):
    return from_pretrained(*args, dtype=torch.float64, **kwargs)


def by_prompt(rollout):
    """A rollout in which a prompt's completions depend on nothing but the prompt and the policy."""

    def sample(model, prompt_ids, prompt_mask, **settings):
        ids, masks, logprobs = [], [], []
        torch.Tensor.float = FLOAT
        for row, mask in zip(prompt_ids, prompt_mask):
            row = row[mask > 0]
            with torch.random.fork_rng():
                torch.manual_seed(zlib.crc32(str(row.tolist()).encode()))
                results = rollout(model, row[None], torch.ones_like(row)[None], **settings)
            for result, rows in zip(results, (ids, masks, logprobs)):
                rows += list(result)
        torch.Tensor.float = torch.Tensor.double
        ids, masks, logprobs = (torch.nn.utils.rnn.pad_sequence(r, batch_first=True) for r in (ids, masks, logprobs))
        return ids, masks.double(), logprobs.double()

    return sample


def run(script: str, args: dict, die: tuple[int, int] = (-1, -1)) -> None:
    module, check_finite = importlib.import_module(script), common.Run.check_finite
    rollout, module.rollout = module.rollout, by_prompt(module.rollout)

    def dying(self, step, stats, batch):
        if (common.RANK, step) == tuple(die):
            os.kill(os.getpid(), signal.SIGKILL)
        check_finite(self, step, stats, batch)

    common.Run.check_finite = dying
    module.main(module.Args(**{name: tuple(v) if isinstance(v, list) else v for name, v in args.items()}))
    module.rollout, common.Run.check_finite = rollout, check_finite


if __name__ == "__main__":
    common.AutoModelForCausalLM.from_pretrained = load_double
    if common.WORLD_SIZE > 1:  # one process group for all jobs
        torch.distributed.init_process_group()
        torch.distributed.init_process_group = torch.distributed.destroy_process_group = lambda: None
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(**job)
