"""What the log-probs of a large vocabulary cost, forward and backward, in the ways there are to make them.

python benchmarks/head.py                            SmolLM2's head: 49,152 tokens, hidden size 576
python benchmarks/head.py --vocab 151936 --hidden 896

token_logprobs of the scripts makes chunks of 2**24 logits: up to four are "held" for the backward pass, more are made
"again" in it. Here each way takes any number. "One buffer" is an autograd function that keeps the logits only and makes
their gradient in their place. Memory is the highest of the process beyond the head's weight and gradient. Each cell is
a process of its own, the median of 5 passes.
"""

import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
import tyro
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

WAYS = ("again", "held", "whole", "linear_cross_entropy", "one buffer")


@dataclass
class Args:
    vocab: int = 49152  # tokens
    hidden: int = 576  # size of a hidden state
    tokens: tuple[int, ...] = (512, 1024, 1536)  # in a micro-batch, without padding
    only: str = ""  # one way, in this process


class OneBuffer(torch.autograd.Function):
    """Log-probs [n] of targets [n] from logits [n, V], whose memory becomes that of their gradient."""

    @staticmethod
    def forward(ctx, logits, targets):
        normalizer = torch.cat([part.logsumexp(-1, keepdim=True) for part in logits.split(256)])
        ctx.save_for_backward(logits, normalizer, targets)
        return (logits.gather(-1, targets[:, None]) - normalizer)[:, 0]

    @staticmethod
    def backward(ctx, gradient):
        logits, normalizer, targets = ctx.saved_tensors
        gradient = gradient[:, None]
        return logits.sub_(normalizer).exp_().mul_(-gradient).scatter_add_(-1, targets[:, None], gradient), None


def logprobs(way, hidden, weight, targets):
    """The log-probs [n] of targets [n] after hidden states [n, H]."""

    def of_chunk(hidden, targets):
        return F.linear(hidden, weight).log_softmax(-1).gather(-1, targets[:, None])[:, 0]

    if way == "linear_cross_entropy":  # from torch 2.13 on
        return -F.linear_cross_entropy(hidden, weight, targets, reduction="none")
    if way == "one buffer":
        return OneBuffer.apply(F.linear(hidden, weight), targets)
    if way == "whole":
        return of_chunk(hidden, targets)
    chunks = zip(*(x.split(2**24 // len(weight)) for x in (hidden, targets)))
    again = way == "again"
    return torch.cat([checkpoint(of_chunk, *c, use_reentrant=False) if again else of_chunk(*c) for c in chunks])


def measure(args: Args) -> None:
    """Print seconds and MB of one way, whose last pass must agree with the plain one."""
    torch.manual_seed(0)
    [n] = args.tokens
    weight, targets = torch.randn(args.vocab, args.hidden).mul_(0.05).requires_grad_(), torch.randint(args.vocab, (n,))
    weight.grad, upstream, seconds = torch.ones_like(weight), torch.randn(n), []  # ones are in memory, zeros may not be
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(6):
        hidden = torch.randn(n, args.hidden, requires_grad=True)
        weight.grad.zero_()
        start = time.perf_counter()
        got = logprobs(args.only, hidden, weight, targets)
        got.backward(upstream)
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plain = logprobs("whole", hidden, weight, targets)
    gradients = torch.autograd.grad(plain, (hidden, weight), upstream)
    torch.testing.assert_close((got, hidden.grad, weight.grad), (plain, *gradients), atol=1e-4, rtol=1e-4)
    print(f"{statistics.median(seconds[1:]):.2f} s, {(peak - before) / 1024:.0f} MB")


def main(args: Args) -> None:
    if args.only:
        return measure(args)
    print(f"| tokens | {' | '.join(WAYS)} |\n|{'---|' * (len(WAYS) + 1)}")
    for n in args.tokens:
        sizes = ["--vocab", str(args.vocab), "--hidden", str(args.hidden), "--tokens", str(n)]
        runs = [subprocess.run([sys.executable, __file__, *sizes, "--only", way], capture_output=True) for way in WAYS]
        cells = [(run.stdout or run.stderr).decode().strip().splitlines()[-1] for run in runs]
        print(f"| {n} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
