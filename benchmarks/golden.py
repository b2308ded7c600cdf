"""TRL's own losses and advantages on fixed numbers, stored for tests/test_golden.py, which compares ours with them.

python benchmarks/golden.py      with trl 1.16.0 (benchmarks/requirements.txt): all but PPO
python benchmarks/golden.py      with trl 1.12.0, the last to have a PPO trainer: PPO alone

It fills in tests/golden.json: inputs, what TRL made of them, and TRL's version. Nothing of ours is imported here. TRL's
losses are methods of its trainers, so real trainers are built on models/arithmetic, and what they would take from a
model's forward pass is replaced by the fixed numbers. PPO's are statements in the middle of its training loop: those
lines are cut out of TRL's source and run as they are.
"""

import inspect
import json
import re
import sys
import tempfile
import textwrap
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import datasets
import torch
import transformers
import trl

REPO = Path(__file__).parent.parent
RESULTS = REPO / "tests" / "golden.json"
MODEL = str(REPO / "models" / "arithmetic")
LENGTHS = [5, 2, 3, 1, 4, 5]


def rounded(tensor):
    return json.loads(json.dumps(tensor.tolist()), parse_float=lambda text: round(float(text), 7))


def numbers(*shape, scale=1.0, shift=0.0, seed=0):
    """Fixed numbers with 3 decimals, so that they are the same when read back."""
    generator = torch.Generator().manual_seed(seed)
    return ((torch.randn(*shape, generator=generator) * scale + shift) * 1000).round() / 1000


def settings(**more):
    """What every trainer needs that is none of the algorithm's business."""
    folder = tempfile.mkdtemp()
    return {"output_dir": folder, "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, **more}


def grpo_losses():
    """Loss and its gradient by the log-probs [6, 5], for each loss type with its paper's settings."""
    B, T = len(LENGTHS), max(LENGTHS)
    inputs = {
        "logprobs": -numbers(B, T, seed=1).abs(),
        "old_logprobs": -numbers(B, T, seed=2).abs(),
        "ref_logprobs": -numbers(B, T, seed=3).abs(),
        "advantages": numbers(B, seed=4),
        "mask": (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).float(),
    }
    variants = {
        "grpo": {"loss_type": "grpo", "epsilon": 0.2, "epsilon_high": 0.2, "beta": 0.04},
        "grpo with TRL's KL": {"loss_type": "grpo", "epsilon": 0.2, "epsilon_high": 0.2, "beta": 0.04},
        "dapo": {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28, "beta": 0.0},
        "dapo with a KL": {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28, "beta": 0.3},
        "dr_grpo": {"loss_type": "dr_grpo", "epsilon": 0.2, "epsilon_high": 0.2, "beta": 0.0},
        "gspo": {"loss_type": "grpo", "epsilon": 3e-4, "epsilon_high": 4e-4, "beta": 0.0},
        "cispo": {"loss_type": "cispo", "epsilon_high": 5.0, "beta": 0.0},
    }
    outputs = {}
    for name, variant in variants.items():
        level = "sequence" if name == "gspo" else "token"
        args = trl.GRPOConfig(
            **settings(per_device_train_batch_size=6, num_generations=3, max_completion_length=8),
            importance_sampling_level=level,
            use_bias_correction_kl=name == "grpo with TRL's KL",  # its default: k3 times the ratio
            **variant,
        )
        rows = datasets.Dataset.from_list([{"prompt": "What is 1 + 1?"}] * 6)
        trainer = trl.GRPOTrainer(MODEL, lambda completions, **k: [0.0] * len(completions), args, rows)
        trainer.model.eval()
        logprobs = inputs["logprobs"].clone().requires_grad_()
        trainer._get_per_token_logps_and_entropies = lambda *a, **k: (logprobs, torch.zeros_like(logprobs), None)  # noqa: B023
        batch = {
            "prompt_ids": torch.zeros(B, 1, dtype=torch.long),
            "prompt_mask": torch.ones(B, 1),
            "completion_ids": torch.zeros(B, T, dtype=torch.long),
            "completion_mask": inputs["mask"],
            "advantages": inputs["advantages"],
            "old_per_token_logps": inputs["old_logprobs"],
            "ref_per_token_logps": inputs["ref_logprobs"],
            "num_items_in_batch": inputs["mask"].sum(),
        }
        loss = trainer._compute_loss(trainer.model, batch)
        loss.backward()
        outputs[name] = {**variant, "loss": loss.item(), "gradient": rounded(logprobs.grad)}
    return {"inputs": {name: rounded(value) for name, value in inputs.items()}, "outputs": outputs}


REWARDS = [1.0, 0.0, 0.0, 0.5, 0.2, 0.2, 0.2, 0.2, 0.7, None, 0.1, 0.4, None, 0.3, None, None]


def advantages_of(trainer_class, config_class, **variant):
    """TRL's advantages of 16 completions, 4 of each prompt, whose rewards are REWARDS; and what it knew of them."""
    args = config_class(
        **settings(per_device_train_batch_size=16, num_generations=4, max_completion_length=5), **variant
    )
    rows = datasets.Dataset.from_list([{"prompt": f"What is {i} + 8?"} for i in range(4)])
    trainer = trainer_class(MODEL, lambda completions, **k: REWARDS, args, rows)
    trainer.model.train()
    known = {}

    def fixed(model, ids, mask, logits_to_keep, *a, **k):
        name, seed = ("logprobs", 5) if model is trainer.model else ("ref_logprobs", 6)
        known[name] = -numbers(16, 5, seed=seed).abs()[:, :logits_to_keep]
        return known[name], torch.zeros_like(known[name]), None

    trainer._get_per_token_logps_and_entropies = fixed
    torch.manual_seed(0)
    out = trainer._generate_and_score_completions([row for row in rows for _ in range(4)])
    known["mask"] = out["completion_mask"]
    return out["advantages"], {name: rounded(value) for name, value in known.items()}


def grpo_advantages():
    outputs = {
        scale: rounded(advantages_of(trl.GRPOTrainer, trl.GRPOConfig, scale_rewards=scale, beta=0.0)[0])
        for scale in ("group", "none")
    }
    return {"inputs": {"rewards": REWARDS}, "outputs": outputs}


def rloo():
    """Leave-one-out advantages, without and with the KL in the reward; the gradient where the ratio is 1."""
    plain, _ = advantages_of(trl.RLOOTrainer, trl.RLOOConfig, beta=0.0, normalize_advantages=False)
    penalised, known = advantages_of(trl.RLOOTrainer, trl.RLOOConfig, beta=0.3, normalize_advantages=False)
    logprobs, mask = torch.tensor(known["logprobs"]).requires_grad_(), torch.tensor(known["mask"])
    same = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, torch.zeros_like(logprobs), None),
        epsilon_low=0.2,
        epsilon_high=0.2,
        aux_loss_enabled=False,
        model=SimpleNamespace(training=False),
        accelerator=same,
        _metrics={"eval": defaultdict(list)},
    )
    ids = torch.zeros_like(mask)
    batch = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": mask}
    batch |= {"old_logps": (logprobs.detach() * mask).sum(1), "advantages": penalised}
    trl.RLOOTrainer._compute_loss(trainer, None, batch).backward()
    outputs = {"advantages": rounded(plain), "with a KL": rounded(penalised), "gradient": rounded(logprobs.grad)}
    return {"inputs": {"rewards": REWARDS, "beta": 0.3, **known}, "outputs": outputs}


def dpo():
    """The mean over 4 pairs, and its gradient by the log-probs of tokens [8, 5]: 4 chosen, then 4 rejected."""
    lengths = torch.tensor([5, 2, 3, 1, 4, 5, 2, 3])
    inputs = {"logprobs": -numbers(8, 5, seed=7).abs(), "ref_logps": -numbers(8, scale=2, shift=4, seed=8).abs()}
    inputs["mask"] = (torch.arange(5) < lengths[:, None]).float()
    variants = {
        "sigmoid": {"loss_type": "sigmoid", "beta": 0.1},
        "sigmoid, smoothed": {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.2},
        "hinge": {"loss_type": "hinge", "beta": 0.5},
        "ipo": {"loss_type": "ipo", "beta": 0.5},
        "robust": {"loss_type": "robust", "beta": 0.5, "label_smoothing": 0.2},
        "sppo": {"loss_type": "sppo_hard", "beta": 0.5},
    }
    outputs = {}
    for name, variant in variants.items():
        args = trl.DPOConfig(**settings(), **variant)
        rows = datasets.Dataset.from_list([{"prompt": "1 + 1?", "chosen": " 2", "rejected": " 3"}] * 4)
        tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
        trainer = trl.DPOTrainer(MODEL, args=args, train_dataset=rows, processing_class=tokenizer)
        trainer.model.eval()
        trainer.precompute_ref_logps = True
        logprobs = inputs["logprobs"].clone().requires_grad_()
        shaped = torch.zeros_like(logprobs)
        masked = logprobs * inputs["mask"]  # TRL's fused head gives 0 outside the completion
        output = SimpleNamespace(log_probs=masked, entropy=shaped, mean_logits=shaped, is_top1=shaped.bool())
        mask = torch.cat([torch.zeros(8, 1), inputs["mask"]], 1).long()  # one prompt token, which nothing predicts
        batch = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
        ref_chosen, ref_rejected = inputs["ref_logps"].split(4)
        batch |= {"ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected}
        loss = trainer._compute_loss(lambda **k: output, batch, False)  # noqa: B023
        loss.backward()
        outputs[name] = {**variant, "loss": loss.item(), "gradient": rounded(logprobs.grad)}
    from trl.experimental.cpo import CPOTrainer

    cpu = SimpleNamespace(device=torch.device("cpu"))
    trainer = SimpleNamespace(
        accelerator=cpu, beta=2.0, simpo_gamma=0.7, loss_type="simpo", label_smoothing=0.0, alpha=0.0
    )
    means = (inputs["logprobs"] * inputs["mask"]).sum(1) / lengths
    losses, *_ = CPOTrainer.cpo_loss(trainer, *means.split(4))
    outputs["simpo"] = {"loss_type": "simpo", "beta": 2.0, "gamma": 0.7, "loss": losses.mean().item()}
    return {"inputs": {name: rounded(value) for name, value in inputs.items()}, "outputs": outputs}


def sft():
    """Token ids, labels, loss and gradient norm of 4 rows with models/arithmetic: TRL's whole path from text."""
    pairs = [("What is 37 + 48?", " 85"), ("What is 2 + 3?", " 5"), ("What is 99 + 99?", " 198"), ("1?", " one")]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    args = trl.SFTConfig(**settings(per_device_train_batch_size=4))
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    data = datasets.Dataset.from_list(rows)
    trainer = trl.SFTTrainer(MODEL, args=args, train_dataset=data, processing_class=tokenizer)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in trainer.model.parameters()]).norm()
    kept = {name: batch[name].tolist() for name in ("input_ids", "attention_mask", "labels")}
    return {"inputs": {"rows": rows}, "outputs": {**kept, "loss": loss.item(), "grad_norm": norm.item()}}


def replay():
    """Three steps of whole trainers from the same text; GRPO and RLOO are given the completions of each prompt."""
    slips = [(0, -10, 1, 0), (0, 0, 0, 0), (-10, 1, 2, 0), (1, 1, 10, 2)]  # what they add to the sum
    sums = [(a, (7 * a + 5) % 90) for a in range(30, 42)]
    rows = [{"prompt": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in sums]
    rows = [row | {"completion": f" {row['answer']}", "chosen": f" {row['answer']}", "rejected": " 7"} for row in rows]
    completions = [[f" {a + b + slip}" for slip in slips[i % 4]] for i, (a, b) in enumerate(sums)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    common = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_steps": 3, "logging_steps": 1}
    common |= {"save_strategy": "no", "gradient_checkpointing": False, "weight_decay": 0.0, "max_grad_norm": 1.0}
    grouped = common | {"per_device_train_batch_size": 16, "num_generations": 4, "max_completion_length": 8}
    grouped |= {"shuffle_dataset": False, "beta": 0.0, "temperature": 1.0}

    def exact(completions, answer, **columns):
        return [float(completion.strip() == truth) for completion, truth in zip(completions, answer)]

    kinds = {
        "grpo": (trl.GRPOTrainer, trl.GRPOConfig, grouped | {"loss_type": "grpo"}, ("prompt", "answer")),
        "reinforce": (trl.RLOOTrainer, trl.RLOOConfig, grouped, ("prompt", "answer")),
        "sft": (trl.SFTTrainer, trl.SFTConfig, common, ("prompt", "completion")),
        "dpo": (trl.DPOTrainer, trl.DPOConfig, common | {"beta": 0.1}, ("prompt", "chosen", "rejected")),
    }
    outputs = {}
    for name, (trainer_class, config_class, config, columns) in kinds.items():
        args = config_class(**settings(**{"per_device_train_batch_size": 4} | config))
        data = datasets.Dataset.from_list([{column: row[column] for column in columns} for row in rows])
        more = {"reward_funcs": exact} if "answer" in columns else {}
        trainer = trainer_class(MODEL, args=args, train_dataset=data, processing_class=tokenizer, **more)
        if more:
            texts = iter([text for own in completions for text in own])
            ids = lambda prompts: [[*tokenizer(next(texts)).input_ids, tokenizer.eos_token_id] for _ in prompts]  # noqa: B023, E731
            given = (lambda prompts, *x: (ids(prompts), None)) if name == "grpo" else (lambda prompts, *x: ids(prompts))  # noqa: B023
            trainer._generate_single_turn = given
        else:
            trainer._get_train_sampler = lambda data: torch.utils.data.SequentialSampler(data)
        trainer.train()
        logged = [row for row in trainer.state.log_history if "grad_norm" in row]
        names = ("grad_norm", "loss", "reward", "frac_reward_zero_std", "rewards/margins", "logps/chosen")
        outputs[name] = {key: [row[key] for row in logged] for key in names if key in logged[0]}
    return {"inputs": {"rows": rows, "completions": completions}, "outputs": outputs}


def lines_of(source, first, last):
    """The source from the line that holds first up to the line that holds last, as a block of its own."""
    lines = source.splitlines()
    start = next(i for i, line in enumerate(lines) if first in line)
    end = next(i for i, line in enumerate(lines) if i > start and last in line)
    return textwrap.dedent("\n".join(lines[start : end + 1]))


def ppo():
    """Advantages, returns and losses of 6 completions [6, 5], of which the first and the last fill all 5 places."""
    from trl.experimental.ppo import ppo_trainer

    source = inspect.getsource(ppo_trainer.PPOTrainer.train)
    inputs = {
        "logprobs": -numbers(6, 5, seed=9).abs(),
        "ref_logprobs": -numbers(6, 5, seed=10).abs(),
        "values": numbers(6, 5, seed=11),
        "scores": numbers(6, seed=12),
        "new_logprobs": -numbers(6, 5, seed=13).abs(),
        "new_values": numbers(6, 5, seed=14),
    }
    outputs = {}
    for gamma, lam in ((1.0, 1.0), (0.9, 0.8)):
        args = SimpleNamespace(kl_coef=0.1, kl_estimator="k1", whiten_rewards=False, gamma=gamma, lam=lam)
        args.cliprange = args.cliprange_value = 0.2
        names = vars(ppo_trainer) | {name: value.clone() for name, value in inputs.items()} | {"args": args}
        names |= {"responses": torch.zeros(6, 5), "sequence_lengths": torch.tensor(LENGTHS) - 1}
        exec(lines_of(source, "response_idxs = torch.arange", "lastgaelam = 0"), names)  # TRL's own lines, up to
        exec(lines_of(source, "advantages_reversed = []", "returns = advantages + values"), names)
        raw = names["advantages"].clone()
        exec(lines_of(source, "advantages = masked_whiten", "advantages = torch.masked_fill"), names)
        outside = ~names["padding_mask"]
        names |= {"vpred": inputs["new_values"].clone().requires_grad_(), "micro_batch_inds": torch.arange(6)}
        new_logprobs = inputs["new_logprobs"].clone().requires_grad_()
        names["new_logprobs"] = torch.masked_fill(new_logprobs, names["padding_mask"], ppo_trainer.INVALID_LOGPROB)
        names |= {"mb_values": names["values"], "mb_return": names["returns"]}
        names |= {"mb_advantage": names["advantages"], "mb_logprobs": names["logprobs"]}
        exec(lines_of(source, "vpredclipped = torch.clamp(", "pg_loss = masked_mean"), names)
        (names["pg_loss"] + names["vf_loss"]).backward()
        outputs[f"{gamma} {lam}"] = {
            "gamma": gamma,
            "gae_lambda": lam,
            "raw_advantages": rounded(raw * outside),
            "advantages": rounded(names["advantages"]),
            "returns": rounded(names["returns"] * ~names["padding_mask_p1"]),
            "policy_loss": names["pg_loss"].item(),
            "policy_gradient": rounded(new_logprobs.grad),
            "value_loss": names["vf_loss"].item(),
            "value_gradient": rounded(names["vpred"].grad),
        }
    inputs = {name: rounded(value) for name, value in inputs.items()}
    return {"inputs": inputs | {"lengths": LENGTHS, "beta": 0.1, "clip_range": 0.2}, "outputs": outputs}


if __name__ == "__main__":
    old = trl.__version__.startswith("1.12.")
    sections = [ppo] if old else [grpo_losses, grpo_advantages, rloo, dpo, sft, replay]
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for section in sections:
        results[section.__name__] = {"trl": trl.__version__, **section()}
        print(f"{section.__name__}: done with trl {trl.__version__}", file=sys.stderr)
    rows = re.compile(r"\[\s+([^\[\]]+?)\s+\]")  # innermost lists, each on a line of its own
    text = rows.sub(lambda match: f"[{' '.join(match[1].split())}]", json.dumps(results, indent=1))
    RESULTS.write_text(text + "\n")
