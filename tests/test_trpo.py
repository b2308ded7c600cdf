"""TRPO's parts against linear algebra on explicit matrices, and the bound in a real run."""

from functools import partial

import common
import trpo

import pytest
import torch
from conftest import random_model

V = 5
PROMPT, PROMPT_MASK = torch.tensor([[1, 2], [0, 3]]), torch.tensor([[1, 1], [0, 1]])
COMPLETION = torch.tensor([[1, 2, 0], [3, 0, 4], [2, 2, 2], [0, 1, 3]])
MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
BATCH = (PROMPT, PROMPT_MASK, COMPLETION, MASK)
ADVANTAGES = torch.tensor([1.0, -0.5, 2.0, 0.3])
CHUNKS = [(*inputs, ADVANTAGES[rows]) for rows, inputs in common.micro_batches(BATCH, torch.arange(2), 2)]


def random_vector(parameters, seed=0):
    return torch.randn(sum(p.numel() for p in parameters), generator=torch.Generator().manual_seed(seed))


def fvp_of(model, vector, temperature=0.7):
    of_chunk = {"temperature": temperature, "normalizer": MASK.sum()}
    parameters = list(model.parameters())
    factors = [trpo.fisher_factors(model, parameters, chunk, **of_chunk) for *chunk, _ in CHUNKS]
    return trpo.fisher_vector_product(factors, parameters, vector)


def run(tmp_path, **settings):
    return trpo.main(trpo.Args(**settings, output_dir=str(tmp_path / "run")))


@pytest.fixture
def small_model():
    model = random_model("llama", vocab_size=V)
    assert model.config._attn_implementation == "sdpa"  # of which the fused kernels have no second derivative
    return model


def test_fisher_vector_product_is_the_explicit_fisher_times_the_vector(small_model):
    """F = 1/N sum_t sum_y pi(y) g g' with g the gradient of log pi(y), each of them by one plain backward pass."""
    parameters = list(small_model.parameters())
    vector = random_vector(parameters)
    log_softmax = trpo.next_token_logprobs(small_model, *BATCH, temperature=0.7)
    expected = torch.zeros_like(vector)
    assert len(log_softmax) == MASK.sum() < MASK.numel()
    for t in range(len(log_softmax)):
        for y in range(V):
            g = trpo.flatten(torch.autograd.grad(log_softmax[t, y], parameters, retain_graph=True))
            expected += log_softmax[t, y].exp().item() / MASK.sum() * g * (g @ vector)
    scale = expected.abs().max().item()
    torch.testing.assert_close(fvp_of(small_model, vector), expected, atol=1e-5 * scale, rtol=1e-4)


def test_conjugate_gradient_solves():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(20, 20, generator=generator, dtype=torch.float64)
    matrix, b = root @ root.T + torch.eye(20), torch.randn(20, generator=generator, dtype=torch.float64)
    for damping in (0.0, 0.7):
        x, residual, curvature = trpo.conjugate_gradient(
            lambda v: matrix @ v, b, iterations=40, tolerance=1e-9, damping=damping
        )
        added = damping * (b @ matrix @ b) / (b @ b) * torch.eye(20)
        torch.testing.assert_close(x, torch.linalg.solve(matrix + added, b))
        assert residual < 1e-9 and curvature.item() == pytest.approx((x @ matrix @ x).item())
    products = []
    count = partial(trpo.conjugate_gradient, lambda v: products.append(v) or matrix @ v, b)
    x, residual, curvature = count(iterations=3, tolerance=0.0)
    assert len(products) == 3  # and the residual that is reported is the residual
    assert residual.item() == pytest.approx(((b - matrix @ x).norm() / b.norm()).item())
    x, _, curvature = count(iterations=3, tolerance=0.0, damping=0.1)  # not solved, but measured rightly
    assert curvature.item() == pytest.approx((x @ matrix @ x).item())
    products.clear()
    count(iterations=40, tolerance=0.1)
    assert 3 < len(products) < 20  # it stops once the residual is small enough
    x, _, _ = trpo.conjugate_gradient(lambda v: -v, b, iterations=5, tolerance=0.0)
    assert (x == 0).all()  # no step along a direction without curvature


@pytest.mark.parametrize(
    ("slope", "curvature", "step", "fraction"),
    [
        (1.0, 1.0, 1.0, 0.25),  # KL 0.5 x^2: within 0.04 at 1 / 4
        (1.0, 0.01, 1.0, 1.0),  # the whole step is within the bound
        (-1.0, 1.0, 1.0, 0.0),  # the surrogate falls along the step
        (1.0, 1e9, 1.0, 0.0),  # no fraction is within the bound
    ],
)
def test_line_search(slope, curvature, step, fraction):
    start = torch.tensor([0.1, 0.3])
    parameters = [torch.nn.Parameter(start.clone()), torch.nn.Parameter(torch.tensor([[0.7]]))]
    before = [parameter.clone() for parameter in parameters]

    def measure():
        moved = (parameters[0][0] - 0.1).item()
        return slope * moved, 0.5 * curvature * moved**2

    direction = torch.tensor([step, 0.0, 0.5])
    taken, kl = trpo.line_search(measure, parameters, direction, max_kl=0.04, max_backtracks=6)
    assert taken == fraction and kl <= 0.04
    if fraction:
        torch.testing.assert_close(parameters[0].data, start + torch.tensor([step, 0.0]) * fraction)
        torch.testing.assert_close(parameters[1].data, torch.tensor([[0.7 + 0.5 * fraction]]))
    else:
        assert all((now == then).all() for now, then in zip(parameters, before))


def test_line_search_refuses_what_is_not_finite():
    parameter = torch.nn.Parameter(torch.ones(1))

    def measure():
        return parameter.item(), 0.0 if parameter.item() == 1 else float("nan")

    assert trpo.line_search(measure, [parameter], torch.ones(1), max_kl=1.0, max_backtracks=3) == (0.0, 0.0)
    assert parameter.item() == 1.0


def test_a_failed_search_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(trpo, "surrogate_and_kl", lambda *a, **k: (0.0, 0.0))  # never rises
    metrics = run(tmp_path, num_steps=2, prompts_per_step=16, eval_prompts=4)
    assert metrics["line_search/failed"] == 1 and metrics["line_search/fraction"] == 0
    before = common.load_model("models/arithmetic", torch.device("cpu"))[0].state_dict()
    after = common.load_model(str(tmp_path / "run" / "model"), torch.device("cpu"))[0].state_dict()
    assert all((before[name] == after[name]).all() for name in before)


def test_float32_tells_whether_a_step_is_within_a_small_bound(tmp_path):
    """The step above in float32: its KL is 0.998 of the bound, and must not be measured as more than the bound."""
    metrics = run(tmp_path, num_steps=1, prompts_per_step=16, max_kl=1e-7, fisher_samples=4, eval_prompts=2)
    assert metrics["line_search/fraction"] == 1.0 and metrics["kl/old"] == pytest.approx(0.998e-7, rel=0.02)
