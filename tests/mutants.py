"""Do our tests notice? Each mutant breaks one line of the library the way people do; the tests named beside it must fail.

    python tests/mutants.py                    # all of them, about five minutes; exits 1 if any survives; recorded in tests/proofs.json
    python tests/mutants.py --only gae         # those whose name holds `gae`
    python tests/mutants.py --jobs 2

A mutant is (where, what it does, old snippet, new snippet); the snippet must occur once in that function or class.
Each runs in a fork of one warm process, on a copy of the package in a temporary folder; the sources are never touched."""
import argparse
import ast
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "vlmrlhf_course"
LIMIT = 300   # seconds by the clock; a mutant that hangs is noticed, too


class Mutant(NamedTuple):
    where: str    # module.function or module.class.method
    what: str
    old: str
    new: str
    tests: str    # arguments of pytest

    @property
    def name(self): return f"{self.where}: {self.what}"


def of(where, tests, *changes): return [Mutant(where, *change, tests) for change in changes]


MATHS, MODEL, PROPERTIES, HAND, PACKING = (f"test_{name}.py -k " for name in ("maths", "model", "properties", "by_hand", "packing"))
OWN, SEALS, DATA, LAUNCH = (f"test_{name}.py -k " for name in ("ownership", "seals", "data_only", "launch"))
TWO = "test_processes.py -k gradients_of_two"

MUTANTS = [
    # --- advantages
    *of("advantages.token_rewards", MATHS + "token_rewards",
        ("KL is paid, not charged", "- kl_cost", "+ kl_cost"),
        ("padding is charged", "kl_cost * mask", "kl_cost"),
        ("score at the last place of the batch", "mask.sum(1, keepdim=True)", "mask.shape[1]"),
        ("score at every token", "torch.where(last,", "torch.where(mask,")),
    *of("advantages.gae", MATHS + "gae",
        ("value added", "- values[:, t]", "+ values[:, t]"),
        ("next value not discounted", "gamma * after", "after"),
        ("λ alone", "gamma * lam * running", "lam * running"),
        ("λ forgotten", "gamma * lam * running", "gamma * running"),
        ("forwards in time", "reversed(range(A))", "range(A)"),
        ("value of padding as the next value", "after = torch.where(real, values[:, t], after)", "after = values[:, t]"),
        ("bootstrap ignored", "else bootstrap", "else 0. * bootstrap"),
        ("returns without values", "(advantages + values)", "advantages"),
        ("returns at padding", "(advantages + values) * mask", "advantages + values")),
    *of("advantages.whiten", MATHS + "Whiten",
        ("mean over padding, too", "(x * mask).sum()", "x.sum()"),
        ("variance over padding, too", "** 2 * mask", "** 2"),
        ("n - 1", "* mask).sum()) / n\n    y", "* mask).sum()) / (n - 1)\n    y"),
        ("by the variance", "torch.rsqrt(var + 1e-8)", "torch.reciprocal(var + 1e-8)"),
        ("no guard for equal values", " + 1e-8", ""),
        ("mean is lost", "y + mean", "y"),
        ("padding is not zero", "y + mean) * mask", "y + mean)"),
        ("n of this process", "reduce(mask.sum().to(x.dtype))", "mask.sum().to(x.dtype)")),
    *of("advantages.potential_shaping", MATHS + "potential",
        ("undiscounted", "gamma * following", "following"),
        ("other sign", "gamma * following - potential", "potential - gamma * following"),
        ("potential after the end", "potential[:, 1:] * mask[:, 1:]", "potential[:, 1:]")),
    *of("advantages.ValueHead.forward", MATHS + "value_head",
        ("blind", "hidden + look", "hidden"),
        ("what is seen goes to other rows", "need_weights=False)[0]", "need_weights=False)[0].flip(0)")),
    *of("advantages.vision_gamma", MATHS + "vision_gamma", ("grows with complexity", "base - slope", "base + slope")),
    # --- KL
    *of("kl.full_kl", MATHS + "'TestKL and not estimate'",
        ("weighted by the other", "p.exp() * (p - q)", "q.exp() * (p - q)"),
        ("one direction only", "p, q = q, p", "pass"),
        ("capped at 100", ".sum(-1)", ".sum(-1).clamp(max=100)")),
    *of("kl.kl_estimate", MATHS + "'k1 or k2'",
        ("swapped", "ref_logprobs - logprobs", "logprobs - ref_logprobs"),
        ("k1 sign", "return -log_r", "return log_r"),
        ("k2 not halved", "** 2 / 2", "** 2"),
        ("k3 sign", "- 1 - log_r", "- 1 + log_r"),
        ("k3 of the inverse ratio", "log_r.exp() - 1 - log_r", "(-log_r).exp() - 1 + log_r")),
    *of("kl.kl_estimate", PROPERTIES + "TestKLGradients",
        ("k2 without gradient", "return log_r ** 2", "return log_r.detach() ** 2"),
        ("k3 without the ratio's gradient", "log_r.exp() - 1", "log_r.exp().detach() - 1")),
    *of("kl.AdaptiveController.update", MATHS + "TestControllers",
        ("β falls where KL is high", "*= 1.5", "/= 1.5"),
        ("β falls early", "0.5 * self.target", "1.0 * self.target"),
        ("β rises early", "1.5 * self.target", "1.0 * self.target"),
        ("no ceiling", "min(self.high, max(self.low, self.beta))", "max(self.low, self.beta)"),
        ("no floor", "max(self.low, self.beta)", "self.beta")),
    *of("kl.ProportionalController.update", MATHS + "TestControllers",
        ("other sign", "1 + self.gain", "1 - self.gain"),
        ("unclipped", "max(-.2, min(.2, kl / self.target - 1))", "(kl / self.target - 1)"),
        ("no bounds", "min(self.high, max(self.low, self.beta))", "self.beta")),
    *of("kl.grounded_mask", HAND + "grounded", ("padding counts", " & batch.answer_mask", "")),
    *of("kl.kl_by_grounding", MATHS + "by_grounding", ("grounded tokens are prior, too", "mask & ~grounded", "mask")),
    # --- VLM
    *of("vlm.token_logprobs", MATHS + "token_logprobs",
        ("temperature forgotten", "logits / temperature", "logits"),
        ("probabilities", "torch.log_softmax", "torch.softmax"),
        ("half precision stays", "logits.float() if", "logits if")),
    *of("vlm.masked_mean", MATHS + "masked_mean",
        ("padding counts", "(x * mask).sum()", "x.sum()"),
        ("over all cells", "mask.sum().clamp(min=1)", "mask.numel()"),
        ("nothing there", ".clamp(min=1)", "")),
    *of("vlm.Batch.position_ids", MODEL + "padding_between",
        ("padding takes positions", "self.attention_mask.cumsum", "torch.ones_like(self.attention_mask).cumsum")),
    *of("vlm.Batch.rows", MODEL + "test_rows",
        ("cuts to the shortest prompt", "sum(1).max()", "sum(1).min()"),
        ("cuts to the shortest answer", "self.lengths[index].max()", "self.lengths[index].min()")),
    *of("vlm.answer_logits", MODEL + "cached_features", ("one token late", "[:, :-1]", "[:, 1:]")),
    *of("vlm.batch", MODEL + "every_answer_ends", ("no EOS", " + [self.eos_id]", "")),
    *of("vlm.VLM.banned_ids", HAND + "placeholder", ("padding allowed", ", self.pad_id", "")),
    *of("vlm.rule_out", MODEL + "full_divergence", ("minus infinity", "torch.finfo(logits.dtype).min / 4", "-torch.inf")),
    *of("vlm.acting", PROPERTIES + "bit_for_bit",
        ("the reference keeps the adapter on", "_active_adapter=[role], _disable_adapters=role is None", "_active_adapter=[role] if role else m._active_adapter, _disable_adapters=False")),
    *of("vlm.hidden", MODEL + "'reference or acting'", ("always the trunk", "self.acting(role)", "self.acting(None)")),
    *of("vlm.look", PROPERTIES + "'cache or tower'",
        ("a changed tower goes unnoticed", "stamp != self._stamp or trains", "trains")),
    *of("vlm.look", MODEL + "'gradients_reach_a_tower'",
        ("no gradient reaches a learning tower", "trains and torch.is_grad_enabled()", "False")),
    # --- reward
    *of("reward.last_real", MATHS + "last_real",
        ("last place", "x[torch.arange(len(x), device=x.device), at]", "x[:, -1]"),
        ("one too early", ".clamp(min=0)", ".sub(1).clamp(min=0)"),
        ("first real token", ".masked_fill(~mask, -1).amax(1)", ".masked_fill(~mask, 99).amin(1)")),
    *of("reward.ScoreHead.pool", HAND + "test_pooling",
        ("mean over padding, too", "mask.float()", "torch.ones_like(mask).float()"),
        ("attention to padding", ".masked_fill(~mask, -torch.inf)", ""),
        ("sum, not mean", " / w.sum(1, keepdim=True).clamp(min=1e-8)", ""),
        ("last place", "last_real(x, mask)", "x[:, -1]")),
    *of("reward.bt_loss", MATHS + "BradleyTerry",
        ("other sign", "-F.logsigmoid(gap)", "F.logsigmoid(gap)"),
        ("log of sigmoid", "-F.logsigmoid(gap)", "-torch.log(torch.sigmoid(gap))"),
        ("swapped", "chosen - rejected", "rejected - chosen"),
        ("margin turned round", "margin - gap", "gap - margin"),
        ("pull on the sum", "(chosen ** 2 + rejected ** 2)", "(chosen + rejected) ** 2"),
        ("weights ignored", "loss * weight", "loss")),
    *of("reward.RewardModel.token_scores", MODEL + "reward_by_definition",
        ("padding scores", "out * batch.answer_mask", "out"),
        ("EOS is not read", "states[:, 1:]", "states[:, :-1]")),
    *of("reward.RewardModel.forward", MODEL + "reward_by_definition",
        ("scale turned round", "/ self.scale", "* self.scale"),
        ("shift forgotten", " - self.shift", "")),
    *of("reward.RewardTask.forward", HAND + "reward_task",
        ("learns to prefer the rejected", "scores[chosen], scores[rejected], weight", "scores[rejected], scores[chosen], weight"),
        ("mean of a micro-batch", "loss.sum()", "loss.mean()")),
    *of("reward.pair_accuracy", MODEL + "pair_accuracy", ("counts misses", "s[c] > s[r]", "s[c] < s[r]")),
    # --- PPO
    *of("ppo.ppo_policy_loss", MATHS + "TestPolicyLoss",
        ("ratio upside down", "logprobs - old_logprobs.detach()", "old_logprobs.detach() - logprobs"),
        ("old policy learns", "old_logprobs.detach()", "old_logprobs"),
        ("advantages learn", "advantages.detach()", "advantages"),
        ("optimistic", "torch.maximum", "torch.minimum"),
        ("no clip", ".clamp(1 - clip, 1 + clip)", ""),
        ("clip above only", ".clamp(1 - clip, 1 + clip)", ".clamp(max=1 + clip)"),
        ("padding counts", " * mask).sum()", ").sum()"),
        ("mean, not sum", ".sum()", ".mean()")),
    *of("ppo.value_loss", MATHS + "TestValueLoss",
        ("not halved", ".5 * ", ""),
        ("optimistic", "torch.maximum", "torch.minimum"),
        ("no clip", ".clamp(-clip, clip)", ""),
        ("clip below only", ".clamp(-clip, clip)", ".clamp(min=-clip)"),
        ("returns learn", "returns.detach()", "returns"),
        ("padding counts", " * mask).sum()", ").sum()"),
        ("mean, not sum", ".sum()", ".mean()")),
    *of("ppo.phase", MATHS + "phases",
        ("warm-up too long", "step < w", "step <= w"),
        ("warm-up at full speed", ".1, 5.", "1., 5."),
        ("no finish", "cfg.iterations - f", "cfg.iterations"),
        ("finish does not decay", "(cfg.iterations - step) / (f + 1)", "1.")),
    *of("ppo.answer_scores", PROPERTIES + "'missing_eos or penalty_lowers or not_ending'",
        ("a missing EOS is free", "cfg.no_eos", "0. * cfg.no_eos"),
        ("a bad answer gains by not ending", "score.clamp(max=cfg.no_eos)", "torch.full_like(score, cfg.no_eos)"),
        ("penalty pays", "learned + learned.new_tensor(extra)", "learned - learned.new_tensor(extra)")),
    *of("ppo.make_experience", MODEL + "test_experience",
        ("KL of the other direction", 'kl_estimate(roll.logprobs, ref, "k1")', 'kl_estimate(ref, roll.logprobs, "k1")'),
        ("token scores paid twice", "score - early.sum(1)", "score"),
        ("values one token late", "[:, :-1]", "[:, 1:]"),
        ("β forgotten", "beta * kl_estimate", "kl_estimate")),
    *of("ppo.make_experience", HAND + "'scaled or temperature'",
        ("token scores not normalised", " / rm.scale", "")),
    *of("ppo.read_answers", HAND + "'scaled or temperature'",
        ("reference at temperature 1", "b.answers, roll.temperature", "b.answers")),
    *of("ppo.read_answers", MODEL + "test_experience",
        ("groups back in the wrong place", "zip(groups, found): out[rows", "zip(groups[::-1], found): out[rows")),
    *of("ppo.minibatches", HAND + "minibatches",
        ("always in the same order", "/{epoch}\").sample", "\").sample"),
        ("not sorted inside", "sorted(order[i:i + size], key=lengths.__getitem__)", "order[i:i + size]"),
        ("each process takes a whole minibatch", "cfg.minibatch // world", "cfg.minibatch")),
    *of("ppo.make_experience", TWO, ("whitened by each process alone", "mask, reduce=reduce", "mask")),
    *of("ppo.ActorCritic.forward", HAND + "temperature", ("ratio at temperature 1", "batch.answers, temperature", "batch.answers")),
    *of("ppo.PPOTask.forward", HAND + "ppo_loss",
        ("value coefficient forgotten", "cfg.value_coef * vf", "vf"),
        ("policy clipped like values", "mask, cfg.clip)", "mask, cfg.value_clip)"),
        ("values clipped like the policy", "cfg.value_clip)", "cfg.clip)"),
        ("values one token late", "values[:, :-1]", "values[:, 1:]")),
    *of("ppo.PPOState.after", HAND + "emergency",
        ("no rollback", "self.restore(self.good)", "pass"),
        ("good weights are never renewed", "self.good = self.snapshot()", "pass"),
        ("same learning rate", "*= .1", "*= 1."),
        ("pulls less", "beta * 3", "beta / 3"),
        ("β without a ceiling", "min(10., self.control.beta * 3)", "self.control.beta * 3"),
        ("controller works in warm-up", "if control: ", ""),
        ("never an emergency", "kl <= cfg.kl_emergency", "True")),
    *of("ppo.PPOState.snapshot", HAND + "emergency", ("no copy", ".clone()", "")),
    *of("ppo.train_ppo", MODEL + "recovers", ("learns from the exploded policy", " if emergency else", " if False else")),
    *of("ppo.validate", HAND + "validation", ("KL is paid", "score - beta", "score + beta")),
    *of("ppo.minibatches", PACKING + "minibatches", ("answers drawn one by one", "range(0, len(lengths), k), len(lengths) // k) for j in range(k)",
                                                     "range(len(lengths)), len(lengths)) for j in range(1)")),
    *of("ppo.read_answers", PACKING + "as_often", ("scoring tears prompts apart", "cfg.at_once", "cfg.micro_batch")),
    *of("ppo.train_ppo", PACKING + "'as_often or shared_out'", ("one answer to a prompt", "for p in drawn for _ in range(cfg.answers_per_prompt)", "for p in drawn"),
        ("shares are not checked", "shares(cfg, accelerator)", "accelerator.process_index, accelerator.num_processes"),
        ("as many prompts as answers", "cfg.answers // cfg.answers_per_prompt", "cfg.answers"),
        ("updates tear prompts apart", "cfg.at_once", "cfg.micro_batch - 2")),
    # --- packing
    *of("packing.who_sees", PACKING + "'sees or states'",
        ("answers see each other", "(owner.unsqueeze(1) == -1) | (owner.unsqueeze(1) == owner.unsqueeze(2))", "owner.unsqueeze(1) == owner.unsqueeze(1)"),
        ("nobody sees the prompt", "(owner.unsqueeze(1) == -1) | ", ""),
        ("the future is seen", ".tril()", ""),
        ("padding is seen", " & real.bool().unsqueeze(1)", ""),
        ("padding sees nothing", "itself | mine", "mine")),
    *of("packing.pack", PACKING + "'token or states or even'",
        ("positions count on", "batch.position_ids[..., row, column]", "(real.cumsum(1) - 1).clamp(min=0)"),
        ("another answer's place", "start[:, None] + t, P - 1", "start[:, None] + t + 1, P - 1")),
    *of("packing.layout", PACKING + "'token or layout'", ("more answers in a row than allowed", "-(-len(g) // size)", "1")),
    *of("packing.distinct", PACKING + "'distinct or sampling'", ("the same row for all", "rows, \"amin\"", "rows * 0, \"amin\"")),
    *of("packing.packing_size", PACKING + "'pays or cost'",
        ("attention costs nothing", "(6 * width + L)", "(6 * width)"), ("attention is all that costs", "(6 * width + L)", "L"),
        ("the mean row", "max(int(lengths[g].sum())", "min(int(lengths[g].sum())")),
    *of("vlm.batch", PACKING + "make_a_prompt", ("the prompt's own picture counts", "same_prompts([(p.text, refs)", "same_prompts([(p.text, p.image)"),
        ("the first picture counts", "same_prompts([(p.text, refs)", "same_prompts([(p.text, refs[:1])")),
    *of("vlm.answer_states", PACKING + "'used or windows'", ("every family packs", " if self.family.packs(self.model.config) else 1", "")),
    *of("rollout.prompt_lengths", PACKING + "length_groups", ("each answer on its own", ")[asked]", ")[asked] * 0 + lengths")),
    *of("rollout.length_groups", PACKING + "length_groups", ("equal means mix", "asked.argsort(stable=True)", "torch.arange(len(lengths))")),
    # --- rollout
    *of("rollout.sample", MODEL + "'sampled or banned or pad_that_is'",
        ("sampled at temperature 1", "logits[:, 0] / temperature", "logits[:, 0]"),
        ("log-probs at temperature 1", "token, temperature)", "token)"),
        ("banned tokens are sampled", "vlm.rule_out(", "("),
        ("EOS is forgotten", "alive & (token[:, 0] != vlm.eos_id)", "alive"),
        ("EOS is no action", "real[rows, t] = alive", "real[rows, t] = alive & (token[:, 0] != vlm.eos_id)"),
        ("real where not padding", "real[rows, t] = alive", "real[rows, t] = token[:, 0] != vlm.pad_id"),
        ("position stands still", "at + 1", "at"),
        ("log-probs after the end", "logprobs * real, ended", "logprobs, ended"),
        ("words after the end", "said.masked_fill(~real, vlm.pad_id),", "said,")),
    *of("rollout.length_groups", MATHS + "length_groups",
        ("unsorted", "[torch.argsort(prompt_lengths(lengths, asked)[first], stable=True)]", "")),
    *of("rollout.plan_prompts", MATHS + "TestPlan", ("a picture twice", "{p.image: p for", "{id(p): p for")),
    # --- SFT
    *of("sft.SFTTask.forward", MODEL + "sft_does_not",
        ("padding counts", " * batch.answer_mask", ""),
        ("other sign", "-(token_logprobs", "(token_logprobs")),
    *of("sft.backward_through", MODEL + "does_not_depend_on_micro",
        ("each micro-batch by its own count", "* world / total)", "* world / bare.count(b))"),
        ("metrics as means of means", "v * count / max(1, sum(counts))", "v / len(parts)")),
    *of("sft.backward_through", TWO,
        ("DDP's mean is not undone", "* world / total)", "/ total)"),
        ("who has less counts twice", "summed * bool(part) * world", "summed * world"),
        ("by the count of this process", 'accelerator.reduce(torch.tensor(float(sum(counts)), device=accelerator.device), "sum")',
         "torch.tensor(float(sum(counts)))"),
        ("all take the first one's share", "items[accelerator.process_index::", "items[0 * accelerator.process_index::")),
    *of("sft.backward_through", TWO.split(" -k ")[0] + " -k loss_of_two", ("loss of this process", 'accelerator.reduce(loss, "sum")', "loss")),
    *of("sft.fit", HAND + "test_fit",
        ("gradients pile up", "\n        optimizer.zero_grad()", ""),
        ("no clipping", "cfg.clip)", "1e9)"),
        ("constant learning rate", " * warmup_cosine(step, cfg.steps, cfg.warmup)", "")),
    *of("sft.warmup_cosine", MATHS + "warmup",
        ("starts at 0", "(step + 1) / w", "step / w"),
        ("half a cosine", "math.pi * ", "")),
    # --- preferences
    *of("preferences.fleiss_kappa", MATHS + "fleiss",
        ("without chance", "(agree - chance) / (1 - chance)", "agree"),
        ("raters agree with themselves", "raters * (raters - 1)", "raters * raters"),
        ("self-pairs stay", "row) - raters)", "row))"),
        ("chance not squared", "p * p", "p / len(share)")),
    *of("preferences.cohen_kappa", MATHS + "cohen",
        ("disagreement", "1 - seen / chance", "seen / chance"),
        ("linear weights", "(x - y) ** 2", "abs(x - y)"),
        ("chance by one rater", "a.count(x) * b.count(y)", "a.count(x) * a.count(y)")),
    *of("preferences.ranking_pairs", MATHS + "RankingPairs",
        ("ties give pairs", "total[j] - total[i] > 0", "total[j] - total[i] >= 0"),
        ("the worse is chosen", "(i, j, gap / mean)", "(j, i, gap / mean)"),
        ("weights not normalised", "gap / mean", "gap")),
    *of("preferences.ranking_pairs", HAND + "just_the_limit",
        ("a gap of just this size is too small", ">= min_gap - 1e-9", "> min_gap")),
    *of("preferences.annotate", MATHS + "annotators", ("worst first", "-felt[i]", "felt[i]")),
    *of("preferences.dedupe", MATHS + "TestDedupe", ("compares with the last only", "for k in kept)", "for k in kept[-1:])")),
    # --- hallucination and world
    *of("hallucination.penalty", MATHS + "TestPenalty",
        ("silence wins", "+ cfg.coverage * v.recall", ""),
        ("sum only", "base * n ** cfg.count_power", "base * n"),
        ("always the same severity", "severity(step, cfg.ramp) * false", "false"),
        ("weight on the errors only", "* false + cfg.coverage", "* false + 1 / cfg.weight * cfg.coverage"),
        ("relations are free", "cfg.relation", "0 * cfg.relation")),
    *of("hallucination.severity", MATHS + "severity", ("without end", "min(2., 1. + step / ramp)", "1. + step / ramp")),
    *of("hallucination.overall_rate", MATHS + "overall_rate",
        ("weights swapped", '.5 * summary["chair_i"] + .3', '.3 * summary["chair_i"] + .5')),
    *of("scenes.judge", MATHS + "'judge or imagined or careful or beside'",
        ("named twice, true twice", "noun in there and noun not in true", "noun in there"),
        ("attributes turned round", "== a[2]", "!= a[2]"),
        ("missed are those that were said", "n not in true)", "n in true)"),
        ("any count is right", "said.count == len(there)", "said.count >= 0"),
        ("any place is right", "said.place == scene.place", "bool(said.place)")),
    *of("scenes.judge", HAND + "absent",
        ("relations with absent things are judged", "r[0] in there and r[2] in there", "r[0] in there")),
    *of("scenes._relation_holds", MATHS + "'test_judge or beside'", ("no direction at all", 'if relation == "beside"', "if relation")),
    *of("scenes.summarise", HAND + "chair_s", ("objects, not answers", "bool(v.false_objects)", "len(v.false_objects)")),
    *of("scenes.summarise", MATHS + "summary",
        ("share of the true", 'total("false_objects"), total("true_objects")', 'total("true_objects"), total("false_objects")'),
        ("sum of recalls", "sum(v.recall for v in verdicts) / n", "sum(v.recall for v in verdicts)")),
    # --- what a run removes, writes over, reads and believes
    *of("files.remove", OWN + "'stage_removes or remove_takes or links or remains'",
        ("links are followed", "if folder.is_symlink() or not folder.is_dir():", "if not folder.is_dir():"),
        ("also while somebody writes", "if _nobody_writes(folder):", "if True:"),
        ("whatever stands there", '(sealed["files"] | {MANIFEST: None}).items() if sealed else ()', "[(n, None) for n in os.listdir(folder)]"),
        ("nothing at all", '(sealed["files"] | {MANIFEST: None}).items() if sealed else ()', "()")),
    *of("files._inside", OWN + "leads_nowhere",
        ("upwards", '".." not in name.split("/")', "True"), ("from the root", 'not name.startswith("/")', "True")),
    *of("files._unlink", OWN + "leads_nowhere", ("through links", "p.is_symlink() for p in", "False for p in")),
    *of("files._unlink", "test_attacks.py -k somebody_replaced", ("by name alone", "was not in (None, known_digest(file))", "False")),
    *of("files.added", "test_attacks.py -k beside_a_model", ("whatever lies there", "not in known", "in ()")),
    *of("launch.guard", "test_attacks.py -k frozen", ("patience", "time.monotonic() - self.round > SILENCE + BEAT", "False")),
    *of("files.sum_of", "test_bad_inputs.py -k test_records", ("of nothing", 'k != "sum"', "False")),
    *of("files.manifest", OWN + "of_others", ("any manifest", 'record.get("made_by") != SIGNATURE', "False")),
    *of("files.make_room", OWN + "foreign_folder", ("all of it", "        remove(folder)", "        shutil.rmtree(folder)")),
    *of("files.known_file", OWN + "record_knows", ("anything is ours", "digest(path) in before", "True")),
    *of("files.write_known", OWN + "crash_between", ("the file comes first", "[*before, new]", "before")),
    *of("files.changed", "test_runs.py -k damaged_checkpoint", ("sizes alone", "known_digest(file) != was", "False")),
    *of("files.read_picture", DATA + "'program or pixels or formats'",
        ("any format", "Image.open(f, formats=FORMATS)", "Image.open(f)"),
        ("any size", "img.width * img.height > MOST_PIXELS", "False")),
    *of("files.parse_record", "test_seals.py -k surrogate", ("halves of signs", "return row, f\"half", "return row, None and f\"half")),
    *of("settings.open_regular", DATA + "are_no_files", ("pipes, too", "not stat.S_ISREG(s.st_mode)", "False")),
    *of("settings.check_launch", LAUNCH + "launcher_variables",
        ("a rank beyond the others", "if rank >= world:", "if False:"),
        ("other launchers", "env_number(name, world, 1) != world", "False")),
    *of("settings.check_numbers", LAUNCH + "numbers_beyond",
        ("any float", "LEAST <= abs(value) <= MOST", "True"), ("any integer", "abs(value) > MOST_COUNT", "False")),
    *of("settings._missing", LAUNCH + "numbers", ("question marks are a value", 'if values == "???":', "if False:")),
    *of("launch.environment", LAUNCH + "variables_on_record", ("nothing counts", "name.startswith(COUNTING)", "False")),
    *of("launch._sign", LAUNCH + "'silent or stopped or left_well'",
        ("silence is golden", "now - since > SILENCE", "False"),
        ("who left is missed", 'or sign == b"left"', "")),
    *of("launch.share", LAUNCH + "shared_decisions", ("each for itself", "if self.rank == 0:", "if True:")),
    *of("cli.prepare", DATA + "torch_load_of_others", ("others may unpickle", '_LOAD"] = "1"', '_LOAD"] = "0"')),
    *of("checkpoints.load_model", DATA + "remote_code", ("always trusted", "trust_remote_code=trust_remote_code", "trust_remote_code=True")),
    *of("checkpoints.save_tensors", OWN + "foreign_weights", ("whoever wrote it", "_owner(path) != of", "False")),
    *of("checkpoints.log_rows", OWN + "foreign_metric", ("any file", "if fault:", "if False:")),
    *of("checkpoints.last_whole", SEALS + "in_the_middle", ("of anybody", 'found["of"] != of', "False")),
    *of("checkpoints.drawing", SEALS + "gives_the_same", ("whatever was drawn before", "torch.manual_seed(seed)", "pass")),
    *of("checkpoints.MetricLog.__init__", SEALS + "were_lost", ("what is there", "there if rows is None else rows", "there")),
    *of("runs._ours", OWN + "not_taken", ("any folder", "has_record(entry) or only_log(entry)", "True")),
    *of("runs.sealed", SEALS + "another_seed", ("seals are not read", 'fault = changed(folder, record["files"])', "fault = None")),
    *of("rollout.finite", SEALS + "sampling_notices", ("it may be NaN", "shares[:, 0].isfinite().all()", "True")),
    *of("ppo.collect", SEALS + "rolled_back", ("made of nothing", "if roll is None:", "if False:")),
    *of("evaluate.finished_report", SEALS + "changed_report",
        ("whatever stands there", 'digest(file) in ours.get(f"../{name}", ())', "True")),
]


def segment(text, where):
    "First and last line (from 0, exclusive) of `module.name` or `module.class.name` in its module's text."
    node = ast.parse(text)
    for name in where.split(".")[1:]: node = next(n for n in node.body if getattr(n, "name", None) == name)
    return node.lineno - 1, node.end_lineno


def module(m: Mutant) -> Path:
    "The file of a mutant's module, in whatever room of the package."
    return next(f for f in PACKAGE.rglob("*.py") if f.stem == m.where.split(".")[0])


def mutate(m: Mutant) -> str:
    "The module with the mutant in it. Raises LookupError unless the snippet occurs exactly once."
    file = module(m)
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    try: start, end = segment("".join(lines), m.where)
    except StopIteration: raise LookupError(f"{m.where}: not in {file.name}") from None
    code = "".join(lines[start:end])
    if code.count(m.old) != 1: raise LookupError(f"{m.name}: {m.old!r} occurs {code.count(m.old)} times there, not once")
    return "".join(lines[:start]) + code.replace(m.old, m.new) + "".join(lines[end:])


def start(tests: str, folder: Path, m: Mutant | None) -> int:
    "Fork; the child tests a copy of the package in `folder`. Returns its process id."
    copy = folder / PACKAGE.name
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "pretrained"))
    (copy / "pretrained").symlink_to(PACKAGE / "pretrained")
    if m: (copy / module(m).relative_to(PACKAGE)).write_text(mutate(m), encoding="utf-8")
    if pid := os.fork(): return pid
    code = 9
    try:
        os.setpgid(0, 0)
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1), os.dup2(log, 2)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        os.environ.update(PYTHONPATH=str(folder), VLMRLHF_START="fork")   # two processes without importing everything twice more
        import pytest
        file, _, chosen = tests.partition(" -k ")
        code = int(pytest.main(["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "--hypothesis-profile=mutants",
                                str(TESTS / file), "-k", chosen.strip("'")]))
    finally: os._exit(code)


def verdict(status: int, log: str) -> tuple[str, str]:
    "What became of a mutant, and which test noticed it."
    by = next((line.split(" - ")[0].split("::", 1)[-1] for line in log.splitlines() if line.startswith("FAILED")), "")
    if os.WIFSIGNALED(status): return ("killed", f"did not end in {LIMIT} s") if os.WTERMSIG(status) == signal.SIGKILL else ("ERROR", "")
    return {0: "SURVIVED", 1: "killed" if by else "ERROR"}.get(os.WEXITSTATUS(status), "ERROR"), by


def run_all(work: list, jobs: int, report):
    "Run (tests, mutant or None) pairs, `jobs` at a time; `report(pair, verdict, by whom, seconds of CPU time, log)` as each ends."
    waiting, running = list(work), {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                tests, m = waiting.pop(0)
                folder = Path(tempfile.mkdtemp(prefix="mutant-"))
                running[start(tests, folder, m)] = (tests, m), folder, time.time()
            time.sleep(.02)
            for pid, (pair, folder, since) in list(running.items()):
                done, status, used = os.wait4(pid, os.WNOHANG)
                if not done and time.time() - since > LIMIT:
                    os.killpg(pid, signal.SIGKILL)
                    done, status, used = os.wait4(pid, 0)
                if not done: continue
                del running[pid]
                log = (folder / "log").read_text(encoding="utf-8", errors="replace")
                shutil.rmtree(folder, ignore_errors=True)
                report(pair, *verdict(status, log), used.ru_utime + used.ru_stime, log)
    finally:
        for pid, (_, folder, _) in running.items():
            os.killpg(pid, signal.SIGKILL)
            shutil.rmtree(folder, ignore_errors=True)


def warm_up():
    "Import everything once, then forget the package: each fork imports its own copy, and nothing else again."
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")
    sys.path.insert(0, str(PACKAGE.parent))
    import hypothesis, hypothesis.strategies, pytest, torch.multiprocessing, torch.utils.tensorboard  # noqa: E401, F401
    import vlmrlhf_course.report.evaluate  # noqa: F401
    hypothesis.settings.register_profile("mutants", deadline=None, max_examples=40, derandomize=True,   # found is enough: no shrinking
                                         phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate])
    for name in [n for n in sys.modules if n.split(".")[0] == PACKAGE.name]: del sys.modules[name]
    sys.path.remove(str(PACKAGE.parent))


def record(counts: dict):
    "Write what was found to tests/proofs.json."
    file = TESTS / "proofs.json"
    proofs = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(proofs | dict(mutants=counts | dict(date=str(date.today()))), indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="NAME", help="mutants whose name holds this")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    chosen, bad = [m for m in MUTANTS if args.only in m.name], []
    for m in chosen:
        try: mutate(m)
        except LookupError as e: print(e), bad.append(m)
    if bad or not chosen: sys.exit(f"{len(bad)} snippets do not match: renew them" if bad else f"no mutant {args.only!r}")
    warm_up()

    def healthy(pair, what, by, seconds, log):
        if what != "SURVIVED": sys.exit(f"{pair[0]}: fails without any mutant\n{log[-3000:]}")
    files = {}   # with no mutant, everything that is used must pass
    for m in chosen: files.setdefault(m.tests.split(" -k ")[0], {})[m.tests.split(" -k ")[1].strip("'")] = None
    run_all([(f"{file} -k {' or '.join(f'({k})' for k in ks)}", None) for file, ks in files.items()], args.jobs, healthy)

    counts = dict(killed=0, SURVIVED=0, ERROR=0)
    def report(pair, what, by, seconds, log):
        counts[what] += 1
        print(f"{what:8} {seconds:5.1f} s  {pair[1].name:70.70} {by[:80]}", flush=True)
        if what == "ERROR": print(log[-1500:])
    run_all([(m.tests, m) for m in chosen], args.jobs, report)
    print(", ".join(f"{n} {what}" for what, n in counts.items()))
    if not args.only: record(counts)
    sys.exit(counts["killed"] < len(chosen))


if __name__ == "__main__": main()
