"""Every completion that a tiny model can give to a prompt, and what follows from that exactly.

Nothing here is taken from the scripts. Each completion is one row without padding, mask or position ids, through a
plain forward pass in float64; expectations are sums over all of them, and gradients are autograd's of those sums.
"""

import torch


def enumerate_completions(vocab_size, stop_ids, max_new_tokens):
    """Lists of token ids: all that end with a stop token, and all that are cut off at max_new_tokens."""
    done, open_ones = [], [[]]
    for _ in range(max_new_tokens):
        longer = [[*start, token] for start in open_ones for token in range(vocab_size)]
        done += [ids for ids in longer if ids[-1] in stop_ids]
        open_ones = [ids for ids in longer if ids[-1] not in stop_ids]
    return done + open_ones


def plain_log_softmax(model, prompt, completion, temperature):
    """log pi(. | x, y_<t) [T, V] of one completion, from one unpadded row."""
    logits = model(torch.tensor([[*prompt, *completion]])).logits[0]
    return (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]


def plain_logprobs(model, prompt, completion, temperature):
    """log pi(y_t | x, y_<t) [T] of one completion."""
    log_softmax = plain_log_softmax(model, prompt, completion, temperature)
    return torch.stack([log_softmax[t, token] for t, token in enumerate(completion)])


def flat_gradient(scalar, model):
    """d scalar / d theta [n], of a graph that is kept."""
    gradients = torch.autograd.grad(scalar, list(model.parameters()), retain_graph=True)
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


class Oracle:
    """All M completions of a prompt under a model, with their probabilities."""

    def __init__(self, model, prompt, *, max_new_tokens, stop_ids=(0,), temperature=1.0):
        self.model, self.prompt, self.temperature = model, prompt, temperature
        self.completions = enumerate_completions(model.config.vocab_size, stop_ids, max_new_tokens)
        self.log_softmax = [plain_log_softmax(model, prompt, c, temperature) for c in self.completions]  # [T, V] each
        self.token_logprobs = [
            torch.stack([row[token] for row, token in zip(rows, completion)])
            for rows, completion in zip(self.log_softmax, self.completions)
        ]
        self.logp = torch.stack([logprobs.sum() for logprobs in self.token_logprobs])  # [M]
        self.p = self.logp.exp()
        self.ended = torch.tensor([completion[-1] in stop_ids for completion in self.completions])
        self.lengths = torch.tensor([len(completion) for completion in self.completions])
        M, T = len(self.completions), max_new_tokens
        self.ids, self.mask = torch.full((M, T), 1), torch.zeros(M, T)
        for row, completion in enumerate(self.completions):
            self.ids[row, : len(completion)] = torch.tensor(completion)
            self.mask[row, : len(completion)] = 1.0

    def batch(self, padding=2):
        """What the scripts' functions take: prompt_ids, prompt_mask [1, P], completion_ids, completion_mask [M, T]."""
        ids, mask = [2] * padding + self.prompt, [0] * padding + [1] * len(self.prompt)
        return torch.tensor([ids]), torch.tensor([mask]), self.ids, self.mask

    def gradient(self, scalar):
        return flat_gradient(scalar, self.model)

    def policy_gradient(self, rewards):
        """d/d theta of the expected reward, sum_y p(y) R(y), differentiated as it stands."""
        return self.gradient((self.p * rewards).sum())

    def kl(self, other):
        """KL of whole completions, sum_y p(y) log p(y) / q(y); its gradient is by this oracle's parameters."""
        return (self.p * (self.logp - other.logp.detach())).sum()

    def prefixes(self):
        """{y_<t: [indices of the completions that begin so]}: the states in which a token is sampled."""
        states = {}
        for index, completion in enumerate(self.completions):
            for t in range(len(completion)):
                states.setdefault(tuple(completion[:t]), []).append(index)
        return states
