"""What would go wrong silently is refused before work is lost; it says what is wrong, and where."""

import ast
import json

import common

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file, save_file
from test_data import CPU, END, SIZES, folder_of, turn, write
from test_runs import Killed, die_at
from test_scripts import FEW, REPO, SAMPLING, SCRIPTS
from transformers import MambaConfig, MambaForCausalLM, RecurrentGemmaConfig, RecurrentGemmaForCausalLM

SMALL = {"num_steps": 2, "prompts_per_step": 2, "eval_prompts": 2, "data": FEW}


def message_of(script, tmp_path, **settings):
    """The words in which a run ends, having trained nothing and left no model."""
    module, folder = SCRIPTS[script], tmp_path / "run"
    with pytest.raises(SystemExit) as caught:
        module.main(module.Args(**(SMALL | {"output_dir": str(folder)} | settings)))
    message = caught.value.code
    assert isinstance(message, str) and len(message) < 500
    assert not (folder / "model").exists() and not (folder / "checkpoint").exists()
    return message


@pytest.fixture
def no_model(monkeypatch):
    """Fails where a model is loaded: what follows has to be refused before."""
    monkeypatch.setattr(common, "load_model", lambda *args, **settings: pytest.fail("a model was loaded"))


POSITIVE = ("num_minibatches", "num_epochs", "eval_prompts", "max_new_tokens", "eval_every", "micro_batch_size")
BAD_FLAGS = [
    *[(script, {"samples_per_prompt": 1}) for script in ("reinforce", "trpo", "grpo", "grape")],
    *[("ppo", {name: 0}) for name in (*POSITIVE, "samples_per_prompt", "prompts_per_step", "max_grad_norm")],
    *[(script, {"temperature": 0.0}) for script in SAMPLING],
    *[(script, {"learning_rate": rate}) for script in SCRIPTS if script != "trpo" for rate in (-1e-4, float("nan"))],
    *[("dpo", {"label_smoothing": 0.1, "loss_type": kind}) for kind in ("ipo", "hinge", "simpo", "sppo")],
    *[("dpo", {"label_smoothing": value}) for value in (0.5, -0.1)],
    *[(script, {"prompts_per_step": 2, "num_minibatches": 3}) for script in ("ppo", "grpo", "rejection_sampling")],
    ("grpo", {"reward_weights": (1.0, 2.0)}),
    ("grpo", {"reward": ()}),
    ("grpo", {"reward": ("exact_answer", "exact_answer")}),
    ("grpo", {"reward": ("statistics:mean",)}),
]


@pytest.mark.parametrize(("script", "flags"), BAD_FLAGS)
def test_bad_flags_are_refused_before_a_model_is_loaded(script, flags, tmp_path, no_model):
    assert f"--{next(iter(flags)).replace('_', '-')}" in message_of(script, tmp_path, **flags)
    assert not (tmp_path / "run").exists()


GOOD = {"prompt": "a", "completion": "b", "chosen": "b", "rejected": "c", "answer": "b"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_bad_rows_are_named_before_a_model_is_loaded(script, tmp_path, no_model):
    column = {"sft": "completion", "dpo": "rejected"}.get(script, "prompt")
    for rows, message in [
        ((), "too few rows"),
        ((GOOD, GOOD), "too few rows"),  # one prompt, which is held out
        ((GOOD, {name: GOOD[name] for name in GOOD if name != column}), f'd.jsonl, row 2: no "{column}": it has '),
        ((GOOD, GOOD | {column: ""}), f'd.jsonl, row 2: no "{column}": it has '),
        ((GOOD, GOOD | {"prompt": [turn("user", "")]}), "d.jsonl, row 2: a message without content"),
        ((GOOD, GOOD | {"prompt": [turn("assistant", None)]}), "d.jsonl, row 2: a message without content"),
    ]:
        assert message in message_of(script, tmp_path, data=write(tmp_path / "d.jsonl", *rows))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_folder_that_holds_a_run_is_left_alone(script, tmp_path, no_model):
    for kept in ("metrics.jsonl", "model/config.json"):
        (file := tmp_path / kept / kept).parent.mkdir(parents=True)
        (own := tmp_path / kept / "args.json").write_text("its own\n")
        file.write_text("precious\n")
        with pytest.raises(SystemExit, match="holds a run; give another one, or --resume"):
            SCRIPTS[script].main(SCRIPTS[script].Args(output_dir=str(tmp_path / kept)))
        assert (file.read_text(), own.read_text()) == ("precious\n", "its own\n")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_prompt_longer_than_the_context(script, tmp_path, chat_model):
    """GPT-2 here has 64 positions, and 8 of them are kept for the completion."""
    data = write(tmp_path / "d.jsonl", GOOD, GOOD | {"prompt": "add " * 20})
    message = message_of(script, tmp_path, model=chat_model, data=data, eval_data=data)
    assert "prompt 'add add add" in message and "room for 1 to 56 and --max-new-tokens" in message


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    changed = {change(name): tensor for name, tensor in weights.items() if change(name)}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})


def configure(folder, file, **settings):
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | settings))


MODELS = {  # the kind of a model, and what is done to its folder; parts of its refusal
    "model.layers.1.mlp.down_proj.weight": (
        "llama",
        lambda m: rewrite(m, lambda name: name * ("1.mlp.down" not in name)),
    ),
    "h.0.attn.c_attn.bias": ("gpt2", lambda m: rewrite(m, lambda name: name * ("0.attn.c_attn.bias" not in name))),
    "start at random: .*model.layers": ("llama", lambda m: rewrite(m, lambda name: f"_orig_mod.{name}")),
    "quantized": ("llama", lambda m: configure(m, "config.json", quantization_config={"quant_method": "gguf"})),
}


@pytest.mark.parametrize("message", MODELS)
def test_a_model_that_is_not_what_it_seems(message, tmp_path, tokenizer):
    kind, spoil = MODELS[message]
    folder = folder_of(tmp_path, tokenizer, random_model(kind))
    spoil(folder)
    with pytest.raises(SystemExit, match=message):
        common.load_model(str(folder), CPU)


def test_a_model_that_could_not_sample(tmp_path, tokenizer, monkeypatch):
    def refused(message, model=None):
        folder = folder_of(tmp_path, tokenizer, model)
        if not tokenizer.eos_token:
            configure(folder, "config.json", eos_token_id=None)
            configure(folder, "generation_config.json", eos_token_id=None)
        with pytest.raises(SystemExit, match=message):
            common.load_model(str(folder), CPU)

    refused("its KV cache, or", MambaForCausalLM(MambaConfig(**SIZES)))
    own = {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 8, "head_dim": 8}
    refused("its KV cache, or", RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**SIZES | own)))  # it raises
    tokenizer.eos_token = None
    refused("no stop token")
    tokenizer.eos_token, tokenizer.chat_template = END, "{% for m in messages %}<turn>{{ m.content }}{% endfor %}"
    tokenizer.add_tokens([f"<x{i}>" for i in range(60)] + ["<turn>"], special_tokens=True)
    refused("<turn>: not in the embedding")
    logits_of = common.logits_of
    monkeypatch.setattr(common, "logits_of", lambda model, hidden: 2 * logits_of(model, hidden))
    with pytest.raises(SystemExit, match=r"common\.logits_of"):
        common.load_model("models/arithmetic", CPU)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("[1.0]", "reward judge: returned 1 values for 2 completions"),
        ("[None] * len(completions)", "none scored a held-out completion"),
        ("[float('nan')] * len(completions)", "reward judge: returned nan"),
        ("[float('-inf')] * len(completions)", "reward judge: returned -inf"),
    ],
)
@pytest.mark.parametrize("script", ["rejection_sampling", "grpo"])
def test_rewards_that_return_nonsense(script, body, message, tmp_path):
    (tmp_path / "own.py").write_text(f"def judge(completions, **columns):\n    return {body}\n")
    assert message in message_of(script, tmp_path, reward=(f"{tmp_path / 'own.py'}:judge",))


def test_a_reward_that_is_not_there(tmp_path, no_model):
    (tmp_path / "own.py").write_text("def judge(completions, **columns):\n    return [0.0 for _ in completions]\n")
    for name, nearest in (("exct_answer", "exact_answer"), (f"{tmp_path / 'own.py'}:jude", "judge")):
        message = message_of("grpo", tmp_path, reward=(name,))
        assert message == f"{name}: not found; the nearest is {nearest}; give exact_answer or file.py:function"
    with pytest.raises(FileNotFoundError, match=r"none\.py"):
        message_of("grpo", tmp_path, reward=("none.py:judge",))


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
    with pytest.raises((RuntimeError, SystemExit), match=r"non-finite|step 2: the gradient is not finite"):
        module.main(module.Args(**SMALL, output_dir=str(tmp_path / "run")))
    weights, model = done
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_what_a_resumed_run_may_change(tmp_path, monkeypatch):
    sft, folder = SCRIPTS["sft"], str(tmp_path / "run")
    monkeypatch.setattr(common, "decay", die_at(2))
    with pytest.raises(Killed):
        sft.main(sft.Args(**SMALL, save_every=1, output_dir=folder))
    monkeypatch.undo()
    with pytest.raises(SystemExit, match=r"goes on with that run's own settings; leave out .*learning_rate.*seed"):
        sft.main(sft.Args(resume=folder, learning_rate=1.0, seed=7))
    sft.main(sft.Args(resume=folder, micro_batch_size=1, device="cpu", num_steps=3))
    assert json.loads((tmp_path / "run" / "args.json").read_text())["num_steps"] == 3
    sft.main(sft.Args(**SMALL, save_every=0, output_dir=str(tmp_path / "done")))
    with pytest.raises(SystemExit, match="holds a run"):  # there is no checkpoint to go on from
        sft.main(sft.Args(resume=str(tmp_path / "done"), num_steps=3))


@pytest.mark.parametrize("file", ["common.py", *(f"{script}.py" for script in SCRIPTS)])
def test_nothing_runs_what_a_model_or_a_checkpoint_says(file):
    """No eval, exec or pickle; torch.load takes weights only; code in a checkpoint is never trusted."""
    text = (REPO / file).read_text()
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    names = {ast.unparse(call.func) for call in calls}
    assert not names & {"eval", "exec", "compile", "__import__", "os.system", "pickle.load", "pickle.loads"}
    assert "trust_remote_code" not in text and "shell=" not in text
    assert all("weights_only=True" in ast.unparse(call) for call in calls if ast.unparse(call.func) == "torch.load")
