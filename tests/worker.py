"""Runs of scripts in float64 whose results do not depend on the number of processes: python worker.py JOBS.

JOBS is a JSON file with a list of {"script": name, "args": {...}}, with "die": [rank, step] for a process that is to be
killed in that step, and with "own_rollout": true for the script's own, which draws random numbers.
"""

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
import transformers

FLOAT, load_model = torch.Tensor.float, common.load_model
from_pretrained = transformers.AutoModelForCausalLM.from_pretrained
torch.Tensor.float = torch.Tensor.double
torch.set_default_dtype(torch.float64)


def read_double(*args, **settings):
    return from_pretrained(*args, **settings | {"dtype": torch.float64})


def load_double(*args, **settings):
    model, tokenizer = load_model(*args, **settings)
    return model.double(), tokenizer  # with --lora-rank its frozen weights were cast


def in_double(rollout):
    """What it returns, of its own float32, in float64."""

    def sample(*args, **settings):
        torch.Tensor.float = FLOAT
        sampled = rollout(*args, **settings)
        torch.Tensor.float = torch.Tensor.double
        return [part.double() if part.is_floating_point() else part for part in sampled]

    return sample


def by_prompt(rollout):
    """A rollout in which a prompt's completions depend on nothing but the prompt and the policy."""

    def sample(model, prompt_ids, prompt_mask, **settings):
        results = [], [], [], []
        for row in (ids[mask > 0] for ids, mask in zip(prompt_ids, prompt_mask)):
            with torch.random.fork_rng():
                torch.manual_seed(zlib.crc32(str(row.tolist()).encode()))
                sampled = in_double(rollout)(model, row[None], torch.ones_like(row)[None], **settings)
            for rows, result in zip(results, sampled):
                rows += result
        padded = [torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) for rows in results[:3]]
        return *padded, torch.stack(results[3])

    return sample


def run(script: str, args: dict, die: tuple[int, int] = (-1, -1), own_rollout: bool = False) -> None:
    module, decay = importlib.import_module(script), common.decay
    rollout, module.rollout = module.rollout, in_double(module.rollout) if own_rollout else by_prompt(module.rollout)

    def dying(args, step):  # as an update begins, in which the others wait for this process
        if (common.RANK, step) == tuple(die):
            os.kill(os.getpid(), signal.SIGKILL)
        return decay(args, step)

    common.decay = dying
    module.main(module.Args(**{name: tuple(v) if isinstance(v, list) else v for name, v in args.items()}))
    module.rollout, common.decay = rollout, decay


if __name__ == "__main__":
    transformers.AutoModelForCausalLM.from_pretrained = read_double
    common.load_model = load_double
    sleep = time.sleep
    if common.WORLD_SIZE > 1:  # one process group for all jobs, and one end
        torch.distributed.init_process_group("gloo")
        torch.distributed.init_process_group = torch.distributed.destroy_process_group = lambda *args, **settings: None
        time.sleep = lambda seconds: None
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(**job)
    sleep(0.5)
