"""LoRA and gradient checkpointing: what they change, and what they must not."""

import json

import common
import grape
import grpo
import ppo
import reinforce
import sft
import trpo

import peft
import pytest
import torch
from conftest import sample_in_float32
from safetensors.torch import load_file
from test_scripts import FEW, SCRIPTS, read_jsonl
from transformers import AutoModelForCausalLM

CPU = torch.device("cpu")
SMALL = {"prompts_per_step": 4, "eval_prompts": 4, "eval_every": 2, "num_steps": 2, "save_every": 2, "data": FEW}


def logits(model, tokenizer):
    with torch.no_grad():
        return model(**tokenizer("What is 37 + 48? 85", return_tensors="pt")).logits


def logits_by_trunk(model, tokenizer):
    with torch.no_grad():
        return common.logits_of(model, model.trunk(**tokenizer("What is 37 + 48? 85", return_tensors="pt"))[0])


def train(module, folder, **settings):
    """A run's folder; the learning rate is high, so that two steps change the model."""
    high = {"prompts_per_step": 16} if module is trpo else {"learning_rate": 1e-2}
    module.main(module.Args(**SMALL | high | settings, output_dir=str(folder)))
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_lora_trains_adapters_only_and_saves_them_as_peft_does(script, tmp_path, monkeypatch):
    """Peft itself loads them from the folder, as docs/scaling.md says, and gets the trained model's logits."""
    models = []
    load_model = common.load_model
    monkeypatch.setattr(common, "load_model", lambda *a, **k: models.append(load_model(*a, **k)) or models[-1])
    folder = train(SCRIPTS[script], tmp_path / "run", lora_rank=4)
    (trained, tokenizer), base = models[0], load_model("models/arithmetic", CPU)[0]
    own = dict(base.named_parameters())
    for name, parameter in trained.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, own[name.replace(".base_layer", "")]) and parameter.grad is None
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "model")
    assert torch.equal(logits(loaded, tokenizer), logits(trained, tokenizer))
    assert not torch.equal(logits(loaded, tokenizer), logits(base, tokenizer))
    assert all("lora_" in name for name in load_file(folder / "model" / "adapter_model.safetensors"))
    state = torch.load(folder / "checkpoint" / "state.pt", weights_only=True)["parts"]
    assert all("lora_" in name for name in state["model"]["weights"])
    copies = {"ppo": 2, "trpo": 2}.get(script, 1)  # the value model, the policy before the step; never a reference
    assert len(models) == copies


@pytest.mark.parametrize("module", [reinforce, trpo, ppo, grpo, grape], ids=lambda module: module.__name__)
def test_the_reference_is_the_start_though_the_adapters_were_trained(module, tmp_path, monkeypatch):
    """The log-probs that a reference gives in the last step are those of the base model, to the last bit."""
    references, seen, load_reference, token_logprobs = [], [], common.load_reference, module.token_logprobs

    def spy(model, *batch, **settings):
        result = token_logprobs(model, *batch, **settings)
        if model is references[0]:
            seen.append((batch, settings, result))
        return result

    monkeypatch.setattr(module, "token_logprobs", spy)
    monkeypatch.setattr(common, "load_reference", lambda *x: references.append(load_reference(*x)) or references[-1])
    folder = train(module, tmp_path / "run", lora_rank=4, beta=0.1, reward=("test_runs:draw",))
    assert read_jsonl(folder / "metrics.jsonl")[-1]["kl/ref"] != 0  # they have moved by then
    base = common.load_model("models/arithmetic", CPU)[0]
    batch, settings, result = seen[-1]
    with torch.no_grad():
        assert torch.equal(token_logprobs(base, *batch, **settings), result)
    assert len(seen) >= 2


def test_a_reference_leaves_the_adapters_as_they_are_even_after_an_error():
    args = sft.Args(lora_rank=2)
    model, tokenizer = common.load_model("models/arithmetic", CPU, args)
    for name, parameter in model.named_parameters():
        parameter.data += 0.1 * ("lora_B" in name)
    adapted, reference = logits(model, tokenizer), common.load_reference(args, model)
    assert not torch.equal(logits_by_trunk(reference, tokenizer), adapted)
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        reference.trunk()
    assert torch.equal(logits_by_trunk(model, tokenizer), adapted)
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


def test_frozen_weights_are_bfloat16_where_autocast_makes_them_so_and_nothing_changes_by_it(tmp_path):
    """Half the memory for the same logits, to the last bit; embeddings, norms and adapters stay float32."""
    flags = sft.Args(device="cpu", dtype="bfloat16", lora_rank=2)
    half, tokenizer = common.load_model("models/arithmetic", CPU, flags)
    full, _ = common.load_model("models/arithmetic", CPU, sft.Args(device="cpu", lora_rank=2))
    others = dict(full.named_parameters(remove_duplicate=False))  # the head is tied to the embedding
    assert {parameter.dtype for parameter in others.values()} == {torch.float32}
    for name, parameter in half.named_parameters(remove_duplicate=False):
        frozen = "base_layer" in name or "lm_head" in name  # what autocast would cast anew in each pass
        assert parameter.dtype == (torch.bfloat16 if frozen else torch.float32), name
        if "lora_" in name:
            parameter.data = others[name].data = torch.randn_like(parameter) / 4
    with common.autocast(flags):
        assert torch.equal(logits(half, tokenizer), logits(full, tokenizer))
        references = [logits_by_trunk(common.load_reference(flags, model), tokenizer) for model in (half, full)]
    assert torch.equal(*references) and not torch.equal(references[0], logits(full, tokenizer))
    folder = train(grpo, tmp_path / "run", lora_rank=2, dtype="bfloat16", gradient_checkpointing=True)
    assert {p.dtype for p in load_file(folder / "model" / "adapter_model.safetensors").values()} == {torch.float32}


def test_a_folder_of_adapters_is_a_model_of_which_the_next_run_goes_on(tmp_path, capsys, monkeypatch):
    """Merged as peft merges them; adapters that are trained on top of it are saved merged, as peft knows only one."""
    folder = train(sft, tmp_path / "run", lora_rank=4)
    base, tokenizer = common.load_model("models/arithmetic", CPU)
    adapted = peft.PeftModel.from_pretrained(base, folder / "model")
    expected = logits(adapted, tokenizer)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(whole, tokenizer), expected, rtol=1e-4, atol=1e-4)
    merged, _ = common.load_model(str(folder / "model"), CPU)
    torch.testing.assert_close(logits(merged, tokenizer), expected, rtol=1e-4, atol=1e-4)
    assert all(parameter.requires_grad for parameter in merged.parameters())
    assert capsys.readouterr().out.endswith("(adapters: --model or peft.AutoPeftModelForCausalLM loads them)\n")
    next_folder, trained, finish = tmp_path / "next", [], common.Run.finish
    monkeypatch.setattr(common.Run, "finish", lambda run, *x: trained.append(logits(*x)) or finish(run, *x))
    train(grpo, next_folder, model=str(folder / "model"), lora_rank=2, reward=("test_runs:draw",), dtype="bfloat16")
    assert capsys.readouterr().out.endswith(f"model in {next_folder / 'model'}\n")
    last = AutoModelForCausalLM.from_pretrained(next_folder / "model", dtype=torch.float32)
    torch.testing.assert_close(logits(last, tokenizer), trained[0], rtol=1e-4, atol=1e-4)
    assert (logits(last, tokenizer) - expected).abs().max() > 0.01


@pytest.mark.parametrize("module", [sft, grpo], ids=lambda module: module.__name__)
def test_a_resumed_run_with_adapters_is_the_uninterrupted_one(module, tmp_path, monkeypatch):
    longer, take_batch = {"num_steps": 4, "lora_rank": 2}, common.take_batch
    whole = train(module, tmp_path / "whole", **longer)
    torch.rand(1)  # a run's first adapters must not depend on what was drawn before it
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):  # in its fourth step
        patch.setattr(common, "take_batch", lambda rows, step, args: take_batch(rows, step // (step < 4), args))
        train(module, tmp_path / "killed", **longer)
    module.main(module.Args(resume=str(tmp_path / "killed")))
    file = "adapter_model.safetensors"
    assert (tmp_path / "killed" / "model" / file).read_bytes() == (whole / "model" / file).read_bytes()


@pytest.mark.parametrize(("script", "lora_rank"), [*((script, 0) for script in SCRIPTS), ("grpo", 2), ("ppo", 2)])
@pytest.mark.usefixtures("double")
def test_gradient_checkpointing_changes_no_figure(script, lora_rank, chat_model, chat_data, tmp_path, monkeypatch):
    """The rollouts are the same tokens, and the weights differ by rounding, as no prompt is shared in the update.

    On a GPT-2, which computes all in the float64 of its weights; Llama's norms are float32.
    """
    runs = []
    (tmp_path / "mine.py").write_text(
        "import zlib\n"
        "def judge(prompts, completions, **columns):\n"
        "    return [zlib.crc32(turns[0]['content'].encode()) % 5 / 4 for turns in completions]\n"
    )
    own = {"model": chat_model, "data": chat_data, "reward": (f"{tmp_path}/mine.py:judge",), "max_new_tokens": 4}
    if script == "grape":
        item = {"name": "judge", "weight": 1, "verifier": "mine.py:judge"}
        (tmp_path / "rubric.json").write_text(json.dumps({"category": "any", "items": [item]}))
        own["rubric"] = (str(tmp_path / "rubric.json"),)
    sample_in_float32(SCRIPTS[script], monkeypatch)
    for checkpointing in (False, True):
        settings = {"gradient_checkpointing": checkpointing, "lora_rank": lora_rank, "learning_rate": 1e-4}
        if script == "trpo":
            del settings["learning_rate"]
        folder = train(SCRIPTS[script], tmp_path / str(checkpointing), **own, **settings)
        (file,) = (folder / "model").glob("*.safetensors")
        runs.append((load_file(file), read_jsonl(folder / "samples.jsonl"), read_jsonl(folder / "metrics.jsonl")))
    (weights, samples, metrics), (other_weights, other_samples, other_metrics) = runs
    assert samples == other_samples
    assert all(row["grad_norm"] > 0.01 for row in metrics[1:])
    for name in weights:
        torch.testing.assert_close(weights[name], other_weights[name], rtol=0, atol=1e-9)
    metrics[1].pop("reward/accuracy", None)  # dpo.py's; its first margins are 0 but for rounding
    for row, other in zip(metrics, other_metrics, strict=True):
        figures = {name: value for name, value in row.items() if not name.startswith(("time/", "tokens_per"))}
        assert {name: other[name] for name in figures} == pytest.approx(figures, rel=1e-6, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_computes_layers_twice_in_updates_and_never_in_train_mode(checkpointing):
    """In which dropout is on and a KV cache is dropped without a word (huggingface/transformers#36051)."""
    model, tokenizer = common.load_model("models/arithmetic", CPU, sft.Args(gradient_checkpointing=checkpointing))
    modes = []
    for layer in model.base_model.layers:  # not a hook, of which the second time round makes no use
        forward = layer.mlp.forward
        layer.mlp.forward = lambda x, m=layer.mlp, forward=forward: modes.append(m.training) or forward(x)
    prompt_ids, prompt_mask = common.pad([tokenizer("What is 3 + 4?").input_ids, [5, 6]], "left", CPU)
    completions = grpo.rollout(model, prompt_ids, prompt_mask, max_new_tokens=5)[:2]
    assert modes == [False] * len(modes) and len(modes) <= 5 * len(model.base_model.layers)  # once a token
    modes.clear()
    grpo.token_logprobs(model, prompt_ids, prompt_mask, *completions).sum().backward()
    assert modes == [False] * (1 + checkpointing) * len(model.base_model.layers)
