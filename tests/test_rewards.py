"""Rewards as TRL calls them, and what the built-in ones hold to be right."""

import asyncio
import json
import pickle
import sys
import threading
import types
from functools import partial
from pathlib import Path

import builtin_rewards
import common
import grpo

import numpy as np
import pytest
import torch

PAIRS = [json.loads(line) for line in Path(__file__).with_name("answers.jsonl").read_text().splitlines()]
ROWS = [{"prompt": "What is 37 + 48?", "answer": "85", "completion": " 85"}] * 2
TEXTS, IDS = [" 85", " 75"], [[1, 2, 0], [1, 3, 0]]


def own(tmp_path, text, name="mine"):
    (tmp_path / f"{name}.py").write_text(text)
    return f"{tmp_path}/{name}.py"


def scores_of(name, rows=ROWS, texts=TEXTS, ids=IDS):
    return common.load_reward((name,), (), rows)(rows, texts, ids)[0].tolist()


def test_exact_answer_of_cases_from_public_reports():
    """Each row names its source; "0 or 1" are right answers in a form that may be missed, never wrong ones."""
    assert len(PAIRS) > 350 and sum(row["right"] == 0 for row in PAIRS) == 200
    for row in PAIRS:
        got = builtin_rewards.exact_answer(["q"], [row["completion"]], answer=[row["truth"]])[0]
        assert got == row["right"] or row["right"] == "0 or 1", row


@pytest.mark.parametrize(
    ("truth", "said", "score"),
    [
        (0, " 0", 1),
        (0.0, "0", 1),
        (1e-05, "0.00001", 1),
        (1e16, "10000000000000000", 1),
        (85.0, "85", 1),
        ("", "", None),
        (None, "5", None),
        (float("nan"), "5", None),
        ("so 3 + 4 = 7", "7", 0),  # a sentence is a text
        ("#### 1,200.50", "#### 1200.5", 1),
        ("42", "<think>#### 42", 0),  # cut off in its thoughts
        ("42", "<think>41 or 42</think>so 41", 0),
        ("42", "#### 42\n####", 1),
        ("42", r"\boxed{42}, no, \boxed{4", 0),
        ("5", "x<=5", 0),
        ("6", "a=5,b=6", 0),
        ("85", "37+48=85", 1),
        ("5", "$2+3=5$", 1),
        ("5", "3x=5", 0),
        ("85", "The sum is 85.", 1),
        ("85", "The sum is: 80 or 85", 0),
        ("5", "it comes to $5 and that is it", 0),  # right, but in the midst of a sentence
        ("18", "6 is 3 times 2. It is 18", 0),
        ("5", "Answer: - 5", 0),
        ("5", "3 : 5", 0),
        ("5", "4 divided by 5", 0),
        ("5", "10 \u00b7 5", 0),
        ("5", "5 \\pi", 0),
        ("5", "5 thousands", 0),
        ("5", "5 squared", 0),
        ("5", "x = 4, y = 5", 0),
        ("5", "x is 4 and y is 5", 0),
        ("72", "48 + 24 = 72", 1),
        ("72", "Sold in all: **72**", 1),
        ("72", "<answer>72</answer>", 1),
        ("Paris", "Paris.", 1),
        ("Paris", "Rome", 0),
    ],
)
def test_exact_answer(truth, said, score):
    assert builtin_rewards.exact_answer(["q"], [said], answer=[truth]) == [score]


def test_exact_answer_refuses_what_is_no_answer_before_a_model_is_loaded():
    for truth in ([18, 18.0], True, {"a": 1}):
        with pytest.raises(SystemExit, match="'What is 2': exact_answer takes a text or a number"):
            common.load_reward(("exact_answer",), (), [{"prompt": "What is 2", "answer": truth}])


FORMS = """
import functools
def only_completions(completions, **kwargs):
    return [float(len(set(text))) for text in completions]
def other_order(answer, completions, prompts):
    return [float(text.strip() == truth) for text, truth in zip(completions, answer)]
def optional(completions, strict=True):
    return [float(strict and text.strip() == "85") for text in completions]
def only_kwargs(**kwargs):
    return [float(text.strip() == "85") for text in kwargs["completions"]]
def keyword_only(*, completion_ids):
    return [float(ids[1] == 2) for ids in completion_ids]
class Judge:
    def __call__(self, completions, answer):
        return other_order(answer, completions, None)
judge, part = Judge(), functools.partial(other_order)
async def later(completions, answer):
    return other_order(answer, completions, None)
class Later:
    async def __call__(self, completions, answer):
        return await later(completions, answer)
later_object = Later()
def iterator(completions):
    yield from (float(text.strip() == "85") for text in completions)
def colour(completions, colour): pass
def positional(completions, /): pass
nothing = 1
"""


@pytest.mark.parametrize(
    "name",
    "other_order optional only_kwargs keyword_only judge part later later_object iterator".split(),  # noqa: SIM905
)
def test_a_reward_is_called_by_keyword_whatever_it_is(name, tmp_path):
    assert scores_of(own(tmp_path, FORMS) + f":{name}") == [1.0, 0.0]


def test_only_completions(tmp_path):
    assert scores_of(own(tmp_path, FORMS) + ":only_completions") == [3.0, 3.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("colour", "takes colour, but a reward is given, by name, prompts, completions, completion_ids, answer"),
        ("nothing", "is not a callable object"),
        ("missing", "no attribute 'missing'"),
    ],
)
def test_what_fits_nothing_is_refused_by_name_before_a_model_is_loaded(name, message, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "load_model", lambda *args, **settings: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit, match=message) as caught:
        grpo.main(grpo.Args(reward=(own(tmp_path, FORMS) + f":{name}",), output_dir=str(tmp_path / "run")))
    assert "\n" not in caught.value.code and f"mine.py:{name}" in caught.value.code


def test_a_column_with_the_name_of_an_argument_is_refused():
    with pytest.raises(SystemExit, match='rename the column "completion_ids"'):
        common.load_reward(("format",), (), [{"prompt": "a", "completion_ids": [1]}])


def test_columns_that_only_some_rows_have_reach_the_reward(tmp_path):
    name = own(tmp_path, "def judge(completions, hint):\n    return [float(h == 'x') for h in hint]\n") + ":judge"
    rows = [{"prompt": "a"}, {"prompt": "b", "hint": "x"}]
    assert scores_of(name, rows, ["", ""], [[], []]) == [0.0, 1.0]
    with pytest.raises(SystemExit, match="second reward"):
        common.load_reward((name, name), ())


def test_each_row_has_its_own_truth(tmp_path):
    rows = [{"prompt": "a", "answer": "7"}, {"prompt": "b", "completion": " 8"}]
    for part in (rows, rows[1:]):
        texts = [" 7", " 8"][-len(part) :]
        assert common.load_reward(("exact_answer",), ())(part, texts)[0].tolist() == [1.0] * len(part)
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "c", "hint": 1}]))
    loaded = [row for part in common.load_data(str(tmp_path / "d.jsonl"), "", 9, ("prompt",)) for row in part]
    assert {frozenset(row) for row in loaded} == {frozenset(["prompt", "answer", "completion", "hint"])}


def test_messages_are_answered_by_messages_and_none_scores_nothing(tmp_path):
    text = "def judge(prompts, completions, colour):\n"
    text += "    assert prompts[0] == [{'role': 'user', 'content': 'q'}]\n"
    text += "    assert completions[0] == [{'role': 'assistant', 'content': 'a'}]\n"
    text += "    return [2.0 if c == 'red' else None for c in colour]\n"
    score = common.load_reward((own(tmp_path, text) + ":judge",), (0.5,))
    rows = [{"prompt": [{"role": "user", "content": "q"}], "colour": c} for c in ("red", "blue")]
    rewards, components = score(rows, ["a", "b"])
    assert rewards[0] == 1.0 and rewards[1].isnan() and components["judge"][0] == 2.0


def test_installed_modules_and_neighbours_and_pickle(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    module = types.ModuleType("judges_of_mine")
    module.long = lambda completions: [float(len(text)) for text in completions]
    monkeypatch.setitem(sys.modules, "judges_of_mine", module)
    assert scores_of("judges_of_mine:long") == [3.0, 3.0]
    own(tmp_path, "def right(text):\n    return float(text == ' 85')\n", "beside_me")
    text = "from beside_me import right\ndef judge(completions):\n    return [right(text) for text in completions]\n"
    name = own(tmp_path, text, "my_judge") + ":judge"
    assert scores_of(name) == [1.0, 0.0]
    function = common.load_function(name)
    assert pickle.loads(pickle.dumps(function)) is function  # as a process pool sends it
    count = "import sys\nsys.loads_of_mine = getattr(sys, 'loads_of_mine', 0) + 1\n"
    count = own(tmp_path, count + "def a(prompts): return [0.0]\nb = a\n", "counted")
    common.load_reward((f"{count}:a", f"{count}:b"), ())
    assert sys.loads_of_mine == 1  # two rewards of one file share its state, such as a judge model
    for name in ("random", "numpy"):
        with pytest.raises(SystemExit, match="rename the file"):
            common.load_function(own(tmp_path, "def f(prompts): pass\n", name) + ":f")
    other = tmp_path / "other"
    other.mkdir()
    assert scores_of(own(other, "def judge(completions):\n    return [5.0, 6.0]\n", "my_judge") + ":judge") == [5, 6]


def test_numbers_of_any_library(monkeypatch):
    values = [np.float32(0.5), np.int64(2), np.bool_(True), torch.tensor(0.25), True, 3, None]
    assert common.to_floats("r", values, [""] * 7)[:6].tolist() == [0.5, 2.0, 1.0, 0.25, 1.0, 3.0]
    for value in ("0.5", float("nan"), np.inf, [1.0], torch.ones(2), 10**400, object()):
        with pytest.raises(SystemExit, match=r"reward r: returned .* for the completion 'text'; expected a finite"):
            common.to_floats("r", [value], ["text"])
    for returned in ("10", None, 1.0):
        monkeypatch.setitem(common.REWARDS, "r", lambda completions, value=returned: value)
        with pytest.raises(SystemExit, match=r"reward r: (raised TypeError|returned '1')"):
            scores_of("r")
    for returned in (np.ones(2), torch.ones(2), (1.0, 1.0)):
        monkeypatch.setitem(common.REWARDS, "r", lambda completions, value=returned: value)
        assert scores_of("r") == [1.0, 1.0]


def test_a_reward_changes_nobodys_data(monkeypatch):
    def greedy(prompts, completions, completion_ids, tags):
        for prompt, completion, ids, tag in zip(prompts, completions, completion_ids, tags):
            assert len(prompt) == 1 and len(tag) == 1
            prompt.append(completion.pop())
            tag.append("seen")
            ids.clear()
        return [1.0] * len(prompts)

    for name in ("first", "second"):
        monkeypatch.setitem(common.REWARDS, name, greedy)
    row = {"prompt": [{"role": "user", "content": "q"}], "tags": ["t"]}
    score, ids = common.load_reward(("first", "second"), (), [row]), [[1], [2]]
    for _ in range(2):  # two samples of one prompt, two rewards, twice
        assert score([row, row], ["a", "b"], ids)[0].tolist() == [2.0, 2.0]
    assert row == {"prompt": [{"role": "user", "content": "q"}], "tags": ["t"]} and ids == [[1], [2]]


def test_asynchronous_rewards_wait_together_on_one_loop_also_in_a_notebook(monkeypatch):
    started, loops = [], []

    async def judge(completions, other):
        started.append(other)
        loops.append(asyncio.get_running_loop())
        while len(set(started)) < 2:  # would wait for good if they came one after the other
            await asyncio.sleep(0.001)
        return [1.0] * len(completions)

    for name in ("first", "second"):
        monkeypatch.setitem(common.REWARDS, name, partial(judge, other=name))
    score = common.load_reward(("first", "second"), ())
    assert score(ROWS, TEXTS)[0].tolist() == [2.0, 2.0]

    async def notebook():  # a loop runs already
        return score(ROWS, TEXTS)[0].tolist()

    assert asyncio.run(notebook()) == [2.0, 2.0]
    assert len({id(loop) for loop in loops}) == 1  # so a client of the first call works in the second

    async def broken(completions):
        raise ConnectionError("the judge is down")

    monkeypatch.setitem(common.REWARDS, "broken", broken)
    with pytest.raises(SystemExit, match=r"reward broken: raised ConnectionError\('the judge is down'\) in .*, line"):
        scores_of("broken")


def test_a_reward_runs_in_the_main_thread_and_in_full_precision(tmp_path, monkeypatch):
    """math-verify stops by a signal, which only the main thread gets; autocast would change a reward model's scores."""
    seen = []

    def reward(prompts, completions):
        seen.append((threading.current_thread(), (torch.ones(1, 1) @ torch.ones(1, 1)).dtype))
        return [1.0] * len(prompts)

    monkeypatch.setitem(common.REWARDS, "reward", reward)
    small = {"num_steps": 1, "prompts_per_step": 2, "samples_per_prompt": 2, "eval_prompts": 2, "dtype": "bfloat16"}
    grpo.main(grpo.Args(reward=("reward",), output_dir=str(tmp_path / "run"), **small))
    assert seen == [(threading.main_thread(), torch.float32)] * 3


def test_completion_ids_are_the_kept_tokens(tmp_path, monkeypatch):
    """Of rollouts and of evaluations: the sampled tokens, the stop token last, without padding."""
    seen = []

    def judge(prompts, completions, completion_ids):
        tokenizer = common.load_model("models/arithmetic", torch.device("cpu"))[1]
        for text, ids in zip(completions, completion_ids):
            assert text == tokenizer.decode(ids, skip_special_tokens=True) and 0 < len(ids) <= 8
            assert 0 not in ids[:-1]
        seen.append(len(prompts))
        return [1.0] * len(prompts)

    monkeypatch.setitem(common.REWARDS, "judge", judge)
    small = {"num_steps": 1, "prompts_per_step": 4, "samples_per_prompt": 4, "eval_prompts": 3, "temperature": 3.0}
    grpo.main(grpo.Args(reward=("judge",), output_dir=str(tmp_path / "run"), **small))
    assert sum(seen) == 16 + 2 * 3


def test_trls_own_rewards_give_trls_own_scores(tmp_path):
    """The scores are those of TRL's tests/test_rewards.py."""
    pytest.importorskip("trl", reason="trl is in benchmarks/requirements.txt")

    def chat(*texts, **columns):
        rows = [{"prompt": [{"role": "user", "content": "q"}]} for _ in texts]
        for name, values in columns.items():
            rows = [row | {name: value} for row, value in zip(rows, values)]
        return rows, list(texts)

    good = "<think>This is my reasoning.</think>This is my answer."
    bad = "This<think>is my reasoning.</think>\nThis is my answer."
    assert scores_of("trl.rewards:think_format_reward", *chat(good, bad), [[1], [2]]) == [1.0, 0.0]
    texts = [r"\boxed{\frac{63}{400}}", r"\boxed{\frac{64}{400}}", "Answer is forty two."]
    solutions = [r"\frac{63}{400}", r"\frac{63}{400}", "Answer is forty two."]
    right, wrong, unread = scores_of("trl.rewards:accuracy_reward", *chat(*texts, solution=solutions), [[1]] * 3)
    assert (right, wrong) == (1.0, 0.0) and unread != unread
    soft = own(tmp_path, "import trl.rewards\nsoft = trl.rewards.get_soft_overlong_punishment(100, 20)\n", "soft")
    ids = [[1] * 50, [1] * 110, [1] * 90]
    assert scores_of(f"{soft}:soft", *chat("", "", ""), ids) == pytest.approx([0, -1, -0.5], abs=1e-4)


def test_math_verify_knows_equal_answers():
    pytest.importorskip("math_verify")
    pairs = [
        (r"\frac{63}{400}", r"so \boxed{\frac{63}{400}}", 1),
        ("1/2", "it is 0.5", 1),
        ("forty two", r"\boxed{43}", 0),
        ("(4, 3)", "(3, 4)", 0),
        (r"2\sqrt{3}", r"\boxed{2}", 0),  # not the part of it that can be read without its frame
        (r"2\sqrt{3}", r"\boxed{2\sqrt{3}}", 1),
        (r"$x^2+1$", r"\boxed{1+x^2}", 1),
        ("... #### 42", "so 42", 1),
        ("42", r"<think>maybe \boxed{42}", 0),
        ("42", r"<think>\boxed{42}</think>so 43", 0),
    ]
    rows = [{"prompt": "q", "answer": truth} for truth, _, _ in pairs]
    got = scores_of("math", rows, [said for _, said, _ in pairs], [[]] * len(pairs))
    assert got == [right for _, _, right in pairs]


def test_without_math_verify_its_reward_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(SystemExit, match=r"--reward math: needs `pip install math-verify`"):
        common.load_reward(("math",), (), ROWS)(ROWS, TEXTS)
