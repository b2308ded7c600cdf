"""Our scripts and TRL's trainers on the same work, one after the other, several rounds in turn: README's second table.

python benchmarks/peers.py                                    the embedded model, all algorithms but PPO
python benchmarks/peers.py --ppo-trl FOLDER                   with PPO, which TRL had until 1.12.0:
                                                              pip install --no-deps --target FOLDER trl==1.12.0
python benchmarks/peers.py --model PATH --only grpo grpo-kl   another model: 2 prompts x 8 samples x 64 tokens,
                                                              in micro-batches of 8
python benchmarks/peers.py --model PATH --size 8 8 24 ...     8 prompts x 8 samples x 24 tokens
python benchmarks/peers.py --model PATH --device cuda ...     on a GPU, in bfloat16
python benchmarks/peers.py --spin ...                         OpenMP's threads spin while they wait, in both

The same model, data, completions a step, completion length, optimizer (AdamW, no weight decay), float32, micro-batch
size and threads; no gradient checkpointing; DPO's reference is computed before. PPO has 64 completions a step,
ours of 8 prompts, TRL's of 64, as it takes one of each; its reward is a random model's, so it has no accuracy. Each run
is a process of its own. The seconds of a step are the median over the steps after the fifth of a run, then over the
rounds; the ratios are of runs that stand next to each other; scoring counts as update. Memory is the process' highest
resident size when its last step ends; the first step ends so many seconds after the process began, imports included.

Run it on an idle machine, in an environment with benchmarks/requirements.txt. A full run writes README's table.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from importlib.metadata import version
from pathlib import Path

REPO = Path(__file__).parent.parent
RESULTS = REPO / "benchmarks" / "peers.json"
START, END = "<!-- benchmarks/peers.py writes from here -->\n", "<!-- to there -->\n"
MICRO_BATCH = 8  # of models other than the embedded one, of which a step is one micro-batch
PEERS = {
    "sft": "SFT",
    "reinforce": "RLOO",
    "grpo": "GRPO",
    "grpo-kl": "GRPO, KL",
    "dpo": "DPO",
    "ppo": "PPO",
}


def sizes(name, model, device, size):
    """Prompts, samples of each, completion tokens, steps, learning rate."""
    if model != "models/arithmetic":
        steps = 20 if device == "cuda" else 5
        return dict(zip(("prompts", "samples", "tokens"), size)) | {"steps": steps, "rate": 1e-6}
    prompts, samples = (32, 1) if name in ("sft", "dpo") else (8, 8)
    return {"prompts": prompts, "samples": samples, "tokens": 8, "steps": 50, "rate": 5e-5 if name == "dpo" else 1e-4}


def sums(model):
    """The data of both: models/arithmetic/sums.jsonl, as messages for a model with a chat template."""
    import transformers

    source, file = REPO / "models" / "arithmetic" / "sums.jsonl", Path(tempfile.mkdtemp(), "sums.jsonl")
    if not transformers.AutoTokenizer.from_pretrained(model).chat_template:
        return str(source)
    with file.open("w") as lines:
        for row in map(json.loads, source.read_text().splitlines()):
            row["prompt"] = [{"role": "user", "content": row["prompt"]}]
            for column in ("completion", "chosen", "rejected"):
                row[column] = [{"role": "assistant", "content": row[column].strip()}]
            lines.write(json.dumps(row) + "\n")
    return str(file)


def spread(completions, **columns):
    """The reward of models that cannot add yet: where all fail alike, our update would have no rows at all."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [zlib.crc32(text.encode()) / 2**32 for text in texts]


def peak_memory(device):
    """MB: of the process, or on a GPU of torch's tensors."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ours(name, model, device, size):
    """Run our script and return what happened when."""
    sys.path.insert(0, str(REPO))
    import common

    module = __import__(name.partition("-")[0])
    size = sizes(name, model, device, size)
    ends, updates, rollouts, tokens = [], [], [], []
    log = common.Run.log

    def spy(run, step, metrics):
        if step:
            ends.append(time.time())
            updates.append(run.times.get("time/score", 0.0) + run.times["time/update"])
            rollouts.append(run.times.get("time/rollout", 0.0))
            tokens.append(metrics["completion/length"].mean().item())
        log(run, step, metrics)

    common.Run.log = spy
    args = module.Args(model=model, data=sums(model), device=device, eval_every=10**9)
    args.num_steps, args.prompts_per_step = size["steps"], size["prompts"]
    args.output_dir, args.max_new_tokens, args.learning_rate = tempfile.mkdtemp(), size["tokens"], size["rate"]
    if name not in ("sft", "dpo"):
        args.samples_per_prompt = size["samples"]
    if name in ("grpo", "reinforce"):
        args.beta = 0.0
    if name == "grpo-kl":
        args.beta = 0.04
    if name == "ppo":
        args.num_epochs, args.num_minibatches = 4, 1
    if model != "models/arithmetic":
        args.micro_batch_size, args.eval_prompts, args.reward = MICRO_BATCH, 1, (f"{__file__}:spread",)
    memory = []
    evaluate = module.evaluate

    def last(run, step, model, tokenizer, rows, *rest):  # before the first step a glance, after the last the whole
        memory.append(peak_memory(device))
        return evaluate(run, step, model, tokenizer, rows if step else rows[:1], *rest)

    module.evaluate = last
    accuracy = module.main(args)[f"eval/{args.reward[0].rpartition(':')[2]}"]
    ends[-1] = None  # after the evaluation
    return {
        "ends": ends,
        "updates": updates,
        "rollouts": rollouts,
        "tokens": tokens,
        "memory": memory[-1],
        "accuracy": accuracy,
    }


def trls(name, model, device, size):
    """Run TRL's trainer and return what happened when."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import datasets
    import torch
    import transformers
    import trl

    sys.path.insert(0, str(REPO))
    import common  # after torch, so that its threads are as TRL's users have them

    size = sizes(name, model, device, size)
    rows, held_out = common.load_data(sums(model), "", 500, ("prompt",))
    columns = {"sft": ("prompt", "completion"), "dpo": ("prompt", "chosen", "rejected")}.get(name, ("prompt", "answer"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    data = datasets.Dataset.from_list([{column: row[column] for column in columns} for row in rows])
    B = size["prompts"] * size["samples"]  # of PPO as many prompts
    common_settings = {
        "output_dir": tempfile.mkdtemp(),
        "report_to": [],
        "use_cpu": device == "cpu",
        "bf16": device == "cuda",
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 10**9,
        "max_steps": size["steps"],
        "learning_rate": size["rate"],
        "per_device_train_batch_size": B if model == "models/arithmetic" else MICRO_BATCH,
        "gradient_accumulation_steps": 1 if model == "models/arithmetic" else B // MICRO_BATCH,
    }
    ends, rollouts, tokens = [], [0.0], []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args, **settings):
            ends.append(time.time())
            rollouts.append(0.0)

    def reward(completions, completion_ids, answer, **columns):
        tokens.append(sum(map(len, completion_ids)) / len(completion_ids))
        given = common.exact_answer if model == "models/arithmetic" else spread
        return given(completions=completions, answer=answer)

    def timed(function):
        def call(*args, **settings):
            start = time.perf_counter()
            result = function(*args, **settings)
            rollouts[-1] += time.perf_counter() - start
            return result

        return call

    start_model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if name == "sft":
        args = trl.SFTConfig(**common_settings, max_length=512)
        trainer = trl.SFTTrainer(start_model, args=args, train_dataset=data, processing_class=tokenizer)
    elif name == "dpo":
        args = trl.DPOConfig(**common_settings, beta=0.1, max_length=512, precompute_ref_log_probs=True)
        trainer = trl.DPOTrainer(start_model, args=args, train_dataset=data, processing_class=tokenizer)
    elif name == "ppo":
        from trl.experimental import ppo

        # its reward is a model's: the sum of what the head gives, on the CPU the same work as one forward pass
        heads = [
            transformers.AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
            for _ in range(2)
        ]
        del common_settings["max_steps"], common_settings["bf16"]
        args = ppo.PPOConfig(
            **common_settings,
            num_ppo_epochs=4,
            num_mini_batches=1,
            total_episodes=B * size["steps"],
            response_length=size["tokens"],
            temperature=1.0,
            stop_token="eos",
            num_sample_generations=0,
            bf16=False,
            local_rollout_forward_batch_size=B,
            kl_coef=0.05,
        )
        ids = data.map(lambda row: {"input_ids": tokenizer(row["prompt"]).input_ids}, remove_columns=data.column_names)
        reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        tokenizer.padding_side = "left"
        trainer = ppo.PPOTrainer(
            args=args,
            processing_class=tokenizer,
            model=start_model,
            ref_model=reference,
            reward_model=heads[0],
            value_model=heads[1],
            train_dataset=ids,
        )
        module = sys.modules["trl.experimental.ppo.ppo_trainer"]
        module.batch_generation = timed(module.batch_generation)
    else:
        trainer_class, config_class = (
            (trl.RLOOTrainer, trl.RLOOConfig) if name == "reinforce" else (trl.GRPOTrainer, trl.GRPOConfig)
        )
        args = config_class(
            **common_settings,
            num_generations=size["samples"],
            max_completion_length=size["tokens"],
            steps_per_generation=common_settings["gradient_accumulation_steps"],
            beta=0.04 if name == "grpo-kl" else 0.0,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
        )
        trainer = trainer_class(start_model, reward, args, data, processing_class=tokenizer)
        trainer._generate = timed(trainer._generate)
    trainer.add_callback(Clock())
    trainer.train()
    memory = peak_memory(device)
    import grpo

    trained = getattr(trainer.model, "policy", trainer.model).eval()
    trained.generation_config.eos_token_id = [tokenizer.eos_token_id]
    score = common.load_reward(("exact_answer",), ())
    silent = type("Silent", (), {"log_samples": lambda *a: None})()
    small = held_out if model == "models/arithmetic" else held_out[:1]
    args = common.check_args(grpo.Args(device=device, max_new_tokens=size["tokens"]))
    accuracy = grpo.evaluate(silent, 0, trained, tokenizer, small, score, args)["eval/exact_answer"].nanmean().item()
    return {"ends": ends, "rollouts": rollouts[:-1], "tokens": tokens, "memory": memory, "accuracy": accuracy}


def run(whose, name, model, device, size, ppo_trl, spin):
    """One process; its seconds a step, split where it samples, to the first step, its memory and accuracy."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"OMP_WAIT_POLICY": "ACTIVE"} if spin else {}
    if whose == "trl" and name == "ppo":
        environment["PYTHONPATH"] = ppo_trl
    command = [sys.executable, __file__, "--job", whose, "--only", name, "--model", model, "--device", device]
    command += ["--size", *map(str, size)]
    start = time.time()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{whose} {name}:\n{done.stderr[-3000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    ends = [end for end in result["ends"] if end]
    skip = 5 if len(ends) > 10 else 1
    seconds = statistics.median(b - a for a, b in zip(ends[skip - 1 :], ends[skip:]))
    rollout = statistics.median(result["rollouts"][skip:])
    size = sizes(name, model, device, size)
    tokens = statistics.mean(result["tokens"][skip:]) * size["prompts"] * size["samples"] if result["tokens"] else None
    return {
        "seconds": seconds,
        "rollout": rollout,
        "update": statistics.median(result["updates"][skip:]) if "updates" in result else seconds - rollout,
        "tokens_per_second": tokens and tokens / seconds,
        "first_step": ends[0] - start,
        "memory": result["memory"],
        "accuracy": result["accuracy"],
    }


def table(results) -> str:
    rows = ["| | ours, s/step | rollout + update | TRL, s/step | faster | memory, MB | first step, s | accuracy |"]
    rows.append("|---|---|---|---|---|---|---|---|")
    for name, rounds in results["runs"].items():

        def both(key, form, rounds=rounds):
            a, b = (statistics.median(pair[whose][key] for pair in rounds) for whose in ("ours", "trl"))
            return f"{a:{form}} / {b:{form}}"

        mine = {
            key: statistics.median(pair["ours"][key] for pair in rounds) for key in ("seconds", "rollout", "update")
        }
        theirs = statistics.median(pair["trl"]["seconds"] for pair in rounds)
        ratio = statistics.median(pair["trl"]["seconds"] / pair["ours"]["seconds"] for pair in rounds)
        split = f"{mine['rollout']:.3f} + {mine['update']:.3f}" if mine["rollout"] else f"{mine['update']:.3f}"
        accuracy = both("accuracy", ".2f") if name != "ppo" else ""
        rows.append(
            f"| {name} against {PEERS[name]} | {mine['seconds']:.3f} | {split} | {theirs:.3f} | **{ratio:.1f}x** "
            f"| {both('memory', '.0f')} | {both('first_step', '.1f')} | {accuracy} |"
        )
    return "\n".join(rows) + "\n"


def write_readme(results) -> None:
    readme = REPO / "README.md"
    before, _, rest = readme.read_text().partition(START)
    note = f"\nMedians of {len(next(iter(results['runs'].values())))} rounds; ours / TRL's. {results['machine']}.\n"
    readme.write_text(before + START + table(results) + note + END + rest.partition(END)[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/arithmetic")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", default=[], choices=list(PEERS))
    parser.add_argument("--size", nargs=3, type=int, default=(2, 8, 64), help="prompts, samples, tokens; not of ours")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ppo-trl", default="", help="folder with trl 1.12.0")
    parser.add_argument("--spin", action="store_true", help="both with OMP_WAIT_POLICY=ACTIVE")
    parser.add_argument("--output", default="", help="JSON to write; benchmarks/peers.json for a full run")
    parser.add_argument("--job", choices=("ours", "trl"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps({"ours": ours, "trl": trls}[args.job](args.only[0], args.model, args.device, args.size)))
        return
    names = args.only or [name for name in PEERS if name != "ppo" or args.ppo_trl]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {packages}"
    results = {"machine": machine, "model": args.model, "runs": {name: [] for name in names}}
    for number in range(args.rounds):
        for name in names:
            settings = (args.model, args.device, args.size, args.ppo_trl, args.spin)
            pair = {whose: run(whose, name, *settings) for whose in ("ours", "trl")}
            results["runs"][name].append(pair)
            faster = pair["trl"]["seconds"] / pair["ours"]["seconds"]
            print(f"round {number + 1}, {name}: {faster:.2f} times TRL's steps a second", file=sys.stderr, flush=True)
    print(table(results))
    if args.output or not (args.only or args.spin):
        Path(args.output or RESULTS).write_text(json.dumps(results, indent=1) + "\n")
    if not args.only and not args.spin:
        write_readme(results)


if __name__ == "__main__":
    main()
