"""What a user can get wrong ends in one line that says what, where and how to mend it, before work is lost."""

import ast
import json

import common

import pytest
import torch
from test_runs import Killed, die_at
from test_scripts import REPO, SAMPLING, SCRIPTS
from transformers import BertConfig, BertLMHeadModel, MambaConfig, MambaForCausalLM

SMALL = {"num_steps": 2, "prompts_per_step": 2, "eval_prompts": 2}
SMALL_MODEL = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "eos_token_id": 0}


def message_of(script, tmp_path, **settings):
    """The one line in which a run ends, having trained nothing and left no model."""
    module, folder = SCRIPTS[script], tmp_path / "run"
    with pytest.raises(SystemExit) as caught:
        module.main(module.Args(**(SMALL | {"output_dir": str(folder)} | settings)))
    message = caught.value.code
    assert isinstance(message, str) and "\n" not in message and len(message) < 500
    left = {file.name for file in folder.iterdir()} if folder.exists() else set()
    assert left <= {"args.json", "metrics.jsonl", "samples.jsonl"}
    return message


@pytest.fixture
def no_model(monkeypatch):
    """Fails where a model is loaded: what follows has to be refused before."""
    monkeypatch.setattr(common, "load_model", lambda *args, **settings: pytest.fail("a model was loaded"))


BAD_FLAGS = [
    ("grpo", {"samples_per_prompt": 1}, "--samples-per-prompt: a completion is compared with others of its prompt"),
    ("grape", {"samples_per_prompt": 1}, "--samples-per-prompt: a completion is compared"),
    ("reinforce", {"samples_per_prompt": 1}, "--samples-per-prompt: a completion is compared"),
    ("trpo", {"samples_per_prompt": 1}, "--samples-per-prompt: a completion is compared"),
    *[(script, {"temperature": 0.0}, "--temperature: 0.0, but it must be more than 0") for script in SAMPLING],
    *[(script, {"learning_rate": -1e-4}, "--learning-rate: -0.0001, but") for script in SCRIPTS if script != "trpo"],
    ("sft", {"learning_rate": float("nan")}, "--learning-rate: nan, but it must be more than 0"),
    ("sft", {"max_new_tokens": 0}, "--max-new-tokens: 0, but it must be more than 0"),
    ("grpo", {"eval_every": 0}, "--eval-every: 0, but it must be more than 0"),
    ("ppo", {"num_minibatches": 0}, "--num-minibatches: 0, but it must be more than 0"),
    ("dpo", {"micro_batch_size": 3}, "--micro-batch-size: a pair is two sequences"),
    *[("dpo", {"label_smoothing": 0.1, "loss_type": kind}, "--label-smoothing") for kind in ("ipo", "hinge", "simpo")],
    ("dpo", {"label_smoothing": 0.5}, "--label-smoothing"),
    ("ppo", {"num_minibatches": 3}, "--prompts-per-step: 2 do not divide among 1 processes and 3 minibatches"),
    ("grpo", {"num_minibatches": 3}, "--prompts-per-step: 2 do not divide among 1 processes and 3 minibatches"),
    (
        "grpo",
        {"reward": ("nonsense",)},
        "--reward nonsense: none of exact_answer, math, format, length, file.py:function",
    ),
    ("grpo", {"reward_weights": (1.0, 2.0)}, "--reward-weights: 2 weights for 1 rewards"),
    ("grpo", {"data": "missing.jsonl"}, "missing.jsonl: [Errno 2] No such file or directory"),
    ("grpo", {"resume": "nowhere", "output_dir": ""}, "--resume nowhere: not the folder of a run of this script"),
    (
        "grape",
        {"rubric": ("missing.json",)},
        "--rubric missing.json; see the example in grape.py's docstring: [Errno 2]",
    ),
]


@pytest.mark.parametrize(("script", "flags", "message"), BAD_FLAGS)
def test_bad_flags_are_refused_before_a_model_is_loaded(script, flags, message, tmp_path, no_model):
    assert message in message_of(script, tmp_path, **flags)
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_none(tmp_path, tokenizer):
    assert "--model nowhere: not the folder or hub id of a causal" in message_of("sft", tmp_path, model="nowhere")
    (tmp_path / "empty").mkdir()
    assert "not the folder or hub id of a causal" in message_of("sft", tmp_path, model=str(tmp_path / "empty"))
    bert = BertLMHeadModel(BertConfig(**SMALL_MODEL, num_attention_heads=2, intermediate_size=64))
    mamba = MambaForCausalLM(MambaConfig(**SMALL_MODEL))
    for model, message in ((bert, "no causal language model"), (mamba, "no causal language model with a KV cache")):
        folder = tmp_path / model.config.model_type
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        assert message in message_of("sft", tmp_path, model=str(folder))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")  # which could hold anything: only safetensors are read
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in message_of("sft", tmp_path, model=str(folder))
    (folder / "model.safetensors").write_bytes(b"half a fi")
    assert "not the folder or hub id of a causal" in message_of("sft", tmp_path, model=str(folder))


def write(tmp_path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / "data.jsonl").write_text("".join(line + "\n" for line in lines))
    return str(tmp_path / "data.jsonl")


GOOD = {"prompt": "a", "completion": "b", "chosen": "b", "rejected": "c", "answer": "b"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_bad_rows_are_named_before_a_model_is_loaded(script, tmp_path, no_model):
    column = {"sft": "completion", "dpo": "rejected"}.get(script, "prompt")
    for rows, message in [
        ((), "has no rows"),
        ((GOOD, "nonsense"), "data.jsonl: Expecting value: line 2 column 1"),
        ((GOOD, {name: GOOD[name] for name in GOOD if name != column}), f'row 2: "{column}" is missing or empty'),
        ((GOOD, GOOD | {column: ""}), f'row 2: "{column}" is missing or empty'),
        ((GOOD, GOOD), "one prompt only"),
    ]:
        assert message in message_of(script, tmp_path, data=write(tmp_path, *rows))


def test_a_line_that_is_no_utf_8_is_named(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n" + '{"prompt": "é"}'.encode("latin-1"))
    assert "data.jsonl: 'utf-8' codec" in message_of("grpo", tmp_path, data=str(tmp_path / "data.jsonl"))


def test_messages_that_no_template_takes(tmp_path, chat_model):
    chat = {"prompt": [{"role": "user", "content": "hi"}], "answer": "1"}
    assert "the chat template refuses it: Cannot use chat template functions" in message_of(
        "grpo", tmp_path, data=write(tmp_path, chat, GOOD), eval_data=write(tmp_path, chat, GOOD)
    )
    for broken in ([{"role": "user"}], ["hi"], [{"role": "user", "content": None}]):
        data = write(tmp_path, GOOD, chat, chat | {"prompt": broken})
        message = message_of("grpo", tmp_path, model=chat_model, data=data, eval_data=data)
        assert "row 3: neither a text nor messages with role and content: [" in message


def test_a_template_that_refuses_a_prompt(tmp_path, chat_model):
    tokenizer = common.load_model(chat_model, torch.device("cpu"))[1]
    tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    tokenizer.save_pretrained(chat_model)
    message = message_of("grpo", tmp_path, model=chat_model, data=write(tmp_path, GOOD, GOOD | {"prompt": "c"}))
    assert "the chat template refuses it" in message and "no system turns" in message


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_prompt_longer_than_the_context(script, tmp_path, chat_model):
    """GPT-2 here has 64 positions, and 8 of them are kept for the completion."""
    data, own = write(tmp_path, GOOD, GOOD | {"prompt": "add " * 20}), {"data": str(tmp_path / "data.jsonl")}
    message = message_of(script, tmp_path, model=chat_model, eval_data=data, **own)
    assert "prompt 'add add add" in message and "room for 1 to 56 and --max-new-tokens" in message


def reward(tmp_path, body):
    (tmp_path / "own.py").write_text(f"def judge(prompts, completions, **columns):\n    {body}\n")
    return {"reward": (f"{tmp_path / 'own.py'}:judge",)}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [0.5", "file.py:function, module:function: '[' was never closed"),
        ("return 1 / 0", "reward judge: raised ZeroDivisionError('division by zero') in"),
        ("return [1.0]", "reward judge: returned 1 values for 2 completions"),
        ("return None", "reward judge: raised TypeError"),
        ("return [None] * len(prompts)", "the first one scored no held-out completion"),
        ("return [float('nan')] * len(prompts)", "reward judge: returned nan for the completion"),
        ("return [float('inf')] * len(prompts)", "reward judge: returned inf for the completion"),
        ("return ['good'] * len(prompts)", "reward judge: returned 'good' for the completion"),
    ],
)
@pytest.mark.parametrize("script", ["sft", "grpo"])
def test_rewards_that_return_nonsense(script, body, message, tmp_path):
    assert message in message_of(script, tmp_path, **reward(tmp_path, body))


def test_a_reward_file_without_the_function(tmp_path, no_model):
    own = reward(tmp_path, "return [0.0]")["reward"][0]
    assert "module 'own' has no attribute 'other'" in message_of(
        "grpo", tmp_path, reward=(own.replace(":judge", ":other"),)
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_gradients_that_are_not_finite_stop_the_run_before_the_weights(script, tmp_path, monkeypatch):
    """The second step's loss is infinite: the run ends with the weights of the first."""
    module, token_logprobs, done = SCRIPTS[script], SCRIPTS[script].token_logprobs, []

    def infinite(model, *batch, **settings):
        logprobs = token_logprobs(model, *batch, **settings)
        return logprobs * torch.inf if done and torch.is_grad_enabled() else logprobs

    def remember(run, step):
        model, _ = run.parts["model"]
        done.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        done.append(model)

    monkeypatch.setattr(module, "token_logprobs", infinite)
    monkeypatch.setattr(common.Run, "save", remember)
    with pytest.raises(SystemExit, match="step 2: the gradient is not finite; try a lower --learning-rate") as caught:
        module.main(module.Args(**SMALL, output_dir=str(tmp_path / "run")))
    assert "\n" not in str(caught.value)
    weights, model = done
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_folder_that_holds_a_run_is_left_alone(tmp_path, no_model):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("precious\n")
    with pytest.raises(SystemExit, match=r"already holds a run; give another one, or --resume"):
        SCRIPTS["sft"].main(SCRIPTS["sft"].Args(output_dir=str(folder)))
    assert [(file.name, file.read_text()) for file in folder.iterdir()] == [("metrics.jsonl", "precious\n")]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    message = message_of("sft", tmp_path, output_dir=str(tmp_path / "file" / "run"))
    assert message.startswith("--output-dir ") and "cannot be written" in message


def test_resuming_what_cannot_be_resumed(tmp_path, monkeypatch):
    sft, folder = SCRIPTS["sft"], str(tmp_path / "run")
    monkeypatch.setattr(common.Run, "check_finite", die_at(1))
    with pytest.raises(Killed):
        sft.main(sft.Args(**SMALL, output_dir=folder))
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="goes on with that run's own settings; leave out --num-steps --learning-rate"):
        sft.main(sft.Args(resume=folder, learning_rate=1.0, num_steps=7))
    with pytest.raises(SystemExit, match="not the folder of a run of this script"):
        SCRIPTS["dpo"].main(SCRIPTS["dpo"].Args(resume=folder))
    sft.main(sft.Args(**SMALL, output_dir=str(tmp_path / "done")))
    monkeypatch.setattr(common.Run, "check_finite", die_at(2))
    with pytest.raises(Killed):
        sft.main(sft.Args(**SMALL, save_every=1, output_dir=str(tmp_path / "moved")))
    monkeypatch.undo()
    state, args = tmp_path / "moved" / "checkpoint" / "state.pt", tmp_path / "moved" / "args.json"
    for file, message in ((state, "state.pt cannot be read"), (args, "not the folder of a run of this script")):
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(SystemExit, match=message):
            sft.main(sft.Args(resume=str(tmp_path / "moved")))
        file.write_bytes(whole)
    sft.main(sft.Args(resume=str(tmp_path / "moved"), micro_batch_size=1, device="cpu"))  # these two may be others
    one, other = (common.load_model(str(tmp_path / run / "model"), torch.device("cpu"))[0] for run in ("done", "moved"))
    torch.testing.assert_close(one.state_dict(), other.state_dict())
    with pytest.raises(SystemExit, match="has finished; its model is in"):
        sft.main(sft.Args(resume=str(tmp_path / "done")))


@pytest.mark.parametrize("file", ["common.py", "builtin_rewards.py", *(f"{script}.py" for script in SCRIPTS)])
def test_nothing_runs_what_a_model_or_a_checkpoint_says(file):
    """No eval, exec or pickle; torch.load takes weights only; code in a checkpoint is never trusted."""
    calls = [node for node in ast.walk(ast.parse((REPO / file).read_text())) if isinstance(node, ast.Call)]
    names = {ast.unparse(call.func) for call in calls}
    assert not names & {"eval", "exec", "compile", "__import__", "os.system", "pickle.load", "pickle.loads"}
    for call in calls:
        settings = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert "shell" not in settings
        if ast.unparse(call.func) == "torch.load":
            assert settings["weights_only"] == "True"
        if ast.unparse(call.func).endswith(".from_pretrained"):
            assert settings["trust_remote_code"] == "False"
        if ast.unparse(call.func) == "AutoModelForCausalLM.from_pretrained":
            assert settings["use_safetensors"] == "True"
