"""Runs of scripts in float64 whose results do not depend on the number of processes.

python worker.py JOBS, or torchrun --nproc-per-node N worker.py JOBS, where JOBS is a JSON file with a list of
{"script": name, "args": {...}}, with "die": [rank, step] for a process that is to be killed in that step, and with
"own_rollout": true for the script's own, which draws random numbers.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
import time
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


def in_double(rollout):
    """What it returns, of its own float32, in float64."""

    def sample(*args, **settings):
        torch.Tensor.float = FLOAT
        completion_ids, completion_mask, logprobs, truncated = rollout(*args, **settings)
        torch.Tensor.float = torch.Tensor.double
        return completion_ids, completion_mask.double(), logprobs.double(), truncated

    return sample


def by_prompt(rollout):
    """A rollout in which a prompt's completions depend on nothing but the prompt and the policy."""

    def sample(model, prompt_ids, prompt_mask, **settings):
        results = [], [], [], []
        for row, mask in zip(prompt_ids, prompt_mask):
            row = row[mask > 0]
            with torch.random.fork_rng():
                torch.manual_seed(zlib.crc32(str(row.tolist()).encode()))
                sampled = in_double(rollout)(model, row[None], torch.ones_like(row)[None], **settings)
            for rows, result in zip(results, sampled):
                rows += list(result)
        padded = [torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) for rows in results[:3]]
        return *padded, torch.stack(results[3])

    return sample


def checked(gathered):
    """common.gathered, where a model has all of its parameters within it, and its share outside."""

    @contextlib.contextmanager
    def watch(model):
        with gathered(model):
            yield
            assert not any(hasattr(p, "to_local") for p in model.parameters())
        if hasattr(model, "unshard"):
            parameters = list(model.parameters())
            share = sum(p.to_local().numel() for p in parameters) / sum(p.numel() for p in parameters)
            assert 0.9 < share * common.WORLD_SIZE < 1.1

    return watch


def run(script: str, args: dict, die: tuple[int, int] = (-1, -1), own_rollout: bool = False) -> None:
    module, check_finite = importlib.import_module(script), common.Run.check_finite
    rollout, module.rollout = module.rollout, in_double(module.rollout) if own_rollout else by_prompt(module.rollout)

    def dying(self, step, norm):
        if (common.RANK, step) == tuple(die):
            os.kill(os.getpid(), signal.SIGKILL)
        return check_finite(self, step, norm)

    common.Run.check_finite = dying
    module.main(module.Args(**{name: tuple(v) if isinstance(v, list) else v for name, v in args.items()}))
    module.rollout, common.Run.check_finite = rollout, check_finite


if __name__ == "__main__":
    common.AutoModelForCausalLM.from_pretrained, common.gathered = load_double, checked(common.gathered)
    sleep = time.sleep
    if common.WORLD_SIZE > 1:  # one process group for all jobs, and one end
        torch.distributed.init_process_group("gloo")
        torch.distributed.init_process_group = torch.distributed.destroy_process_group = lambda *args, **settings: None
        time.sleep = lambda seconds: None
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(**job)
    sleep(0.5)
