import json
import os
from functools import partial
from types import MethodType

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # each worker of pytest-xdist has a core, and what it starts as well

import common

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}<|endoftext|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def random_model(kind: str, vocab_size: int = 300, stop_ids=(0,), **settings):
    """A small model with random weights, sharp enough that its probabilities differ, as load_model leaves one."""
    torch.manual_seed(0)
    sizes = {"vocab_size": vocab_size, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64}
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    sizes |= {"num_attention_heads": 2} if kind == "gpt2" else attention
    ids = {"bos_token_id": None, "eos_token_id": list(stop_ids), "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | ids | settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    model.generation_config.eos_token_id = list(stop_ids)
    model.trunk, model.shares_prompts = MethodType(lambda model, **x: model.base_model(**x), model), True
    return model


@pytest.fixture(autouse=True)
def float32():
    """Each test begins with torch's own default, whatever the one before it left."""
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def double(monkeypatch):
    """The scripts' own arithmetic in float64: where they ask for float32, they get float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    load_model, default = common.load_model, torch.get_default_dtype()

    def load_double(*args, **kwargs):
        model, tokenizer = load_model(*args, **kwargs)
        return model.double(), tokenizer

    monkeypatch.setattr(common, "load_model", load_double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


def sample_in_float32(module, monkeypatch):
    """Within `double`: the script samples in float32, as it stores what it samples so."""

    def in_float32(rollout, *args, **settings):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "float", lambda tensor: tensor.to(torch.float32))
            ids, mask, logprobs, truncated = rollout(*args, **settings)
        return ids, mask.double(), logprobs.double(), truncated

    monkeypatch.setattr(module, "rollout", partial(in_float32, module.rollout))


@pytest.fixture(params=["llama", "gpt2", "qwen2"])
def model(request):
    return random_model(request.param, stop_ids=(0, 22, 87, 110, 120, 293))


@pytest.fixture
def tokenizer():
    return common.load_model("models/arithmetic", torch.device("cpu"))[1]


@pytest.fixture
def chat_model(tmp_path, tokenizer):
    """A folder with a random GPT-2: a padded vocabulary, pad equal to EOS, a tokenizer with a chat template."""
    tokenizer.chat_template = CHAT_TEMPLATE
    folder = tmp_path / "chat_model"
    random_model("gpt2", stop_ids=(0, *range(10, 60))).save_pretrained(folder)  # some completions end, some do not
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def chat_data(tmp_path):
    """Rows in TRL's conversational format, prompts of different lengths."""
    rows = [
        {
            "prompt": [{"role": "user", "content": "add " * (i % 4) + f"{i} to {i}"}],
            "completion": [{"role": "assistant", "content": f"#### {2 * i}"}],
            "chosen": [{"role": "assistant", "content": f"#### {2 * i}"}],
            "rejected": [{"role": "assistant", "content": f"#### {3 * i + 1}"}],
            "answer": str(2 * i),
        }
        for i in range(12)
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
