"""The traps of these algorithms, each sprung by one edit of the code, and the test that the edit turns red.

python tests/mutations.py           spring all, each in a copy of the repository; then write docs/correctness.md's table
python tests/mutations.py A1 D2     spring some

A trap that is sprung and leaves its test green ends the command with an error.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).parent.parent
PAGE = REPO / "docs" / "correctness.md"
START, END = "<!-- tests/mutations.py writes from here -->\n", "<!-- to here -->\n"

# Name and what is right, with the place where it was met; file and test; what the edit takes away; what it puts there.
TRAPS = r"""
0.1, A3: Samples come from the whole softmax: no hidden top-k of 50. (trl#5783, verl#7270)
grpo.py test_rollout.py::test_sampling_is_the_whole_softmax
-cdf = log_softmax.exp()
+cdf = log_softmax.where(log_softmax >= log_softmax.topk(50)[0][:, -1:], -99).exp()
0.2: A model whose gradients are checkpointed stays in eval mode, or rollouts lose their cache. (transformers#36051)
common.py test_adapters.py::test_gradient_checkpointing_computes_layers_twice_in_updates_and_never_in_train_mode[True]
-model.shares_prompts = False
+model.train().shares_prompts = False
0.3: Parameters are float32 whatever the checkpoint's are. (transformers#42805)
common.py test_common.py::test_load_model_settles_dtype_dropout_stops_and_padded_vocabulary
-{"dtype": torch.float32, "output_loading_info": True}
+{"output_loading_info": True}
0.4: Under bfloat16 forward passes a step of 1e-6 still moves the weights. (NeMo-RL#2322)
common.py test_scripts.py::test_bfloat16_forward_passes_leave_float32_parameters_that_small_steps_move
-return model.to(device), tokenizer
+return model.to(device, torch.bfloat16), tokenizer
0.5: TRPO differentiates twice, which fused attention cannot. (pytorch#116350)
trpo.py test_trpo.py::test_fisher_vector_product_is_the_explicit_fisher_times_the_vector
-with sdpa_kernel(SDPBackend.MATH):  # fused
+with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # fused
0.6: A prompt is a list of ids, not a BatchEncoding. (transformers#41626, trl#4880)
common.py test_data.py::test_what_a_prompt_becomes
-ids = tokenizer(text, add_special_tokens=plain).input_ids
+ids = tokenizer(text, add_special_tokens=plain)
A1: The logits at position t predict token t + 1. (trl#3681)
grpo.py test_rollout.py::test_logprobs_do_not_depend_on_padding
-hidden[kept[:, : hidden.shape[1]]]
+hidden.roll(-1, 1)[kept[:, : hidden.shape[1]]]
A2: The temperature divides the logits of the update as it does those of the sampler. (trl#3029, NeMo-RL#935)
reinforce.py test_update.py::test_reinforce
-logprobs = token_logprobs(model, *inputs, temperature=args.temperature)  # [b, T]
+logprobs = token_logprobs(model, *inputs)  # [b, T]
A4: Log-softmax is of float32 logits. (transformers#31267, genlm-backend#66)
grpo.py test_rollout.py::test_log_softmax_is_of_float32_logits
-(common.logits_of(model, hidden).float() / temperature).log_softmax(-1)
+(common.logits_of(model, hidden) / temperature).log_softmax(-1).float()
A5, D9: Old log-probs are the training forward's, so the first ratio is 1. (trl#3867, verl#2953, NeMo-Aligner#68)
grpo.py test_scripts.py::test_ratio_is_1_on_the_first_minibatch[grpo]
-None if on_policy else batch_logprobs(model, batch, minibatches, args)
+sampled_logprobs
A18: Old log-probs are made beside the rows of the update: in bfloat16 their neighbours move them. (A5)
ppo.py test_scripts.py::test_ratio_is_1_on_the_first_minibatch[ppo]
-old_logprobs = batch_logprobs(model, batch, minibatches, args)
+old_logprobs = batch_logprobs(model, batch, [torch.arange(len(rows))], args)
A19: Both log-probs of the KL are of one kind of pass. (A5)
reinforce.py test_scripts.py::test_the_kl_to_the_start_is_0_at_the_start_whatever_the_sampler_says[reinforce]
-kl = (own - ref) * completion_mask
+kl = (sampled_logprobs - ref) * completion_mask
A20: Nothing is drawn of logits that are not finite. (unsloth#9848)
common.py test_scripts.py::test_of_logits_that_are_not_finite_nothing_is_drawn[grpo]
-if logprobs is not None and not logprobs.isfinite().all():
+if False:
A6: Positions do not count the padding. (trl#6800, OpenRLHF#217)
grpo.py test_rollout.py::test_logprobs_do_not_depend_on_padding
-    positions = (mask.cumsum(1) - 1).clamp(min=0)
+    positions = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
A7: Where pad is EOS, the stop token is still a target. (trl#1623, trl#3091)
common.py test_update.py::test_sft
-padded([torch.ones_like(row) for row in rows])
+padded([(row != 0).long() for row in rows])
A8: Every stop id ends a completion. (trl#7039, trl#1553)
grpo.py test_rollout.py::test_every_stop_id_ends_a_row_and_is_counted
-torch.tensor(model.generation_config.eos_token_id, device=prompt_ids.device)
+torch.tensor(model.generation_config.eos_token_id[:1], device=prompt_ids.device)
A9: The update is of the sampled ids, not of their text tokenised again. (SkyRL#123)
reinforce.py test_update.py::test_reinforce
-        rewards, components = score(
+        ids = [(tokenizer(text).input_ids + [0] * 9)[: completion_ids.shape[1]] for text in texts]
+        completion_ids, _ = common.pad(ids, "right", model.device)
+        rewards, components = score(
A10: Rows of a padded vocabulary that no token owns are neither sampled nor scored. (vllm#13175)
common.py test_common.py::test_load_model_settles_dtype_dropout_stops_and_padded_vocabulary
-logits: logits[..., :vocab_size])
+logits: logits)
A11: A template that writes BOS gets no second one. (transformers#31796, open-r1#462)
common.py test_data.py::test_bos_comes_once
-plain = isinstance(row["prompt"], str) and not (bos and text.startswith(bos))
+plain = True
A12: There is no dropout: the model stays in eval mode. (arXiv 2403.17031, trl#3234)
common.py test_common.py::test_load_model_settles_dtype_dropout_stops_and_padded_vocabulary
-return model.to(device), tokenizer
+return model.train().to(device), tokenizer
A13, B4: A micro-batch's sum is divided by what the whole batch has. (transformers#34191, verl#906)
sft.py test_update.py::test_sft
-sft_loss(logprobs, completion_mask[micro], normalizer=tokens)
+sft_loss(logprobs, completion_mask[micro], normalizer=completion_mask[micro].sum())
A14: Logged means are over completion tokens, not padding. (rlhf-book#216)
grpo.py test_update.py::test_grpo
-"policy/entropy": -sampled_logprobs[completion_mask > 0]
+"policy/entropy": -sampled_logprobs
A15: One seed gives one result. (trl#7083)
common.py test_scripts.py::test_same_seed_same_weights_however_often_it_is_evaluated[grpo]
-(self.args.seed * 1_000_003 + step
+(time.time_ns() + step
A16: Evaluation is greedy: no seed changes it. (rlhf-book#350)
grpo.py test_scripts.py::test_same_seed_same_weights_however_often_it_is_evaluated[grpo]
-truncated = rollout(model, *prompts, max_new_tokens=args.max_new_tokens)
+truncated = rollout(model, *prompts, max_new_tokens=args.max_new_tokens, temperature=1.0)
A17: A prompt that is computed once gets the gradient of all its completions.
grpo.py test_batches.py::test_losses_and_gradients_are_those_of_plain_rows
-    prompts.past_key_values.reorder_cache(
+    for layer in prompts.past_key_values.layers:
+        layer.keys = layer.keys.detach()
+    prompts.past_key_values.reorder_cache(
B1: A prompt ends with the template's opening of the answer. (trl#4147)
common.py test_data.py::test_what_a_prompt_becomes
-"add_generation_prompt": not continued
+"add_generation_prompt": False
B2: The stop token is the last target. (trl#3091, trl#4698)
common.py test_golden.py::test_sft_from_text_to_gradient
-return [*ids[len(head) :], stops.get(stop, stop_ids[0])]
+return ids[len(head) :]
B5: Ties fall to chance, not to the first sample. (rlhf-book#373)
rejection_sampling.py test_rejection_sampling.py::test_ties_fall_to_each_alike_and_by_seed
-order = torch.randperm(len(rewards), generator=generator)
+order = torch.arange(len(rewards))
B6: A demonstration ends behind its own words, whatever stop token they quote.
common.py test_cases.py::test_a_demonstration_ends_behind_its_own_words_and_never_within
-.search(answer, end)
+.search(answer)
C1: Leave-one-out leaves one out. (arXiv 2402.14740)
reinforce.py test_exact.py::test_reinforce_in_expectation_over_all_groups
-b = (summed - groups) / (count - 1)
+b = summed / count
C2: REINFORCE sums over tokens: no division by the length. (arXiv 2503.20783)
reinforce.py test_exact.py::test_reinforce_in_expectation_over_all_groups
-(advantages[:, None] * logprobs * completion_mask).sum()
+(advantages[:, None] * logprobs * completion_mask).div(completion_mask.sum(1)[:, None]).sum()
C3: The rounding of a tied group is never divided by its standard deviation. (NeMo-RL#4161)
grpo.py test_losses.py::test_grpo_advantages
-groups = groups - groups.nan_to_num(-torch.inf).amax(1, keepdim=True)
+groups = groups + 0
C4: Dr. GRPO divides by a constant, not by the padded width. (trl#3256, verl#3741)
grpo.py test_golden.py::test_grpo_losses
-completions * max_new_tokens
+completions * completion_mask.shape[1]
C5: Tied groups are left out only where nothing else but the advantage pulls at them. (trl#7068, trl#6365)
grpo.py test_update.py::test_grpo
-if on_policy and not args.beta:
+if on_policy:
C6: A truncated completion is trained on by its reward, as it is. (trl#6369)
grpo.py test_update.py::test_grpo
-completion_mask[rewards.isnan()] = 0.0
+completion_mask[rewards.isnan() | truncated] = 0.0
C7: Where the ratio is 1 the gradient is still there. (trl#2703, open-r1#239)
grpo.py test_update.py::test_grpo
-old = logprobs.detach() if on_policy
+old = logprobs if on_policy
C8: Old log-probs stay those of the rollout over all its updates. (trl#3757)
ppo.py test_update.py::test_ppo
-policy_loss(logprobs, old, advantage
+policy_loss(logprobs, logprobs.detach(), advantage
C9: k3 and k2 have the value and the gradient that are claimed. (arXiv 2512.21852)
grpo.py test_exact.py::test_kl_estimators_in_the_loss
-if kl_estimator == "k3" else
+if kl_estimator == "k2" else
C10: k3's ratio is pi_ref / pi. (ToolRL#52, RAGEN#58)
grpo.py test_exact.py::test_kl_estimators_in_the_loss
-log_ref_ratio = ref_logprobs - logprobs
+log_ref_ratio = logprobs - ref_logprobs
C11: The KL counts once: in the loss and not in the reward too. (OpenRLHF#768)
grpo.py test_update.py::test_grpo
-compute_advantages(shaped,
+compute_advantages(shaped - args.beta * (sampled_logprobs - ref_logprobs).sum(1),
C12: What could not be scored takes no part: it is no reward of 0. (trl#5902)
reinforce.py test_update.py::test_reinforce
-rewards = rewards.to(
+rewards = rewards.nan_to_num().to(
C13: GSPO's clip is its own, a thousandth of the others'. (arXiv 2507.18071)
grpo.py test_scripts.py::test_settings_are_those_of_the_papers
-"clip_low": 3e-4, "clip_high": 4e-4
+"clip_low": 0.2, "clip_high": 0.2
D1: The score is on the last token, not one slot after it. (trl#3750)
ppo.py test_update.py::test_ppo
-lengths.long()[:, None] - 1, rewards
+lengths.long()[:, None].clamp(max=token_rewards.shape[1] - 1), rewards
D2: A completion that was cut off is scored, or the policy can be paid for not ending. (verl, OpenRLHF)
ppo.py test_update.py::test_ppo
-lengths.long()[:, None] - 1, rewards.nan_to_num()[:, None])
+lengths.long()[:, None] - 1, (rewards.nan_to_num() * ~truncated)[:, None])
D3: Values on padding reach no advantage. (ROLL#447)
ppo.py test_losses.py::test_gae_by_hand
-values.float() * completion_mask
+values.float()
D4: Each token pays for its own KL. (trl#11)
ppo.py test_update.py::test_ppo
-token_rewards = -args.beta * kl_ref
+token_rewards = -args.beta * kl_ref.sum(1, keepdim=True) * completion_mask
D5: V_t is of the state in which token t is sampled.
ppo.py test_update.py::test_ppo
-(hidden.float() * self.head.weight[0])
+(hidden.roll(-1, 1).float() * self.head.weight[0])
D6: The value head starts at 0. (trlx#203, trl#1063)
ppo.py test_scripts.py::test_ppos_value_model_starts_at_0_and_shares_nothing_with_the_policy
-torch.nn.init.zeros_(self.head.weight)
+torch.nn.init.ones_(self.head.weight)
D7: Returns are of the advantages before whitening.
ppo.py test_update.py::test_ppo
-        advantages = whiten(advantages, completion_mask)
+        advantages = whiten(advantages, completion_mask)
+        returns = advantages + old_values
D8: The value is clipped around that of the rollout. (trl#202)
ppo.py test_update.py::test_ppo
-targets = old_values[micro], returns
+targets = values.detach(), returns
D10: The Fisher matrix is that of the whole vocabulary. (arXiv 1502.05477)
trpo.py test_exact.py::test_fisher_vector_product_over_all_completions
-jvp = log_softmax.detach().exp() * jvp * weight
+jvp = jvp * weight
D11: Conjugate gradient solves the damped system. (sb3-contrib#38)
trpo.py test_trpo.py::test_conjugate_gradient_solves
-product = product + damping * direction
+pass
D12: A failed search restores the parameters. (tianshou#1287, modular_rl#7)
trpo.py test_trpo.py::test_line_search
-    vector_to_parameters(old_parameters, parameters)
-    return 0.0, 0.0
+    return 0.0, 0.0
D13: A warm-up reaches the learning rate: it is no factor of the decay.
common.py test_cases.py::test_a_warm_up_reaches_the_rate
-left = (args.num_steps + 1 - step) / max(1, args.num_steps - args.warmup_steps)
+left = min(1.0, step / max(1, args.warmup_steps)) * (args.num_steps + 1 - step) / args.num_steps
E1: Sums of log-probs; means for IPO and SimPO. (open-instruct#483, trl#1265)
dpo.py test_golden.py::test_dpo_losses
-if loss_type in ("ipo", "simpo") else summed
+if loss_type in ("ipo", "simpo", "sigmoid") else total
E2: At the reference the loss is log 2. (ETO#14)
dpo.py test_dpo.py::test_loss_at_the_reference
-(rejected_logps - ref_rejected_logps).float()
+(rejected_logps - ref_chosen_logps).float()
E3: Pairs that are equal once cut off are dropped. (rlhf-book#503)
dpo.py test_dpo.py::test_pairs_without_a_difference_are_dropped_and_counted
-if chosen and rejected and chosen != rejected else []
+if chosen and rejected else []
E4: The reference is the starting model. (trl#2423, trl#5542)
dpo.py test_update.py::test_dpo
-ref_logps = all_ref_logps[list(indices)]
+ref_logps = reference_logprobs(model, examples, args)[list(indices)]
E5: Chosen and rejected log-probs are logged apart: both may fall while the margin grows. (trl#800)
dpo.py test_update.py::test_dpo
-"logps/rejected": logps[:, 1]
+"logps/rejected": logps[:, 0]
E6: Label smoothing does what it says or is refused. (trl#1035)
dpo.py test_errors.py::test_bad_flags_are_refused_before_a_model_is_loaded
- and self.loss_type in ("sigmoid", "robust")
G1: An item weighs by its mean confidence, which no completion can lower for itself.
grape.py test_grape.py::test_invariants
-c = (known / count.clamp(min=1)).repeat_interleave(samples_per_prompt, 0)
+c = confidences
G2: A critic that answers neither yes nor no has not scored.
grape.py test_grape.py::test_critic_is_read_by_its_yes_and_no
-answer.where((p_yes + p_no >= 0.01)[:, None], math.nan)
+answer
R1: A resumed run has its optimizer's state. (trl#2657, OpenRLHF#1103)
common.py test_runs.py::test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit[grpo]
-                if optimizer:
+                if False:
R2: A kill during a save leaves the last good checkpoint.
common.py test_runs.py::test_a_kill_during_a_save_leaves_the_last_good_checkpoint[torch.save]
-self.checkpoint.with_suffix(".new").open("wb")
+self.checkpoint.open("wb")
R3: Ctrl-C and SIGTERM save.
common.py test_runs.py::test_sigterm_saves_like_ctrl_c_and_a_second_one_ends_at_once
-if not stopping and (every == 0 or
+if (every == 0 or
R4: Gradients that are not finite never reach the weights.
dpo.py test_errors.py::test_gradients_that_are_not_finite_stop_the_run_before_the_weights[dpo]
-, error_if_nonfinite=True
R5: A reward that is NaN is an error, not a missing score.
common.py test_errors.py::test_rewards_that_return_nonsense
-not math.isfinite(value)
+math.isinf(value)
P1: A loss is divided by the count over all processes.
sft.py test_distributed.py::test_two_processes_update_as_one_does[sft]
-tokens = common.total(completion_mask.sum())
+tokens = completion_mask.sum()
P2: Each process has its own share of the prompts.
common.py test_distributed.py::test_two_processes_update_as_one_does[reinforce]
-args.prompts_per_step + RANK * count
+args.prompts_per_step
P3: TRPO's replicas take one step: the Fisher matrix is of all processes' tokens.
trpo.py test_distributed.py::test_two_processes_update_as_one_does[trpo]
-return common.total(product)
+return product
P4: A process that kept fewer completions makes the same steps, on rows without weight.
rejection_sampling.py test_distributed.py::test_two_processes_update_as_one_does[rejection_sampling-batch]
-completion_mask[minibatch] * (minibatch >= 0)[:, None]
+completion_mask[minibatch]
P5: Log-probs that were kept by one process reach the others, whose rows they are in the next epoch.
dpo.py test_distributed.py::test_two_processes_update_as_one_does[dpo]
-return common.total(table, torch.distributed.ReduceOp.MAX)
+return table
P6: A batch's confidences are of all processes.
grape.py test_distributed.py::test_two_processes_update_as_one_does[grape-batch]
-common.total(known.sum(0)) / common.total(scored.sum(0))
+known.sum(0) / scored.sum(0)
P7: An accuracy is over all held-out prompts, of which processes may have unlike numbers.
common.py test_distributed.py::test_two_processes_update_as_one_does[sft]
-for x in (sums, counts))
+for x in ([s / c for s, c in zip(sums, counts)], [1.0] * len(sums)))
P8: Each process draws its own random numbers.
common.py test_distributed.py::test_the_readmes_command_writes_and_says_everything_once
-+ step * 8191 + RANK)
++ step * 8191)
P9: A gradient is the sum of all processes'.
sft.py test_distributed.py::test_two_processes_update_as_one_does[sft]
-common.sum_gradients(model)
+pass
P10: A process of ties alone keeps one prompt, or it would log other figures than the rest.
common.py test_batches.py::test_ties_are_left_out_by_whole_prompts_and_one_stays
-return prompts[:1] if tied.all() else prompts[~tied]
+return prompts[~tied]
L1: The reference is the model without its adapters. (trl#1500)
common.py test_adapters.py::test_the_reference_is_the_start_though_the_adapters_were_trained[grpo]
-rescale_adapter_scale(model, 0.0)
+rescale_adapter_scale(model, 1.0)
L2: A checkpoint holds no frozen weights.
common.py test_adapters.py::test_lora_trains_adapters_only_and_saves_them_as_peft_does[sft]
-for key, weight in model.named_parameters() if weight.requires_grad}
+for key, weight in model.named_parameters()}
L3: Layers that run twice share no prompt's cache, which they would write twice.
common.py test_adapters.py::test_gradient_checkpointing_changes_no_figure[grpo-0]
-model.shares_prompts = False
+model.shares_prompts = True
U1: A reward changes nobody's data, not even that of a second sample of the prompt. (verl#1293, its_hub#21)
common.py test_rewards.py::test_a_reward_changes_nobodys_data
-[copy.deepcopy(row[column]) for
+[row[column] for
U2: No wrong answer scores 1: not one of several numbers. (verl#7274, evalscope#903, trl#4563)
common.py test_rewards.py::test_exact_answer
-len(parts) < 3 and to_number
+to_number
U3: A template that leaves out what a turn says is refused. (prime-rl#1334, trl#6472, DeepSeek-R1#633)
common.py test_cases.py::test_a_turn_that_the_template_leaves_out_is_refused
-if words not in (written if moves else rest):
+if False:
U4: Targets have no space that the data has not. (trl#2209)
common.py test_data.py::test_targets_are_what_a_rollout_could_sample
-for before in (start,
+for before in ("",
U5: Weights that the checkpoint lacks are refused: they would start at random. (heretic#31)
common.py test_errors.py::test_a_model_that_is_not_what_it_seems
-if (missing := sorted(report["missing_keys"])) or
+if (missing := []) or
U6: Runs of one second have folders of their own. (pangaea-bench#104)
common.py test_runs.py::test_runs_of_one_moment_have_folders_of_their_own
-:%Y%m%d-%H%M%S-%f}
+:%Y%m%d-%H%M%S}
U7: A text goes to the model as it stands, as in TRL, also where there is a chat template.
common.py test_data.py::test_what_a_prompt_becomes
-    if isinstance(turns, str):
+    if tokenizer.chat_template and isinstance(turns, str):
+        turns = [{"role": "user", "content": turns}]
+    if isinstance(turns, str):
"""


class Mutation(NamedTuple):
    trap: str
    right: str  # how it must be
    file: str
    test: str
    old: str  # occurs once in the file
    new: str


def read(text: str) -> list[Mutation]:
    form = r"([^-+:][^:\n]*): (.+)\n(\S+) (\S+)\n((?:-.*\n)+)((?:\+.*\n)*)"
    parts = re.findall(form, text)
    assert not re.sub(form, "", text).strip(), "a trap that is not of this form"
    return [Mutation(*(re.sub(r"^[-+]", "", x, flags=re.M).strip("\n") for x in part)) for part in parts]


MUTATIONS = read(TRAPS)


def table() -> str:
    """The table of docs/correctness.md."""

    def code(text: str) -> str:
        text = " ".join(text.split()).replace("|", "\\|")
        return f"`{text}`" if text else "nothing"

    rows = ["| trap | how it must be | the edit that springs it | red then |", "|---|---|---|---|"]
    for m in MUTATIONS:
        file, _, test = m.test.partition("::")
        rows.append(f"| {m.trap} | {m.right} | {m.file}: {code(m.old)} becomes {code(m.new)} | {test} in {file} |")
    return "\n".join(rows) + "\n"


def write_page() -> None:
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text(before + START + table() + END + rest.partition(END)[2])


def outcome(folder: Path, *tests: str) -> int:
    """pytest's exit status for these tests in a copy of the repository."""
    paths = [f"tests/{test}" for test in tests]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *paths]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return -1 if "NameError: " in done.stdout else done.returncode  # an edit that is no code springs nothing


def spring(mutation: Mutation, folder: Path) -> bool:
    """Whether the test fails (and was run) with the edit made in the copy, which is undone afterwards."""
    path = folder / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != 1:
        sys.exit(f"{mutation.trap}: {mutation.file} has {text.count(mutation.old)} times {mutation.old!r}")
    path.write_text(text.replace(mutation.old, mutation.new))
    status = outcome(folder, mutation.test)
    path.write_text(text)
    return status == 1  # 2 and more: pytest could not run it


def main(traps: list[str]) -> None:
    chosen = [m for m in MUTATIONS if not traps or set(traps) & set(m.trap.split(", "))]
    if not chosen:
        sys.exit(f"no trap of {' '.join(traps)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "copy")
        ignored = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "*_cache")
        shutil.copytree(REPO, folder, ignore=ignored)
        if outcome(folder, *dict.fromkeys(m.test for m in chosen)):
            sys.exit("the tests are red before any edit")
        green = []
        for mutation in chosen:
            red = spring(mutation, folder)
            green += [] if red else [mutation]
            print(f"{'red  ' if red else 'GREEN'} {mutation.trap}: {mutation.right}", flush=True)
    if green:
        sys.exit(f"{len(green)} of {len(chosen)} turn no test red")
    if not traps:
        write_page()
    print(f"all {len(chosen)} turn their test red")


if __name__ == "__main__":
    main(sys.argv[1:])
