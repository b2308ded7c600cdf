"""GRAPE's rubrics: the invariants that its definition asks for, and a critic whose probabilities are known."""

import json
import math
from functools import partial
from types import SimpleNamespace

import common
import grape
import grpo

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file

NAN = float("nan")
GENERATOR = torch.Generator().manual_seed(0)
SCORES = torch.rand(8, 3, generator=GENERATOR)
CONFIDENCES = torch.rand(8, 3, generator=GENERATOR)
WEIGHTS = torch.tensor([1.0, 0.5, 2.0])


def rewards(scores=SCORES, confidences=CONFIDENCES, weights=WEIGHTS, scope="group"):
    return grape.rubric_rewards(scores, confidences, weights, samples_per_prompt=4, confidence_scope=scope)


@pytest.mark.parametrize("scope", ["group", "batch", "none"])
def test_rewards_are_the_docstrings_formula(scope):
    """Item by item in plain floats, with unscored items in several places."""
    scores, confidences = SCORES.clone(), CONFIDENCES.clone()
    for i, k in ((0, 1), (5, 2), (6, 0), (6, 2)):
        scores[i, k] = confidences[i, k] = NAN
    scores[7] = confidences[7] = NAN
    got = rewards(scores, confidences, scope=scope)
    for i in range(7):
        members = {"group": range(i // 4 * 4, i // 4 * 4 + 4), "batch": range(8), "none": ()}[scope]
        numerator = denominator = 0.0
        for k in range(3):
            known = [confidences[j, k].item() for j in members if not scores[j, k].isnan()]
            c = sum(known) / len(known) if members else 1.0
            if not scores[i, k].isnan():
                numerator += WEIGHTS[k].item() * c * scores[i, k].item()
                denominator += WEIGHTS[k].item() * c
        assert got[i].item() == pytest.approx(numerator / denominator, rel=1e-5)
    assert got[7].isnan()  # nothing could be scored: no reward, not 0


def test_invariants():
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(rewards(SCORES[:, order], CONFIDENCES[:, order], WEIGHTS[order]), rewards())
    doubtful = CONFIDENCES.clone()
    doubtful[:, 1] = 0.0  # an item of no confidence might as well not be there
    keep = torch.tensor([0, 2])
    torch.testing.assert_close(
        rewards(confidences=doubtful), rewards(SCORES[:, keep], CONFIDENCES[:, keep], WEIGHTS[keep])
    )
    assert rewards(confidences=torch.zeros(8, 3)).tolist() == [0.0] * 8
    torch.testing.assert_close(rewards(confidences=torch.full((8, 3), 0.3)), rewards(scope="none"))
    torch.testing.assert_close(rewards(weights=WEIGHTS * 7), rewards())
    for weight in (1.0, 0.3, 7.0):  # one item of confidence 1: its score, to the last bit
        one = rewards(SCORES[:, :1], torch.ones(8, 1), torch.tensor([weight]))
        assert (one == SCORES[:, 0]).all()
    # a response does not gain by making the critic unsure of it alone: the confidence is the group's
    unsure = CONFIDENCES.clone()
    unsure[0, 0], unsure[1, 0] = unsure[1, 0].item(), unsure[0, 0].item()
    torch.testing.assert_close(rewards(confidences=unsure), rewards())


class FakeCritic:
    """A language model that answers yes to all that mentions 42, no to the rest, and nothing to what mentions tea."""

    device, context_length = torch.device("cpu"), math.inf
    config = SimpleNamespace(get_text_config=SimpleNamespace)

    def __init__(self, tokenizer, p_yes=0.6, p_no=0.2):
        self.tokenizer, self.p_yes, self.p_no, self.batches = tokenizer, p_yes, p_no, []

    def trunk(self, input_ids, attention_mask, position_ids, use_cache):
        assert (position_ids[:, -1] + 1 == attention_mask.sum(1)).all()
        texts = [self.tokenizer.decode(row[keep]) for row, keep in zip(input_ids, attention_mask > 0)]
        self.batches.append(texts)
        probabilities = torch.full((len(texts), 1, 257), 1e-9)
        y, n, other = (self.tokenizer(x).input_ids[0] for x in "YN ")  # " yes" and " no" both begin with a space
        for i, text in enumerate(texts):
            yes, no = (self.p_yes, self.p_no) if "42" in text else (self.p_no, self.p_yes)
            probabilities[i, 0, y], probabilities[i, 0, n] = (1e-4, 1e-4) if "tea" in text else (yes, no)
            probabilities[i, 0, other] = 1 - probabilities[i, 0, [y, n]].sum()
        return SimpleNamespace(last_hidden_state=probabilities.log())

    def get_output_embeddings(self):
        return torch.nn.Identity()


def test_critic_is_read_by_its_yes_and_no(tokenizer):
    critic = FakeCritic(tokenizer)
    turns = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1?"}]
    rows = [{"prompt": "What is 6 * 7?"}, {"prompt": turns}]
    rows = [rows[0], rows[1], rows[0], rows[0], rows[1]]
    texts = ["42", "a long and winding {answer}", "tea", "42", "42"]
    scores, confidences = grape.ask_critic(critic, tokenizer, "Is it right?", rows, texts, batch_size=2)
    known = [0, 1, 3, 4]
    torch.testing.assert_close(scores[known], torch.tensor([0.75, 0.25, 0.75, 0.75]), atol=1e-5, rtol=0)
    torch.testing.assert_close(confidences[known], torch.full((4,), 0.4), atol=1e-5, rtol=0)
    assert scores[2].isnan() and confidences[2].isnan()
    assert [len(batch) for batch in critic.batches] == [2, 2]  # the fourth is the first one's, and not asked again
    assert "What is 6 * 7?" in critic.batches[0][0] and "Is it right?" in critic.batches[0][0]
    assert all(part in critic.batches[0][1] for part in ("Add.", "1 + 1?", "{answer}"))


def test_critic_prompts_do_not_depend_on_the_batch_and_one_too_long_gets_no_score(tokenizer):
    model = random_model("gpt2", vocab_size=257, max_position_embeddings=128)  # absolute: padding would show
    torch.nn.init.normal_(model.lm_head.weight, std=0.02)  # flat enough for yes and no to have 1 %
    model.context_length = 128
    rows, texts = [{"prompt": "q" * n} for n in (1, 9, 4, 99)], ["a", "b" * 6, "c", "d"]
    together = grape.ask_critic(model, tokenizer, "ok?", rows, texts, batch_size=4)
    alone = grape.ask_critic(model, tokenizer, "ok?", rows, texts, batch_size=1)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-3, equal_nan=True)
    assert together.isnan().tolist() == [[False, False, False, True]] * 2


def write_rubric(folder, name, items, category="c"):
    (folder / f"{name}.json").write_text(json.dumps({"category": category, "items": items}))
    return str(folder / f"{name}.json")


def test_verifiers_get_columns_and_may_return_pairs_or_none(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def colour(prompts, completions, colour, **columns):\n"
        "    return [(0.5, 0.25) if c == 'red' else None if c == 'blue' else 1 for c in colour]\n"
    )
    items = [
        {"name": "colour", "weight": 2, "verifier": "mine.py:colour"},
        {"name": "asked", "weight": 1, "question": "q?"},
    ]
    rubrics = grape.load_rubrics((write_rubric(tmp_path, "r", items),))
    rows = [{"prompt": "p", "colour": colour} for colour in ("red", "blue", "green")]

    def ask(question, rows, texts):
        return torch.tensor([[0.1, 0.2, 0.3], [0.9, 0.8, NAN]])

    scope = {"samples_per_prompt": 1, "confidence_scope": "none"}
    rewards, scores, confidences = grape.score_rubrics(rubrics, ask, rows, ["", "", ""], **scope)
    torch.testing.assert_close(scores["colour"], torch.tensor([0.5, NAN, 1.0]), equal_nan=True)
    torch.testing.assert_close(scores["asked"], torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(confidences["colour"], torch.tensor([0.25, NAN, 1.0]), equal_nan=True)
    torch.testing.assert_close(rewards, torch.tensor([(2 * 0.5 + 0.1) / 3, 0.2, (2 * 1.0 + 0.3) / 3]))


def test_each_category_has_its_rubric(tmp_path):
    (tmp_path / "v.py").write_text(
        "def one(prompts, completions, **columns):\n    return [1.0] * len(prompts)\n"
        "def length(prompts, completions, **columns):\n    return [len(c) / 10 for c in completions]\n"
    )
    paths = (
        write_rubric(tmp_path, "a", [{"name": "one", "weight": 1, "verifier": "v.py:one"}], 0),
        write_rubric(tmp_path, "b", [{"name": "length", "weight": 1, "verifier": "v.py:length"}], "1"),
    )
    rubrics = grape.load_rubrics(paths)
    rows = [{"prompt": "p", "category": c} for c in (1, 1, 0, 0, 1, 1)]
    texts = ["x" * n for n in range(6)]
    scope = {"samples_per_prompt": 2, "confidence_scope": "batch"}
    got, components, confidences = grape.score_rubrics(rubrics, None, rows, texts, **scope)
    torch.testing.assert_close(got, torch.tensor([0.0, 0.1, 1.0, 1.0, 0.4, 0.5]))
    assert components["one"].isnan().tolist() == [True, True, False, False, True, True]
    assert confidences["length"].nan_to_num(-1).tolist() == [1, 1, -1, -1, 1, 1]
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"p{i}", "category": "01?"[i % 3]}) + "\n" for i in range(30)))
    with pytest.raises(SystemExit, match=r'--data: a "category" is \?, none of 0, 1'):
        grape.main(grape.Args(data=str(data), rubric=paths, output_dir=str(tmp_path / "run")))


def test_one_item_of_confidence_1_is_grpo_to_the_last_bit(tmp_path):
    path = write_rubric(tmp_path, "r", [{"name": "right", "weight": 0.3, "verifier": "exact_answer"}])
    settings = {"num_steps": 3, "prompts_per_step": 4, "eval_prompts": 2, "num_epochs": 2, "num_minibatches": 2}
    grpo.main(grpo.Args(**settings, output_dir=str(tmp_path / "grpo")))
    grape.main(grape.Args(**settings, rubric=(path,), output_dir=str(tmp_path / "grape")))
    first, second = (load_file(tmp_path / n / "model" / "model.safetensors") for n in ("grpo", "grape"))
    assert all((first[name] == second[name]).all() for name in first)


def test_questions_go_to_the_starting_model_or_to_the_critic(tmp_path, tokenizer, monkeypatch):
    critic_folder = str(tmp_path / "critic")
    model = random_model("qwen2", vocab_size=257, max_position_embeddings=128)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)  # nearly uniform, so yes and no get more than 1 %
    model.save_pretrained(critic_folder)
    tokenizer.save_pretrained(critic_folder)
    items = [{"name": "right", "weight": 1, "verifier": "exact_answer"}]
    items += [{"name": "clear", "weight": 1, "question": "Is it clear?"}]
    path, calls = write_rubric(tmp_path, "r", items), []

    def spy(function, *settings, **more):
        calls.append((function.__name__, torch.is_autocast_enabled("cpu"), settings[0]))
        return function(*settings, **more)

    for function in (grape.ask_critic, grape.call_verifier):
        monkeypatch.setattr(grape, function.__name__, partial(spy, function))
    for critic in ("", critic_folder):
        args = grape.Args(rubric=(path,), num_steps=2, prompts_per_step=2, critic_model=critic, learning_rate=1e-2)
        args.eval_prompts, args.micro_batch_size, args.dtype = 2, 3, "bfloat16"
        args.output_dir = str(tmp_path / f"run{len(calls)}")
        metrics = grape.main(args)
        assert {"reward/right", "reward/clear", "confidence/right", "confidence/clear"} <= set(metrics)
        assert metrics["confidence/right"] == 1.0 and metrics["reward/mean"] == metrics["reward/mean"]
    assert 0 < metrics["confidence/clear"] < 0.1 and 0 < metrics["reward/clear"] < 1
    assert {call[:2] for call in calls} == {("ask_critic", True), ("call_verifier", False)}  # as grpo.py calls a reward
    asked = [critic for name, _, critic in calls if name == "ask_critic"]
    assert asked[0].config.model_type == "llama" and asked[-1].config.model_type == "qwen2"
    start = common.load_model("models/arithmetic", torch.device("cpu"))[0].state_dict()
    assert all((value == start[name]).all() for name, value in asked[0].state_dict().items())  # frozen


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "no items"),
        ([{"name": "x", "weight": 1}], "needs"),
        ([{"name": "x", "weight": 0, "question": "?"}], "needs"),
        ([{"name": "x", "weight": 1, "question": "?", "verifier": "exact_answer"}], "needs"),
        ([{"name": "x", "weight": 1, "question": "?"}] * 2, "two of a name"),
        ([{"name": "mean", "weight": 1, "question": "?"}], "one called mean"),
    ],
)
def test_a_rubric_that_would_mislead_is_refused(tmp_path, items, message):
    with pytest.raises(SystemExit, match=message):
        grape.load_rubrics((write_rubric(tmp_path, "r", items),))
    path = write_rubric(tmp_path, "once", [{"name": "x", "weight": 1, "question": "?"}])
    with pytest.raises(SystemExit, match="second"):
        grape.load_rubrics((path, path))


@pytest.mark.parametrize("value", ["(0.5, 1.5)", "(0.5, -0.1)", "(float('inf'), 0.5)", "float('nan')"])
def test_a_verifier_that_returns_nonsense_is_refused(tmp_path, value):
    (tmp_path / "v.py").write_text(f"def v(prompts, completions, **columns):\n    return [{value}]\n")
    function = common.load_function("v.py:v", folder=tmp_path)
    with pytest.raises(SystemExit, match="verifier v: returned"):
        grape.call_verifier({"name": "v", "verifier": function}, [{"prompt": "p"}], [""], None)
