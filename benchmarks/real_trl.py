"""TRL's trainer on the work of one of our scripts, by the script's own flags: what real.py --peer trl runs.

python benchmarks/real_trl.py grpo --model PATH --data train.jsonl ...

The same checkpoint, rows in the same order, reward, completions a step, rate, schedule, AdamW without weight decay and
dtype. TRL's own are tokens, sampling and loss; of several rewards it gets the first. Two things make it faster than it
is as it ships: no gradient checkpointing, and on a CPU logits of completion tokens only, as on a GPU. Our greedy
evaluation measures it, and the run leaves what ours leave. Needs benchmarks/requirements.txt.
"""

import importlib
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
import datasets
import torch
import transformers
import trl
import tyro

trl.trainer.utils._use_triton = lambda device: True  # logits of completions only, as TRL makes them on a GPU
TRAINERS = {
    "sft": (trl.SFTTrainer, trl.SFTConfig, ("prompt", "completion")),
    "reinforce": (trl.RLOOTrainer, trl.RLOOConfig, ("prompt",)),
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig, ("prompt",)),
    "dpo": (trl.DPOTrainer, trl.DPOConfig, ("prompt", "chosen", "rejected")),
}


def as_messages(row: dict) -> dict:
    """TRL wants an answer to messages as messages."""
    if isinstance(row["prompt"], str):
        return row
    answers = {name: row[name] for name in ("completion", "chosen", "rejected") if isinstance(row.get(name), str)}
    return row | {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}


def main(script: str, flags: list[str]) -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import common  # after torch, so that its threads are as TRL's users have them
    import grpo

    args = common.check_args(tyro.cli(importlib.import_module(script).Args, args=flags))
    trainer_class, config_class, columns = TRAINERS[script]
    train_rows, eval_rows = common.load_data(args.data, args.eval_data, args.eval_prompts, columns)
    score = common.load_reward(args.reward)
    run = common.Run(args)
    ours, tokenizer = common.load_model(args.model, "cpu")
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device)
    model.generation_config.eos_token_id = ours.generation_config.eos_token_id
    del ours
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: common.decay(args, step + 1))
    G = getattr(args, "samples_per_prompt", 1)
    B = args.prompts_per_step * G
    micro = min(B, args.micro_batch_size, 32)  # on two cores TRL is fastest so: 70 s a step of grpo, 91 with 256
    settings = {
        "output_dir": tempfile.mkdtemp(), "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "logging_steps": 10**9, "use_cpu": args.device == "cpu", "bf16": args.dtype == "bfloat16", "seed": args.seed,
        "gradient_checkpointing": False, "max_steps": args.num_steps, "max_grad_norm": args.max_grad_norm,
        "per_device_train_batch_size": micro, "gradient_accumulation_steps": B // micro,
    }  # fmt: skip
    if script in ("grpo", "reinforce"):
        settings |= {
            "num_generations": G, "max_completion_length": args.max_new_tokens, "steps_per_generation": B // micro,
            "beta": args.beta, "temperature": args.temperature, "top_k": 0, "top_p": 1.0, "shuffle_dataset": False,
        }  # fmt: skip
        settings |= {"loss_type": "grpo"} if script == "grpo" else {}
    else:
        settings |= {"beta": args.beta or 0.1, "precompute_ref_log_probs": True} if script == "dpo" else {}
    rows = [
        as_messages(row) for step in range(1, args.num_steps + 1) for row in common.take_batch(train_rows, step, args)
    ]
    names = columns if script in ("sft", "dpo") else rows[0].keys() - {"completion", "chosen", "rejected"}
    data = datasets.Dataset.from_list([{name: row[name] for name in names} for row in rows])
    function = common.load_function(args.reward[0])
    lengths, rollouts, start = [], [], time.perf_counter()

    def timed(function):
        def call(*args, **settings):
            before = time.perf_counter()
            result = function(*args, **settings)
            rollouts.append(time.perf_counter() - before)
            return result

        return call

    def reward(prompts, completions, completion_ids, **columns):
        lengths.extend(map(len, completion_ids))
        return function(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)

    def evaluate(step):
        return grpo.evaluate(run, step, model.eval(), tokenizer, eval_rows, score, args)

    class Log(transformers.TrainerCallback):
        def on_step_begin(self, *args, **settings):
            self.start = time.perf_counter()

        def on_step_end(self, _, state, *rest, **more):
            step, seconds = state.global_step, time.perf_counter() - self.start
            run.times = {"time/rollout": sum(rollouts)} if rollouts else {}
            run.times["time/update"] = seconds - sum(rollouts)
            metrics = {"completion/length": sum(lengths) / len(lengths)} if lengths else {}
            lengths.clear()
            rollouts.clear()
            if step % args.eval_every == 0 or step == args.num_steps:
                metrics |= evaluate(step)
            run.log(step, metrics)

    run.start(train_rows, eval_rows, model=(model, optimizer))
    run.log(0, evaluate(0))
    more = {"reward_funcs": reward} if script in ("grpo", "reinforce") else {}
    config = config_class(**settings)
    trainer = trainer_class(
        model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[Log()],
        optimizers=(optimizer, schedule), **more,
    )  # fmt: skip
    if more:
        trainer._generate = timed(trainer._generate)
    else:
        trainer._get_train_sampler = lambda data=data: torch.utils.data.SequentialSampler(data)
    trainer.train()
    run.finish(model.eval(), tokenizer)
    print(f"{script} by TRL {trl.__version__}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
