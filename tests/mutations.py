"""The traps of these algorithms, each sprung by one edit of the code, and the test that the edit turns red.

python tests/mutations.py           spring all, each in a copy of the repository; then write docs/correctness.md's table
python tests/mutations.py A1 D2     spring some

A trap that is sprung and leaves its test green ends the command with an error.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).parent.parent
PAGE = REPO / "docs" / "correctness.md"
START, END = "<!-- tests/mutations.py writes from here -->\n", "<!-- to here -->\n"


class Mutation(NamedTuple):
    trap: str
    right: str  # how it must be
    file: str
    old: str  # occurs once in the file
    new: str
    test: str


ROLLOUT, EXACT, UPDATE = "test_rollout.py::test_", "test_exact.py::test_", "test_update.py::test_"
COMMON, LOSSES, SCRIPTS = "test_common.py::test_", "test_losses.py::test_", "test_scripts.py::test_"
TRPO, DPO, GRAPE, GOLDEN = "test_trpo.py::test_", "test_dpo.py::test_", "test_grape.py::test_", "test_golden.py::test_"
DISTRIBUTED, ADAPTERS = "test_distributed.py::test_", "test_adapters.py::test_"
TOGETHER = DISTRIBUTED + "two_processes_update_as_one_does"
SELECT, RUNS, ERRORS = "test_rejection_sampling.py::test_", "test_runs.py::test_", "test_errors.py::test_"

MUTATIONS = [
    # tokens, masks, log-probs
    Mutation(
        "0.1, A3",
        "Samples come from the whole softmax: no hidden top-k of 50.",
        "grpo.py",
        "cdf = log_softmax.exp()",
        "cdf = log_softmax.where(log_softmax >= log_softmax.topk(50)[0][:, -1:], -99).exp()",
        ROLLOUT + "sampling_is_the_whole_softmax",
    ),
    Mutation(
        "0.1, A3",
        "Each completion comes as often as its tokens' probabilities say, in a padded batch that rows leave early.",
        "grpo.py",
        "cache.reorder_cache(going.nonzero()[:, 0])",
        "cache.reorder_cache(torch.arange(int(going.sum()), device=token.device))",
        ROLLOUT + "whole_completions_are_sampled_with_their_probabilities",
    ),
    Mutation(
        "0.2",
        "A model in training mode with gradient checkpointing, which has no KV cache, is not sampled from.",
        "grpo.py",
        "cache, logits, mask = output.past_key_values, ",
        "cache = output.past_key_values or __import__('types').SimpleNamespace(reorder_cache=lambda rows: None)\n"
        "            logits, mask = ",
        ROLLOUT + "gradient_checkpointing_cannot_corrupt_a_rollout",
    ),
    Mutation(
        "0.3",
        "Parameters are float32 whatever the checkpoint's are.",
        "common.py",
        "from_pretrained(path, dtype=torch.float32, use_safetensors=True)",
        "from_pretrained(path, use_safetensors=True)",
        COMMON + "load_model_settles_dtype_dropout_stops_and_padded_vocabulary",
    ),
    Mutation(
        "0.4",
        "Under bfloat16 forward passes a step of 1e-6 still moves the weights.",
        "common.py",
        "return model.to(device), tokenizer",
        "return model.to(device, torch.bfloat16), tokenizer",
        SCRIPTS + "bfloat16_forward_passes_leave_float32_parameters_that_small_steps_move",
    ),
    Mutation(
        "0.5",
        "TRPO differentiates twice, which fused attention cannot.",
        "trpo.py",
        "with sdpa_kernel(SDPBackend.MATH):  # fused",
        "with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # fused",
        TRPO + "fisher_vector_product_is_the_explicit_fisher_times_the_vector",
    ),
    Mutation(
        "0.6",
        "A prompt is a list of ids, not a BatchEncoding.",
        "common.py",
        "add_special_tokens=not tokenizer.chat_template).input_ids",
        "add_special_tokens=not tokenizer.chat_template)",
        COMMON + "chat_template",
    ),
    Mutation(
        "A1",
        "The logits at position t predict token t + 1.",
        "grpo.py",
        "hidden[kept[:, :width]], completion_ids[kept]",
        "hidden.roll(-1, 1)[kept[:, :width]], completion_ids[kept]",
        ROLLOUT + "logprobs_do_not_depend_on_padding",
    ),
    Mutation(
        "A2",
        "The temperature divides the logits of the sampler,",
        "grpo.py",
        "logits.float() / (temperature or 1.0)",
        "logits.float()",
        ROLLOUT + "whole_completions_are_sampled_with_their_probabilities",
    ),
    Mutation(
        "A2",
        "of the update,",
        "reinforce.py",
        "token_logprobs(model, *inputs, temperature=args.temperature)",
        "token_logprobs(model, *inputs)",
        UPDATE + "reinforce",
    ),
    Mutation(
        "A2",
        "of the old policy,",
        "grpo.py",
        "if on_policy else batch_logprobs(model, batch, args)",
        "if on_policy else batch_logprobs(model, batch, replace(args, temperature=1.0))",
        UPDATE + "grpo",
    ),
    Mutation(
        "A2",
        "and of the reference.",
        "ppo.py",
        "batch_logprobs(ref_model, batch, args) if args.beta",
        'batch_logprobs(ref_model, batch, Args(**vars(args) | {"temperature": 1.0})) if args.beta',
        UPDATE + "ppo",
    ),
    Mutation(
        "A4",
        "Log-softmax is of float32 logits.",
        "grpo.py",
        "(common.logits_of(model, hidden).float() / temperature).log_softmax(-1)",
        "(common.logits_of(model, hidden) / temperature).log_softmax(-1).float()",
        ROLLOUT + "log_softmax_is_of_float32_logits",
    ),
    Mutation(
        "A5, D9",
        "Old log-probs are the training forward's, so the first ratio is 1 even if the sampler's differ.",
        "grpo.py",
        "None if on_policy else batch_logprobs(model, batch, args)",
        "sampled_logprobs",
        SCRIPTS + "ratio_is_1_on_the_first_minibatch[grpo]",
    ),
    Mutation(
        "A6",
        "Absolute positions do not count the padding, in training",
        "grpo.py",
        "position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)",
        "position_ids = None",
        ROLLOUT + "logprobs_do_not_depend_on_padding",
    ),
    Mutation(
        "A6",
        "and in sampling.",
        "grpo.py",
        "position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, -token.shape[1] :]",
        "position_ids = (mask.cumsum(1) - 1).clamp(min=0) if t == 0 else torch.full_like(token, mask.shape[1] - 1)",
        ROLLOUT + "greedy_is_generates_greedy",
    ),
    Mutation(
        "A6",
        "A prompt that several rows share gets the gradient of all of them,",
        "grpo.py",
        "    cache.reorder_cache(row_of)\n",
        "    cache.reorder_cache(row_of)\n    for layer in cache.layers:\n        layer.keys = layer.keys.detach()\n",
        ROLLOUT + "equal_prompts_are_computed_once_and_get_their_gradient",
    ),
    Mutation(
        "A6",
        "and its rows their own.",
        "grpo.py",
        "    cache.reorder_cache(row_of)\n",
        "    cache.reorder_cache(row_of.sort().values)\n",
        ROLLOUT + "equal_prompts_are_computed_once_and_get_their_gradient",
    ),
    Mutation(
        "A7",
        "Where pad is EOS, the stop token is still a target",
        "common.py",
        "[torch.ones_like(i) for i in ids]",
        "[(i != 0).long() for i in ids]",
        UPDATE + "sft",
    ),
    Mutation(
        "A7",
        "and a sampled one counts.",
        "grpo.py",
        "return completion_ids[:, : t + 1], completion_mask[:, : t + 1], ",
        "return completion_ids[:, : t + 1], (completion_ids != 0).float()[:, : t + 1], ",
        ROLLOUT + "every_stop_id_ends_a_row_and_is_counted",
    ),
    Mutation(
        "A8",
        "Every stop id ends a completion,",
        "grpo.py",
        "torch.tensor(model.generation_config.eos_token_id, device=prompt_ids.device)",
        "torch.tensor(model.generation_config.eos_token_id[:1], device=prompt_ids.device)",
        ROLLOUT + "every_stop_id_ends_a_row_and_is_counted",
    ),
    Mutation(
        "A8",
        "none of which makes it truncated,",
        "grpo.py",
        "truncated[alive] = 1.0, going",
        "truncated[alive] = 1.0, token[:, 0] != stop_ids[0]",
        UPDATE + "grpo",
    ),
    Mutation(
        "A8",
        "and the tokenizer's is among them.",
        "common.py",
        ", tokenizer.eos_token_id} - {None}",
        "} - {None}",
        COMMON + "load_model_settles_dtype_dropout_stops_and_padded_vocabulary",
    ),
    Mutation(
        "A9",
        "The update is of the sampled ids, not of their text tokenised again.",
        "reinforce.py",
        "        rewards, components = score(",
        "        ids = [(tokenizer(text).input_ids + [0] * 9)[: completion_ids.shape[1]] for text in texts]\n"
        "        completion_ids, _ = common.pad(ids, 'right', device)\n"
        "        rewards, components = score(",
        UPDATE + "reinforce",
    ),
    Mutation(
        "A10",
        "Rows of a padded vocabulary that no token owns are neither sampled nor scored.",
        "common.py",
        "logits[..., :vocab_size])",
        "logits)",
        COMMON + "load_model_settles_dtype_dropout_stops_and_padded_vocabulary",
    ),
    Mutation(
        "A11",
        "A template that writes BOS gets no second one, before a prompt",
        "common.py",
        "add_special_tokens=not tokenizer.chat_template",
        "add_special_tokens=True",
        COMMON + "a_template_that_writes_bos_gets_no_second_one",
    ),
    Mutation(
        "A11",
        "nor before a completion.",
        "common.py",
        "tokenizer(text[len(start) :], add_special_tokens=False)",
        "tokenizer(text[len(start) :])",
        COMMON + "a_template_that_writes_bos_gets_no_second_one",
    ),
    Mutation(
        "A12",
        "There is no dropout: the model stays in eval mode.",
        "common.py",
        "return model.to(device), tokenizer",
        "return model.train().to(device), tokenizer",
        COMMON + "load_model_settles_dtype_dropout_stops_and_padded_vocabulary",
    ),
    Mutation(
        "A13, B4",
        "A micro-batch's sum is divided by what the whole batch has: tokens",
        "sft.py",
        "sft_loss(logprobs, mask, normalizer=tokens)",
        "sft_loss(logprobs, mask, normalizer=mask.sum())",
        UPDATE + "sft",
    ),
    Mutation(
        "A13",
        "or completions;",
        "grpo.py",
        "mask, normalizer=normalizer, **loss_settings)",
        "mask, normalizer=len(micro), **loss_settings)",
        UPDATE + "grpo",
    ),
    Mutation(
        "A13, D7",
        "and whitening is over the whole rollout.",
        "ppo.py",
        "policy_loss(logprobs, old, advantages[micro], mask, **clip)",
        "policy_loss(logprobs, old, whiten(advantages[micro], mask), mask, **clip)",
        UPDATE + "ppo",
    ),
    Mutation(
        "A14",
        "Logged means are over completion tokens, not padding.",
        "grpo.py",
        '"policy/entropy": -sampled_logprobs[scored]',
        '"policy/entropy": -sampled_logprobs',
        UPDATE + "grpo",
    ),
    Mutation(
        "A14",
        "The norm of gradients is the mean over the updates made, without one that --target-kl stopped.",
        "ppo.py",
        '(updates if name == "grad_norm" else measured)',
        "measured",
        SCRIPTS + "ppo_stops_a_rollouts_updates_at_target_kl",
    ),
    Mutation(
        "A15",
        "One seed gives one result,",
        "common.py",
        "(self.args.seed * 1_000_003 + step",
        "(time.time_ns() + step",
        SCRIPTS + "same_seed_same_weights_however_often_it_is_evaluated[grpo]",
    ),
    Mutation(
        "A15",
        "adapters start with it, too,",
        "common.py",
        "        transformers.set_seed(args.seed % 2**32)\n",
        "",
        ADAPTERS + "a_resumed_run_with_adapters_is_the_uninterrupted_one[sft]",
    ),
    Mutation(
        "A15",
        "and the order of the data is its own.",
        "common.py",
        "torch.randperm(len(rows), generator=generator)",
        "torch.randperm(len(rows))",
        COMMON + "batches_visit_every_row_once_an_epoch",
    ),
    Mutation(
        "A16",
        "Evaluation is greedy: no seed changes it.",
        "grpo.py",
        '"temperature": 0.0}',
        '"temperature": 1.0}',
        SCRIPTS + "same_seed_same_weights_however_often_it_is_evaluated[grpo]",
    ),
    # SFT, rejection sampling
    Mutation(
        "B1",
        "A prompt ends with the template's opening of the answer.",
        "common.py",
        "add_generation_prompt=answer is None",
        "add_generation_prompt=False",
        COMMON + "chat_template",
    ),
    Mutation(
        "B1",
        "The prompt's ids are a prefix: completion and prompt never merge into one token.",
        "common.py",
        "ids = tokenizer(text[len(start) :], add_special_tokens=False).input_ids",
        "ids = tokenizer(text, add_special_tokens=False).input_ids[len(prompt_tokens(tokenizer, prompt)) :]",
        COMMON + "a_completion_is_tokenised_apart_from_its_prompt",
    ),
    Mutation(
        "B2",
        "The stop token is the last target,",
        "common.py",
        "return ids[: stops[-1] + 1] if stops else [*ids, tokenizer.eos_token_id]",
        "return ids[: stops[-1]] if stops else ids",
        GOLDEN + "sft_from_text_to_gradient",
    ),
    Mutation(
        "B2",
        "and no row that is too long is cut off and trained on.",
        "sft.py",
        "examples += [(prompt, completion)] if len(prompt + completion) <= longest else []",
        "examples += [(prompt, completion[: max(1, longest - len(prompt))])]",
        SCRIPTS + "sft_drops_rows_that_are_too_long_and_fakes_no_stop_token",
    ),
    Mutation(
        "B4",
        "The loss is per token of the batch, not per row.",
        "sft.py",
        "return -(logprobs * completion_mask).sum() / normalizer",
        "return -((logprobs * completion_mask).sum(1) / completion_mask.sum(1)).mean()",
        LOSSES + "sft_loss_is_cross_entropy_of_the_completions",
    ),
    Mutation(
        "B5",
        "Ties fall to chance, not to the first sample;",
        "rejection_sampling.py",
        "order = torch.randperm(len(rewards), generator=generator)",
        "order = torch.arange(len(rewards))",
        SELECT + "ties_fall_to_each_alike_and_by_seed",
    ),
    Mutation(
        "B5",
        "one text of a prompt is kept once;",
        "rejection_sampling.py",
        "(prompt, texts[index])",
        "(prompt, index)",
        SELECT + "each_strategy_by_hand",
    ),
    Mutation(
        "B5",
        "the best of failures is a failure.",
        "rejection_sampling.py",
        'rewards[index] > threshold if strategy != "random"',
        'not rewards[index].isnan() if strategy != "random"',
        EXACT + "best_of_n_over_all_groups",
    ),
    # REINFORCE, GRPO
    Mutation(
        "C1",
        "Leave-one-out leaves one out;",
        "reinforce.py",
        "b = (total - groups) / (count - 1)",
        "b = total / count",
        EXACT + "reinforce_in_expectation_over_all_groups",
    ),
    Mutation(
        "C1",
        "a prompt's samples are adjacent.",
        "reinforce.py",
        "(x.repeat_interleave(G, 0) for x in (prompt_ids, prompt_mask))",
        "(x.repeat(G, 1) for x in (prompt_ids, prompt_mask))",
        UPDATE + "reinforce",
    ),
    Mutation(
        "C2",
        "REINFORCE sums over tokens: no division by the length.",
        "reinforce.py",
        "(advantages[:, None] * logprobs * completion_mask).sum()",
        "(advantages[:, None] * logprobs * completion_mask).div(completion_mask.sum(1)[:, None]).sum()",
        EXACT + "reinforce_in_expectation_over_all_groups",
    ),
    Mutation(
        "C3",
        "The standard deviation has one degree of freedom less,",
        "grpo.py",
        "(count - 1).clamp(min=1)",
        "count",
        GOLDEN + "grpo_advantages",
    ),
    Mutation(
        "C3",
        "and never divides the rounding of a tied group.",
        "grpo.py",
        "return (centred * spread).view(-1)",
        "return centred.view(-1)",
        LOSSES + "grpo_advantages",
    ),
    Mutation(
        "C4",
        "Dr. GRPO divides by a constant, not by the padded width.",
        "grpo.py",
        "completions * max_new_tokens",
        "completions * completion_mask.shape[1]",
        GOLDEN + "grpo_losses",
    ),
    Mutation(
        "C4",
        "and so is exact where division by the length is not.",
        "grpo.py",
        'if loss_type in ("grpo", "gspo"):',
        'if loss_type in ("grpo", "gspo", "dr_grpo"):',
        EXACT + "dr_grpo_is_the_policy_gradient_and_grpo_is_not",
    ),
    Mutation(
        "C5",
        "Tied groups count in denominators, and their KL acts.",
        "grpo.py",
        "loss_normalizer(completion_mask[minibatch], args",
        "loss_normalizer(completion_mask[minibatch] * (advantages[minibatch] != 0)[:, None], args",
        UPDATE + "grpo",
    ),
    Mutation(
        "C6",
        "A truncated completion is trained on by its reward, as it is.",
        "grpo.py",
        "completion_mask[rewards.isnan()] = 0.0",
        "completion_mask[rewards.isnan() | truncated] = 0.0",
        UPDATE + "grpo",
    ),
    Mutation(
        "C7",
        "Where the ratio is 1 the gradient is still there.",
        "grpo.py",
        "old, ref = logprobs.detach() if on_policy",
        "old, ref = logprobs if on_policy",
        UPDATE + "grpo",
    ),
    Mutation(
        "C8",
        "Old log-probs stay those of the rollout over all its updates.",
        "ppo.py",
        "policy_loss(logprobs, old, advantages[micro], mask, **clip)",
        "policy_loss(logprobs, logprobs.detach(), advantages[micro], mask, **clip)",
        UPDATE + "ppo",
    ),
    Mutation(
        "C9",
        "k3 and k2 have the value and the gradient that are claimed,",
        "grpo.py",
        'if kl_estimator == "k3" else log_ref_ratio.square() / 2',
        'if kl_estimator == "k2" else log_ref_ratio.square() / 2',
        EXACT + "kl_estimators_in_the_loss",
    ),
    Mutation(
        "C9",
        "and k1 is taken off the rewards, not added.",
        "reinforce.py",
        "rewards - args.beta * kl.sum(1)",
        "rewards + args.beta * kl.sum(1)",
        UPDATE + "reinforce",
    ),
    Mutation(
        "C10",
        "k3's ratio is pi_ref / pi.",
        "grpo.py",
        "log_ref_ratio = ref_logprobs - logprobs",
        "log_ref_ratio = logprobs - ref_logprobs",
        EXACT + "kl_estimators_in_the_loss",
    ),
    Mutation(
        "C11",
        "The KL counts once: in the loss and not in the reward too.",
        "grpo.py",
        "compute_advantages(rewards - overlong,",
        "compute_advantages(rewards - overlong - args.beta * kl.sum(1),",
        UPDATE + "grpo",
    ),
    Mutation(
        "C12",
        "What could not be scored takes no part: it is no reward of 0.",
        "reinforce.py",
        "rewards = rewards.to(device)  #",
        "rewards = rewards.nan_to_num().to(device)  #",
        UPDATE + "reinforce",
    ),
    Mutation(
        "C13",
        "GSPO's clip is its own, a thousandth of the others'.",
        "grpo.py",
        '"clip_low": 3e-4, "clip_high": 4e-4',
        '"clip_low": 0.2, "clip_high": 0.2',
        SCRIPTS + "settings_are_those_of_the_papers",
    ),
    # PPO
    Mutation(
        "D1",
        "The score is on the stop token, not one slot after it.",
        "ppo.py",
        "scatter_add_(1, lengths.long()[:, None] - 1,",
        "scatter_add_(1, lengths.long()[:, None].clamp(max=kl.shape[1] - 1),",
        UPDATE + "ppo",
    ),
    Mutation(
        "D2",
        "What was cut off goes on: its last value stands for the rest.",
        "ppo.py",
        "values[:, -1] * truncated  #",
        "values[:, -1] * 0  #",
        UPDATE + "ppo",
    ),
    Mutation(
        "D3",
        "Values on padding reach no advantage.",
        "ppo.py",
        "next_value = torch.where(inside, values[:, t], next_value)",
        "next_value = values[:, t]",
        LOSSES + "gae_by_hand",
    ),
    Mutation(
        "D3",
        "GAE's recursion is exact for each lambda.",
        "ppo.py",
        "delta = token_rewards[:, t] + gamma * next_value - values[:, t]",
        "delta = token_rewards[:, t] + gamma * next_value",
        EXACT + "ppos_first_update_is_the_policy_gradient",
    ),
    Mutation(
        "D4",
        "Each token pays for its own KL.",
        "ppo.py",
        "token_rewards = -args.beta * kl\n",
        "token_rewards = -args.beta * kl.sum(1, keepdim=True) * completion_mask\n",
        UPDATE + "ppo",
    ),
    Mutation(
        "D5",
        "V_t is of the state in which token t is sampled.",
        "ppo.py",
        "return self.head(hidden)[..., 0]",
        "return self.head(hidden.roll(-1, 1))[..., 0]",
        LOSSES + "values_are_of_the_state_that_a_token_is_sampled_in",
    ),
    Mutation(
        "D6",
        "The value head starts at 0,",
        "ppo.py",
        "torch.nn.init.zeros_(parameter)",
        "torch.nn.init.ones_(parameter)",
        SCRIPTS + "ppos_value_model_starts_at_0_and_shares_nothing_with_the_policy",
    ),
    Mutation(
        "D6",
        "on a trunk of its own.",
        "ppo.py",
        "ValueModel(common.load_model(args.model, device, train=args, sharded=False)[0])",
        "ValueModel(model)",
        SCRIPTS + "ppos_value_model_starts_at_0_and_shares_nothing_with_the_policy",
    ),
    Mutation(
        "D7",
        "Returns are of the advantages before whitening.",
        "ppo.py",
        "        advantages = whiten(advantages, completion_mask)\n",
        "        advantages = whiten(advantages, completion_mask)\n        returns = advantages + old_values\n",
        UPDATE + "ppo",
    ),
    Mutation(
        "D8",
        "The value loss is the worse of the two,",
        "ppo.py",
        "torch.max((values - returns).square()",
        "torch.min((values - returns).square()",
        GOLDEN + "ppo",
    ),
    Mutation(
        "D8",
        "clipped around the rollout's values.",
        "ppo.py",
        "value_loss(values, old_values[micro],",
        "value_loss(values, values.detach(),",
        UPDATE + "ppo",
    ),
    Mutation(
        "D9",
        "An infinite ratio is no NaN.",
        "ppo.py",
        "(logprobs - old_logprobs).clamp(-20, 20).exp()",
        "(logprobs - old_logprobs).exp()",
        LOSSES + "a_ratio_out_of_all_bounds_stays_finite",
    ),
    # TRPO
    Mutation(
        "D10",
        "The Fisher matrix is that of the whole vocabulary.",
        "trpo.py",
        "jvp = log_softmax.detach().exp() * jvp * weight[..., None]",
        "jvp = jvp * weight[..., None]",
        EXACT + "fisher_vector_product_over_all_completions",
    ),
    Mutation(
        "D10",
        "The KL of the search is KL(old || new).",
        "trpo.py",
        "kl += ((old.exp() * (old - new)).sum(-1)",
        "kl += ((new.exp() * (new - old)).sum(-1)",
        EXACT + "the_searchs_surrogate_and_kl_are_exact",
    ),
    Mutation(
        "D11",
        "Conjugate gradient solves the damped system,",
        "trpo.py",
        "conjugate_gradient(partial(fvp, damping=args.damping), gradient",
        "conjugate_gradient(fvp, gradient",
        UPDATE + "trpo",
    ),
    Mutation(
        "D11",
        "in float32 at least, and stops where there is no curvature.",
        "trpo.py",
        "if curvature <= 0:",
        "if curvature != curvature:",
        TRPO + "conjugate_gradient_solves",
    ),
    Mutation(
        "D12",
        "The step is as long as the bound allows,",
        "trpo.py",
        "(2 * max_kl / (x @ fvp(x))).sqrt()",
        "(max_kl / (x @ fvp(x))).sqrt()",
        TRPO + "a_small_step_has_the_kl_that_is_predicted",
    ),
    Mutation(
        "D12",
        "never passes it,",
        "trpo.py",
        "if surrogate > surrogate_before and kl <= max_kl:",
        "if surrogate > surrogate_before:",
        TRPO + "line_search",
    ),
    Mutation(
        "D12",
        "of which float32 tells a KL of 1e-8 too,",
        "trpo.py",
        "old, new = (x.to(dtype).log_softmax(-1) for x in (old, new))",
        "pass",
        TRPO + "a_kl_of_1e_8_can_be_measured_with_a_model_in_float32",
    ),
    Mutation(
        "D12",
        "and a failed search restores the parameters.",
        "trpo.py",
        "        parameter.copy_(old_parameter)\n",
        "        pass\n",
        TRPO + "line_search",
    ),
    # DPO
    Mutation(
        "E1",
        "Sums of log-probs; means for IPO and SimPO.",
        "dpo.py",
        'if loss_type in ("ipo", "simpo") else total',
        'if loss_type in ("ipo", "simpo", "sigmoid") else total',
        GOLDEN + "dpo_losses",
    ),
    Mutation(
        "E1",
        "Minimised, it is the policy ref exp(r / beta).",
        "dpo.py",
        "right, wrong = F.logsigmoid(beta * (h_w - h_l)),",
        "right, wrong = F.logsigmoid(h_w - h_l),",
        EXACT + "dpos_minimiser_is_the_closed_form",
    ),
    Mutation(
        "E2",
        "At the reference the loss is log 2.",
        "dpo.py",
        "(rejected_logps - ref_rejected_logps).float()",
        "(rejected_logps - ref_chosen_logps).float()",
        DPO + "loss_at_the_reference",
    ),
    Mutation(
        "E3",
        "Pairs that are equal once cut off are dropped.",
        "dpo.py",
        "if chosen and rejected and chosen != rejected else []",
        "if chosen and rejected else []",
        DPO + "pairs_without_a_difference_are_dropped_and_counted",
    ),
    Mutation(
        "E4",
        "The reference is the starting model,",
        "dpo.py",
        'model if args.reference == "kept" else common.load_reference(args, model, device)',
        "model",
        UPDATE + "dpo",
    ),
    Mutation(
        "E4",
        "and what is kept of it is kept by row.",
        "dpo.py",
        "list(enumerate(tokenize(model, tokenizer, train_rows, args)))",
        "[(0, pair) for pair in tokenize(model, tokenizer, train_rows, args)]",
        UPDATE + "dpo",
    ),
    Mutation(
        "E5",
        "Chosen and rejected log-probs are logged apart: both may fall while the margin grows.",
        "dpo.py",
        '"logps/rejected": logps[:, 1]',
        '"logps/rejected": logps[:, 0]',
        UPDATE + "dpo",
    ),
    Mutation(
        "E6",
        "Label smoothing does what it says or is refused.",
        "dpo.py",
        'or (label_smoothing and loss_type not in ("sigmoid", "robust"))',
        "",
        DPO + "label_smoothing_where_it_is_not_defined_is_refused",
    ),
    # GRAPE
    Mutation(
        "GRAPE",
        "An item weighs by its mean confidence, which no completion can lower for itself.",
        "grape.py",
        "c = (known / count.clamp(min=1)).repeat_interleave(samples_per_prompt, 0)",
        "c = confidences",
        GRAPE + "invariants",
    ),
    Mutation(
        "GRAPE",
        "No confidence at all is reward 0, not NaN.",
        "grape.py",
        "shares.sum(1, keepdim=True).clamp(min=1e-12)",
        "shares.sum(1, keepdim=True)",
        GRAPE + "invariants",
    ),
    Mutation(
        "GRAPE",
        "One item of confidence 1 is GRPO to the last bit.",
        "grape.py",
        "return (shares * scores.float().nan_to_num()).sum(1)",
        "return (shares * scores.float().nan_to_num()).sum(1).mul(0.9)",
        GRAPE + "one_item_of_confidence_1_is_grpo_to_the_last_bit",
    ),
    Mutation(
        "GRAPE, C12",
        "A critic that answers neither yes nor no has not scored.",
        "grape.py",
        'answers.append(answer.where(p_yes + p_no >= 0.01, float("nan")))',
        "answers.append(answer)",
        GRAPE + "critic_is_read_by_its_yes_and_no",
    ),
    # runs that stop, go on, or must not
    Mutation(
        "R1",
        "A resumed run has its optimizer's state,",
        "common.py",
        'if "moments" in state:',
        "if False:",
        RUNS + "a_resumed_run_is_the_uninterrupted_one_to_the_last_bit[grpo]",
    ),
    Mutation(
        "R1",
        "its value model,",
        "ppo.py",
        "run.start(model=(model, optimizer), value_model=(value_model, value_optimizer))",
        "run.start(model=(model, optimizer))",
        RUNS + "a_resumed_run_is_the_uninterrupted_one_to_the_last_bit[ppo]",
    ),
    Mutation(
        "R1",
        "each step's own seed,",
        "common.py",
        "                transformers.set_seed((self.args.seed * 1_000_003 + step * 8191 + RANK) % 2**32)\n",
        "",
        RUNS + "a_resumed_run_is_the_uninterrupted_one_to_the_last_bit[reinforce]",
    ),
    Mutation(
        "R1",
        "which Python's and numpy's generators get, too, as a reward may draw from them;",
        "common.py",
        "transformers.set_seed((self.args",
        "torch.manual_seed((self.args",
        RUNS + "a_reward_that_draws_random_numbers_draws_on_after_a_resume",
    ),
    Mutation(
        "R1",
        "a step that was done twice is in metrics.jsonl once;",
        "common.py",
        'state["sizes"][name] if state else 0',
        "file.stat().st_size if state else 0",
        RUNS + "a_resumed_run_is_the_uninterrupted_one_to_the_last_bit[sft]",
    ),
    Mutation(
        "R1",
        "a run that was killed before its first checkpoint begins again;",
        "common.py",
        'state["sizes"][name] if state else 0',
        'state["sizes"][name] if state else file.stat().st_size',
        RUNS + "a_run_that_was_killed_before_its_first_checkpoint_begins_again",
    ),
    Mutation(
        "R2",
        "A kill during a save leaves the last good checkpoint.",
        "common.py",
        'new = self.checkpoint.with_suffix(".new")',
        "new = self.checkpoint",
        RUNS + "a_kill_during_a_save_leaves_the_last_good_checkpoint[torch.save]",
    ),
    Mutation(
        "R3",
        "Ctrl-C and SIGTERM save.",
        "common.py",
        "if not stopping and (every == 0 or step % every):",
        "if every == 0 or step % every:",
        RUNS + "sigterm_saves_like_ctrl_c_and_a_second_one_ends_at_once",
    ),
    Mutation(
        "R4",
        "Gradients that are not finite never reach the weights.",
        "dpo.py",
        "run.check_finite(step, norm)",
        "float(norm)",
        ERRORS + "gradients_that_are_not_finite_stop_the_run_before_the_weights[dpo]",
    ),
    Mutation(
        "R5",
        "A reward that is NaN is an error, not a missing score.",
        "common.py",
        "finite = value is None or math.isfinite(value)",
        "finite = value is None or not math.isinf(value)",
        ERRORS + "rewards_that_return_nonsense",
    ),
    # several processes
    Mutation(
        "P1",
        "A loss is divided by the count over all processes, where their rows are of unlike lengths,",
        "sft.py",
        "tokens = common.total(completion_mask.sum())",
        "tokens = completion_mask.sum()",
        TOGETHER + "[sft]",
    ),
    Mutation(
        "P1",
        "whatever the loss type,",
        "grpo.py",
        "normalizer = common.total(normalizer).clamp(min=1)",
        "normalizer = normalizer.clamp(min=1)",
        TOGETHER + "[grpo-dapo]",
    ),
    Mutation(
        "P1",
        "and statistics are of all processes' tokens.",
        "ppo.py",
        "mean = common.total((advantages * completion_mask).sum()) / tokens",
        "mean = (advantages * completion_mask).sum() / tokens",
        TOGETHER + "[ppo]",
    ),
    Mutation(
        "P2",
        "Each process has its own share of the prompts.",
        "common.py",
        "return rows[len(rows) * RANK // WORLD_SIZE : len(rows) * (RANK + 1) // WORLD_SIZE]",
        "return rows[: len(rows) // WORLD_SIZE]",
        TOGETHER + "[reinforce]",
    ),
    Mutation(
        "P3",
        "TRPO's replicas take one step: the Fisher matrix is of all processes' tokens,",
        "trpo.py",
        "return common.total(product) + damping * vector",
        "return product + damping * vector",
        TOGETHER + "[trpo]",
    ),
    Mutation(
        "P3",
        "and so is the line search.",
        "trpo.py",
        "return common.total(surrogate), common.total(kl)",
        "return surrogate, kl",
        TOGETHER + "[trpo]",
    ),
    Mutation(
        "P4",
        "A process that kept fewer completions runs the same passes, on rows without weight.",
        "rejection_sampling.py",
        "completion_mask[micro] * (micro >= 0)[:, None]",
        "completion_mask[micro]",
        TOGETHER + "[rejection_sampling]",
    ),
    Mutation(
        "P5",
        "Log-probs that were kept by one process reach the others, whose rows they are in the next epoch.",
        "dpo.py",
        "return common.total(table, torch.distributed.ReduceOp.MAX)",
        "return table",
        TOGETHER + "[dpo]",
    ),
    Mutation(
        "P5",
        "A row that two processes came to counts once.",
        "dpo.py",
        "return common.total(table, torch.distributed.ReduceOp.MAX)",
        "return common.total(table.where(table.isfinite(), 0.0))",
        TOGETHER + "[dpo]",
    ),
    Mutation(
        "P5",
        "A resumed run of several processes loads its checkpoint after the reference's log-probs were computed.",
        "common.py",
        "    model.state_dict()  # FSDP then shards again what a forward pass left gathered\n",
        "",
        DISTRIBUTED + "a_killed_run_goes_on_with_as_many_processes_or_others[2-2]",
    ),
    Mutation(
        "P6",
        "A batch's confidences are of all processes.",
        "grape.py",
        "common.total(known.sum(0)) / common.total(scored.sum(0))",
        "known.sum(0) / scored.sum(0)",
        TOGETHER + "[grape-batch]",
    ),
    Mutation(
        "P7",
        "An accuracy is over all held-out prompts, of which processes may have unlike numbers.",
        "common.py",
        "for x in (sums, counts))",
        "for x in ([s / c for s, c in zip(sums, counts)], [1.0] * len(sums)))",
        TOGETHER + "[sft]",
    ),
    Mutation(
        "P8",
        "Each process draws its own random numbers,",
        "common.py",
        "+ step * 8191 + RANK)",
        "+ step * 8191)",
        DISTRIBUTED + "the_readmes_command_writes_and_says_everything_once",
    ),
    Mutation(
        "P8",
        "and goes on with them after a resume.",
        "common.py",
        "+ step * 8191 + RANK)",
        "+ step * 8191 + RANK * (self.done == 0))",
        DISTRIBUTED + "each_process_goes_on_with_its_own_random_numbers",
    ),
    Mutation(
        "P9",
        "Tied weights are saved once.",
        "common.py",
        " if name not in tied}",
        "}",
        TOGETHER + "[sft]",
    ),
    # adapters, gradient checkpointing
    Mutation(
        "L1",
        "The reference is the model without its adapters.",
        "common.py",
        "layer._disable_adapters = True",
        "layer._disable_adapters = False",
        ADAPTERS + "the_reference_is_the_start_though_the_adapters_were_trained[grpo]",
    ),
    Mutation(
        "L2",
        "A checkpoint holds no frozen weights.",
        "common.py",
        "ignore_frozen_params=True",
        "ignore_frozen_params=False",
        ADAPTERS + "lora_trains_adapters_only_and_saves_them_as_peft_does[sft]",
    ),
    Mutation(
        "0.2, L3",
        "Where gradients are checkpointed the model is in eval mode, too, in which a rollout keeps its cache;",
        "common.py",
        "model.base_model.recomputes = True",
        "model.train().base_model.recomputes = True",
        ADAPTERS + "gradient_checkpointing_computes_layers_twice_in_updates_and_never_in_train_mode[True]",
    ),
    Mutation(
        "L3",
        "an update shares no prompt's cache, which layers that run twice would write twice.",
        "grpo.py",
        "alone or not common.shares_prompts(model.base_model)",
        "alone",
        ADAPTERS + "gradient_checkpointing_changes_no_figure[grpo-0]",
    ),
]


# where each was met: issues of other projects, or papers
MET = {
    "0.1": "trl#5783, verl#7270",
    "0.2": "transformers#36051, trl#3683",
    "0.3": "transformers#42805",
    "0.4": "NeMo-RL#2322",
    "0.5": "pytorch#116350",
    "0.6": "transformers#41626, trl#4880",
    "A1": "trl#3681",
    "A2": "trl#3029, NeMo-RL#935",
    "A4": "transformers#31267, genlm-backend#66",
    "A5": "trl#3867, verl#2953",
    "A6": "trl#6800, OpenRLHF#217",
    "A7": "trl#1623, trl#3091",
    "A8": "trl#7039, trl#1553",
    "A9": "SkyRL#123",
    "A10": "vllm#13175",
    "A11": "transformers#31796, open-r1#462",
    "A12": "arXiv 2403.17031, trl#3234",
    "A13": "transformers#34191, verl#906",
    "A14": "rlhf-book#216",
    "A15": "trl#7083",
    "B1": "trl#4147, trl#2209",
    "B2": "trl#3091, trl#4698",
    "B5": "rlhf-book#373",
    "C1": "arXiv 2402.14740",
    "C2": "arXiv 2503.20783",
    "C3": "NeMo-RL#4161",
    "C4": "trl#3256, verl#3741",
    "C5": "trl#7068, trl#6365",
    "C6": "trl#6369",
    "C7": "trl#2703, open-r1#239",
    "C8": "trl#3757",
    "C9": "arXiv 2512.21852",
    "C10": "ToolRL#52, RAGEN#58",
    "C11": "OpenRLHF#768",
    "C12": "trl#5902",
    "C13": "arXiv 2507.18071",
    "D1": "trl#3750",
    "D2": "miles#1827",
    "D3": "ROLL#447",
    "D4": "trl#11",
    "D6": "trlx#203, trl#1063",
    "D8": "trl#202",
    "D9": "NeMo-Aligner#68",
    "D10": "arXiv 1502.05477",
    "D11": "sb3-contrib#38",
    "D12": "tianshou#1287, modular_rl#7",
    "E1": "open-instruct#483, trl#1265",
    "E2": "ETO#14",
    "E3": "rlhf-book#503",
    "E4": "trl#2423, trl#5542",
    "E5": "trl#800",
    "E6": "trl#1035",
    "R1": "trl#2657, OpenRLHF#1103",
}


def table() -> str:
    """The table of docs/correctness.md."""

    def code(text: str) -> str:
        text = " ".join(text.split()).replace("|", "\\|")
        return f"`{text}`" if text else "nothing"

    rows = ["| trap | how it must be | the edit that springs it | red then |", "|---|---|---|---|"]
    met = dict(MET)
    for m in MUTATIONS:
        sources = "; ".join(met.pop(trap) for trap in m.trap.split(", ") if trap in met)
        edit = f"{m.file}: {code(m.old)} becomes {code(m.new)}"
        file, _, test = m.test.partition("::")
        right = f"{m.right} ({sources})" if sources else m.right
        rows.append(f"| {m.trap} | {right} | {edit} | {test} in {file} |")
    return "\n".join(rows) + "\n"


def write_page() -> None:
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text(before + START + table() + END + rest.partition(END)[2])


def outcome(folder: Path, *tests: str) -> int:
    """pytest's exit status for these tests in a copy of the repository."""
    paths = [f"tests/{test}" for test in tests]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *paths]
    return subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode


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
