"""examples/: each a copy of grpo.py but for its change; and what tools.py's change must keep."""

import difflib
import hashlib
import sys
import traceback

import grpo

import pytest
import torch
from conftest import random_model
from copies import REPO, pieces
from oracle import plain_logprobs
from test_rollout import PROMPTS, padded
from test_scripts import FEW, read_jsonl, weights_of

sys.path.insert(0, str(REPO / "examples"))

import calculator
import tools

# The lines that may be changed, counted as diff's < and >; the functions that may differ; the digest of the diff
COPIES = {
    "tools": (90, "Args rollout respond token_logprobs batch_logprobs evaluate main", "f59146d6c0b7"),
    "vllm_sampler": (70, "Args load_sampler rollout evaluate main", "ac35bf8a3ead"),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_differs_from_grpo_in_its_change_alone(name):
    """Carry a change of grpo.py over; where it meets lines that the copy changes, read the diff, store its digest."""
    most, changed, digest = COPIES[name]
    texts = [(REPO / path).read_text().splitlines() for path in ("grpo.py", f"examples/{name}.py")]
    own, copied = ({x: text[a:b] for x, (a, b) in pieces("\n".join(text)).items()} for text in texts)
    assert {x for x in own.keys() | copied if own.get(x) != copied.get(x)} == set(changed.split())
    difference = [line for line in list(difflib.unified_diff(*texts, n=0))[2:] if line[0] in "+-"]
    assert len(difference) <= most
    assert hashlib.md5("\n".join(difference).encode()).hexdigest()[:12] == digest, "\n".join(difference)


def sample(respond, max_new_tokens):
    model, prompts = random_model("gpt2", stop_ids=(0, *range(10, 60))), padded(PROMPTS)
    torch.manual_seed(0)
    settings = {"respond": respond, "samples_per_prompt": 4, "temperature": 0.7}
    return model, prompts, tools.rollout(model, *prompts, max_new_tokens=max_new_tokens, **settings)


def test_forced_tokens_leave_log_probs_of_a_plain_pass_and_get_no_gradient(monkeypatch):
    """One to three are forced, stop tokens among them, or none; in float64 but for what the rollout stores."""
    answer = lambda b, ids: None if b % 4 == 3 or 200 in ids else [200, 0, 201][: b % 4 + 1]  # noqa: E731
    model, prompts, (ids, mask, stored, truncated, sampled) = sample(answer, 40)
    assert (mask - sampled).sum(1).tolist() == [1, 2, 3, 0] * 3 and not truncated.any()
    assert (sampled.gather(1, mask.sum(1, keepdim=True).long() - 1) == 1).all()  # no forced stop token ends a row
    model.double()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    hidden = tools.hidden_states(model, *prompts, ids, mask)
    monkeypatch.setattr(tools, "hidden_states", lambda *batch: hidden)
    logprobs = tools.token_logprobs(model, *prompts, ids, mask, sampled, temperature=0.7)
    plain = torch.zeros_like(logprobs)
    for row, length in enumerate(mask.sum(1).int().tolist()):
        plain[row, :length] = plain_logprobs(model, PROMPTS[row // 4], ids[row, :length].tolist(), 0.7)
    torch.testing.assert_close(logprobs, plain * sampled, atol=1e-10, rtol=0)
    torch.testing.assert_close(stored.double(), plain * sampled, atol=1e-4, rtol=0)
    gradient = torch.autograd.grad(logprobs.square().sum(), hidden)[0]  # [B, T, H], of the states before each token
    assert ((gradient != 0).any(-1) == (sampled > 0)).all()


def test_an_answer_too_long_for_the_room_left_ends_the_completion_as_truncated():
    calls = {}

    def respond(b, ids):
        calls.setdefault(b, []).append(len(ids))
        return [200] * 3 if len(calls[b]) == 1 else None

    _, _, (ids, mask, _, truncated, sampled) = sample(respond, 8)
    assert {first for first, *_ in calls.values()} > {4, 5}  # after 5 of 8 there is no room for 3 and one more
    for b, (first, *more) in calls.items():
        assert truncated[b] == (not more) and (mask - sampled)[b].sum() == (3 if first < 5 else 0)
        assert ids[b, first : first + 3].tolist() == [200] * 3 if first < 5 else mask[b].sum() == first


def run(module, folder, **settings):
    small = {"num_steps": 2, "num_minibatches": 2, "prompts_per_step": 4, "eval_prompts": 8, "learning_rate": 1e-3}
    module.main(module.Args(**{"data": FEW, "output_dir": str(folder)} | small | settings))
    rows = read_jsonl(folder / "metrics.jsonl")
    metrics = [{name: row[name] for name in row if "time" not in name and "second" not in name} for row in rows]
    return metrics, weights_of(folder / "model")


def environment(tmp_path, body):
    (tmp_path / "own.py").write_text(f"class Own:\n    n = 0\n\n    def respond(self, row, text):\n        {body}\n")
    return f"{tmp_path}/own.py:Own"


def test_with_an_environment_that_answers_nothing_a_run_is_grpos_to_the_last_bit(tmp_path):
    metrics, weights = run(grpo, tmp_path / "grpo")
    own, after = run(tools, tmp_path / "tools", environment=environment(tmp_path, "row.clear()"))
    assert [row.pop("completion/calls", 0.0) for row in own] == [0.0] * 3 and own == metrics
    assert all(torch.equal(after[name], weights[name]) for name in weights)


def test_messages_are_answered_and_what_nothing_could_score_is_not_trained(tmp_path, chat_model, chat_data):
    """Each completion's own instance answers twice; the reward reads that, and scores the evaluations alone."""
    own = environment(tmp_path, "self.n += 1; return f'[{self.n}]' if self.n < 3 else None")
    judge = "[x[0]['content'].count('[') if len(completions) < 9 else None for x in completions]"
    (tmp_path / "own_judge.py").write_text(f"def judge(completions, **columns):\n    return {judge}\n")
    settings = {"model": chat_model, "data": chat_data, "eval_data": chat_data, "max_new_tokens": 24}
    reward = (f"{tmp_path}/own_judge.py:judge",)
    (before, first, _), _ = run(tools, tmp_path / "run", environment=own, reward=reward, **settings)
    assert before["eval/judge"] == 2.0 and first["completion/calls"] > 0.9 and first["policy/entropy"] is None
    assert first["completion/length"] < 16  # it would be 19 with the answers


@pytest.mark.parametrize("body", ["raise ValueError('broken')", "exit(3)"])
def test_an_environment_that_raises_names_itself(tmp_path, body):
    name = environment(tmp_path, body)
    with pytest.raises(RuntimeError) as raised:
        run(tools, tmp_path / "run", environment=name)
    assert str(raised.value).startswith(f"--environment {name}: ")
    assert body in "".join(traceback.format_exception(raised.value))


def test_the_calculator_and_its_data(tmp_path):
    values = {" 347 + 285": "=632\n", "2-30+1": "=-27\n", " 1 + 2=3\n": None, " 632": None, "9**9": None, "1 +": None}
    assert {text: calculator.Calculator().respond({}, text) for text in values} == values
    calculator.main(tmp_path)
    sums = [{row["prompt"].split("?")[0] for row in read_jsonl(path)} for path in tmp_path.iterdir()]
    assert len(sums) == 4 and len(set.union(*sums)) == sum(map(len, sums))  # no file has a sum of another
