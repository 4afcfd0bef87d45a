"Properties: what must not change a result, and what must. Gradients of the KL estimators and of PPO by enumeration."
import copy
import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import FAULTY, REPO, SCENE, SMALL, shake
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import MUTANTS, mutate
from test_model import SMALL_LORA, close, push, reward_model, spread_out, values
from torch import nn
from torch.testing import assert_close

from vlmrlhf_course.rl.advantages import gae, potential_shaping, token_rewards, whiten
from vlmrlhf_course.world.hallucination import penalty
from vlmrlhf_course.rl.kl import full_kl, kl_estimate
from vlmrlhf_course.rl.ppo import ActorCritic, PPOConfig, answer_scores, make_experience, ppo_policy_loss, train_ppo
from vlmrlhf_course.data.preferences import sample_prompts, true_score
from vlmrlhf_course.train.reward import RewardConfig, RewardModel, score_texts
from vlmrlhf_course.rl.rollout import Rollout, sample
from vlmrlhf_course.base.runs import read_jsonl
from vlmrlhf_course.train.sft import FitConfig, SFTTask, fit
from vlmrlhf_course.model.vlm import VLM, LoRAConfig, build_model, build_processor, load_vlm, save_vlm
from vlmrlhf_course.world.scenes import Prompt, describe, judge

seeds = st.integers(0, 10 ** 6)
few = settings(max_examples=12)


def rand(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
def gradient(y, x): return torch.autograd.grad(y, x, retain_graph=True)[0]


# --- gradients of the KL estimators ---------------------------------------------------------------------------------

class TestKLGradients:
    "Every token of a small vocabulary is enumerated. Tokens are sampled, so no gradient flows through their probabilities."
    def setting(self, seed, V=5):
        "Logits that learn, log-probabilities (V,) of the policy and of the reference."
        theta = rand(V, seed=seed).requires_grad_()
        return theta, theta.log_softmax(0), rand(V, seed=seed + 1).log_softmax(0)

    def as_loss(self, kind, theta, p, q):
        "Expected gradient where the estimate is added to the loss."
        return gradient((p.exp().detach() * kl_estimate(p, q, kind)).sum(), theta)

    def as_cost(self, kind, theta, p, q):
        "Expected gradient where the estimate is a cost of the sampled token, which only moves the token's probability."
        return gradient((p.exp().detach() * kl_estimate(p, q, kind).detach() * p).sum(), theta)

    def exact(self, theta, p, q): return gradient((p.exp() * (p - q)).sum(), theta)   # of KL[p||q]

    @given(seeds)
    def test_k2_as_a_loss_has_the_gradient_of_the_divergence(self, seed):
        assert_close(self.as_loss("k2", *self.setting(seed)), self.exact(*self.setting(seed)))

    @given(seeds)
    def test_k1_as_a_loss_pulls_nowhere(self, seed):
        "Unbiased in value, useless as a loss: E[∇ log π] = 0, whatever the reference; one sample does push, as noise."
        theta, p, q = self.setting(seed)
        assert self.as_loss("k1", theta, p, q).abs().max() < 1e-12
        assert gradient(kl_estimate(p, q, "k1")[0], theta).abs().max() > 1e-3

    @given(seeds)
    def test_k3_as_a_loss_pulls_in_the_other_direction(self, seed):
        theta, p, q = self.setting(seed)
        assert_close(self.as_loss("k3", theta, p, q), gradient((q.exp() * (q - p)).sum(), theta))

    @given(seeds)
    def test_k1_as_a_cost_has_the_gradient_of_the_divergence(self, seed):
        "This is how PPO uses it: inside the reward."
        assert_close(self.as_cost("k1", *self.setting(seed)), self.exact(*self.setting(seed)))

    def test_the_others_are_really_other(self):
        "Where k2 and k3 are costs, and where k3 is a loss, the gradient is not that of the divergence."
        want = self.exact(*self.setting(3))
        for got in (self.as_cost("k2", *self.setting(3)), self.as_cost("k3", *self.setting(3)), self.as_loss("k3", *self.setting(3))):
            assert (got - want).abs().max() > .05

    @given(seeds)
    def test_full_kl_in_both_directions(self, seed):
        theta, p, q = self.setting(seed)
        z, ref = theta.view(1, 1, -1), q.view(1, 1, -1) + 2.
        assert_close(gradient(full_kl(z, ref).sum(), theta), self.exact(theta, p, q))
        assert_close(gradient(full_kl(z, ref, "ref||policy").sum(), theta), gradient((q.exp() * (q - p)).sum(), theta))


# --- the policy gradient, exactly -----------------------------------------------------------------------------------

class TestPolicyGradient:
    "Every answer of at most two tokens over {a, b, EOS}: costs, advantages and loss together give the gradient of E[score] - β·KL."
    answers = torch.tensor([[2, 2], *itertools.product((0, 1), (0, 1, 2))])     # EOS ends; what follows is padding
    mask = torch.tensor([[True, False]] + [[True, True]] * 6)
    state = torch.tensor([[0, 0]] + [[0, 1 + a] for a, _ in answers[1:].tolist()])   # nothing said yet, `a` said, `b` said

    def setting(self, seed):
        theta, score = rand(3, 3, seed=seed).requires_grad_(), rand(7, seed=seed + 2)
        lp, ref = (z.log_softmax(1)[self.state].gather(2, self.answers.unsqueeze(2)).squeeze(2) for z in (theta, rand(3, 3, seed=seed + 1)))
        log_ratio = ((lp - ref) * self.mask).sum(1)
        return theta, score, lp, ref, (lp * self.mask).sum(1).exp(), log_ratio

    def by_ppo(self, theta, score, lp, ref, prob, beta, value, lam=1., potential=None):
        "Expected gradient of the library's loss, at the moment when the policy is the one that sampled."
        rewards = token_rewards(score, beta * kl_estimate(lp, ref, "k1"), self.mask).detach()
        if potential is not None: rewards = rewards + potential_shaping(potential, self.mask)
        advantages, _ = gae(rewards, value, self.mask, 1., lam)
        losses = [ppo_policy_loss(lp[i:i + 1], lp[i:i + 1].detach(), advantages[i:i + 1], self.mask[i:i + 1]) for i in range(7)]
        return gradient((prob.detach() * torch.stack(losses)).sum(), theta)

    @given(seeds, st.floats(0, 2))
    def test_any_baseline_and_any_potential(self, seed, beta):
        "A critic, right or wrong, and shaping by a potential change the variance only (λ = 1)."
        theta, score, lp, ref, prob, log_ratio = self.setting(seed)
        assert_close(float(prob.detach().sum()), 1.)
        want = -gradient((prob * score).sum() - beta * (prob * log_ratio).sum(), theta)
        value, potential = rand(3, seed=seed + 3)[self.state], rand(3, seed=seed + 4)[self.state]
        assert_close(self.by_ppo(theta, score, lp, ref, prob, beta, value), want)
        assert_close(self.by_ppo(theta, score, lp, ref, prob, beta, value, potential=potential), want)

    @given(seeds, st.floats(0, 2), st.floats(0, 1))
    def test_a_perfect_critic_allows_any_lambda(self, seed, beta, lam):
        theta, score, lp, ref, prob, log_ratio = self.setting(seed)
        gain = score - beta * log_ratio
        first, later = (prob * gain).sum(), []
        for s in (1, 2):   # value after the first token: what is still to come
            rows = self.state[:, 1] == s
            to_come = score - beta * ((lp - ref) * self.mask)[:, 1]
            later.append((prob * to_come)[rows].sum() / prob[rows].sum())
        value = torch.stack([first, *later]).detach()[self.state]
        assert_close(self.by_ppo(theta, score, lp, ref, prob, beta, value, lam), -gradient((prob * gain).sum(), theta))


@given(seeds, st.floats(-50, 50), st.floats(.1, 20), st.lists(st.integers(1, 5), min_size=2, max_size=4))
def test_whitened_advantages_do_not_feel_a_shift_or_a_scale(seed, shift, scale, lengths):
    x, mask = rand(len(lengths), 5, seed=seed), torch.arange(5) < torch.tensor(lengths).unsqueeze(1)
    assert_close(whiten(scale * x + shift, mask), whiten(x, mask), atol=1e-5, rtol=1e-5)


# --- padding and order ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=["token-head", "scalar-adapter"])
def cast(request, _base, prompts):
    "A reward model and a policy with random roles, and a batch: `prompts` with their answers."
    kind, critic = request.param.split("-")
    vlm = copy.deepcopy(_base)
    rm = reward_model(vlm, kind)
    policy = ActorCritic(rm, PPOConfig(critic=critic, lora=SMALL_LORA)).double()
    for p in policy.value.parameters(): nn.init.normal_(p, std=.3)
    shake(vlm, "actor", std=.05, seed=7)
    return SimpleNamespace(vlm=vlm, rm=rm, policy=policy, prompts=prompts, full=vlm.batch(prompts, [p.answer for p in prompts]))


@few
@given(left=st.integers(0, 9), middle=st.integers(0, 3), right=st.integers(0, 9))
def test_rewards_and_values_do_not_depend_on_padding(cast, left, middle, right):
    b, mask = spread_out(cast.full, left, middle, right), cast.full.answer_mask
    A = mask.shape[1]
    with torch.no_grad():
        close(cast.rm(b), cast.rm(cast.full))
        tokens, want = (cast.rm.token_scores(x) for x in (b, cast.full))
        close(tokens[..., :A], want)
        assert not tokens[..., A:].any()
        got, want = (values(cast.policy, cast.rm, x)[:, :A] for x in (b, cast.full))
        first = int(middle > 0)   # V(s_0) stands at the last place of the prompt, which is padding where there is a gap
        close(got[:, first:][mask[:, first:]], want[:, first:][mask[:, first:]])


@few
@given(left=st.integers(0, 6), right=st.integers(0, 6), order=st.permutations(range(6)), n=st.integers(1, 6), m=st.integers(1, 6))
def test_rows_of_rows(cast, left, right, order, n, m):
    "Choosing rows removes just the padding that nobody needs, in one step or in two."
    first, second = torch.tensor(order[:n]), torch.arange(n)[:m].flip(0)
    want = cast.full.rows(first[second])
    for b in (spread_out(cast.full, left, 0, right), cast.full):
        got = b.rows(first).rows(second)
        assert got.prompt_length == want.prompt_length
        for name in ("input_ids", "attention_mask", "answer_mask", "has_image"):
            assert torch.equal(getattr(got, name), getattr(want, name)), name
        assert got.features is want.features is None or torch.equal(got.features, want.features)


@few
@given(seed=seeds, short=st.integers(1, 5))
def test_a_smaller_limit_only_cuts_the_answers(cast, seed, short):
    "What is sampled does not depend on how much may follow."
    long, cut = (sample(cast.vlm, cast.prompts, "actor", max_new_tokens=n, seed=seed) for n in (9, short))
    n = cut.batch.answers.shape[1]
    assert torch.equal(cut.batch.answers, long.batch.answers[:, :n]) and torch.equal(cut.logprobs, long.logprobs[:, :n])
    assert torch.equal(cut.batch.answer_mask, long.batch.answer_mask[:, :n]) and not (cut.ended & ~long.ended).any()


@pytest.fixture(scope="module")
def roll(cast):
    "Answers of which some end, some are cut."
    hook = push(cast.vlm, [cast.vlm.eos_id], 2.)
    roll = sample(cast.vlm, cast.prompts, "actor", max_new_tokens=9, seed=2)
    hook.remove()
    assert 0 < roll.ended.sum() < len(roll.ended)
    return roll


def experience(cast, roll, rm=None, **changes):
    return make_experience(cast.policy, rm or cast.rm, roll, PPOConfig(critic=cast.policy.kind, lora=SMALL_LORA, **changes), beta=.1)


@few
@given(order=st.permutations(range(6)), reward=st.sampled_from(["rm", "rm+penalty", "gold"]))
def test_permuting_the_answers_permutes_the_experience(cast, roll, order, reward):
    "Scores, values, advantages and returns belong to their row; the loss does not know the order."
    index = torch.tensor(order)
    other = Rollout([roll.prompts[i] for i in order], roll.batch.rows(index), roll.logprobs[index], roll.ended[index], roll.temperature)
    (a, info), (b, again) = experience(cast, roll, reward=reward), experience(cast, other, reward=reward)
    for name in ("logprobs", "values", "advantages", "returns"):
        x, y = getattr(a, name)[index], getattr(b, name)
        close(y[b.batch.answer_mask], x[b.batch.answer_mask])
    assert info == pytest.approx(again, rel=1e-6)


# --- the end of an answer -------------------------------------------------------------------------------------------

def cut_off(roll, rows):
    "The same answers, as if these rows had not ended."
    ended = roll.ended.clone()
    ended[rows] = False
    return replace(roll, ended=ended)


def rescaled(rm, shift=0., scale=1.):
    "The same reward model on another scale."
    rm = copy.copy(rm)
    rm._buffers = dict(shift=torch.tensor(shift, dtype=torch.float64), scale=torch.tensor(scale, dtype=torch.float64))
    return rm


@pytest.mark.parametrize("reward", ["rm", "rm+penalty", "gold"])
def test_a_missing_eos_costs(cast, roll, reward):
    "The same answer without its end gets `no_eos`, at its last token; no other row notices."
    whole = replace(roll, ended=torch.ones(6).bool())
    cfg = PPOConfig(reward=reward, no_eos=-200.)
    before, after = (answer_scores(cast.rm, r, cfg)[0] for r in (whole, cut_off(whole, [1, 4])))
    keep = [0, 2, 3, 5]
    assert (after[[1, 4]] == -200.).all() and (before > -200.).all() and torch.equal(after[keep], before[keep])
    (a, _), (b, _) = (experience(cast, r, reward=reward, no_eos=-200., lam=1.) for r in (whole, cut_off(whole, [1, 4])))
    gap = (a.returns - b.returns) * roll.batch.answer_mask   # λ = 1: each return holds all that is still to come
    assert_close(gap, (before - after).unsqueeze(1) * roll.batch.answer_mask, atol=1e-5, rtol=1e-5, check_dtype=False)


@pytest.mark.parametrize("reward", ["rm", "rm+penalty", "gold"])
def test_the_penalty_lowers_the_score_of_a_false_answer(cast, reward):
    "Reward, reward and penalty, or the true score: for what is true and for what is not."
    prompts = [Prompt("detail", "describe the picture .", "", f"scene:{SCENE}")] * 2
    b = cast.vlm.batch(prompts, said := [describe(SCENE), FAULTY])
    got, info = answer_scores(cast.rm, Rollout(prompts, b, None, torch.ones(2).bool(), 1.), PPOConfig(reward=reward))
    learned, extra = score_texts(cast.rm, prompts, said), torch.tensor([penalty(judge(t, SCENE)) for t in said])
    truth = torch.tensor([true_score(p, t) for p, t in zip(prompts, said)])
    assert extra[1] < 1 < extra[0]
    assert_close(got, {"rm": learned, "rm+penalty": learned + extra, "gold": truth - 5}[reward], check_dtype=False)
    assert info["true_score"] == pytest.approx(float(truth.mean())) and info["reward"] == pytest.approx(float(learned.mean()))


@pytest.mark.parametrize("reward", ["rm", "rm+penalty"])
def test_a_bad_answer_does_not_gain_by_not_ending(cast, roll, reward):
    cfg, rm = PPOConfig(reward=reward), rescaled(cast.rm, shift=99.)   # all rewards are far below `no_eos`
    whole = replace(roll, ended=torch.ones(6).bool())
    ended, cut = (answer_scores(rm, r, cfg)[0] for r in (whole, cut_off(whole, list(range(6)))))
    assert (cut <= ended).all()


# --- dropout --------------------------------------------------------------------------------------------------------

def with_dropout(seed=0, double=True):
    "A small model whose configuration asks for dropout everywhere."
    torch.manual_seed(seed)
    model = build_model(SMALL)
    for m in model.modules():
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(m, name, None), float): setattr(m, name, .5)
    vlm = VLM(model.double() if double else model, build_processor(SMALL))
    vlm.model.requires_grad_(False)
    return vlm


@pytest.mark.parametrize("cfg", [SMALL_LORA, LoRAConfig(r=0), LoRAConfig(r=4, dropout=.5)], ids=["adapter", "copy", "adapter with dropout"])
def test_dropout_is_off_in_every_role(prompts, cfg):
    "Sampling and update must hear the same policy: two passes give the same, bit for bit."
    vlm = with_dropout()
    for role in ("actor", "critic", "reward"): vlm.add_role(role, cfg), shake(vlm, role)
    b = vlm.batch(prompts, [p.answer for p in prompts])
    for role in (None, "actor", "critic", "reward"): assert torch.equal(vlm.hidden(b, role), vlm.hidden(b, role)), role
    vlm.model.train()
    assert not torch.equal(vlm.hidden(b), vlm.hidden(b)), "this model would drop"


def test_no_stage_turns_dropout_on(prompts, tmp_path):
    "At learning rate 0 nothing may move: the loss repeats, the KL is 0, no ratio leaves 1."
    vlm = with_dropout()
    vlm.language.requires_grad_(True)
    fit(SFTTask(vlm), lambda step: prompts, FitConfig(steps=2, lr=0., batch=6, weight_decay=0.), tmp_path / "sft", "")
    one, two = (r["loss"] for r in read_jsonl(tmp_path / "sft" / "metrics.jsonl"))
    assert one == pytest.approx(two, rel=1e-12)
    policy, rm, cfg, pool = small_ppo(with_dropout(double=False), actor_lr=0., critic_lr=0.)
    train_ppo(policy, rm, pool, pool[:2], cfg, tmp_path / "ppo")
    for row in read_jsonl(tmp_path / "ppo" / "metrics.jsonl"): assert abs(row["kl"]) < 1e-6 and row["clipped"] == 0


# --- the reference and the pictures ---------------------------------------------------------------------------------

def small_ppo(vlm, **changes):
    "Everything `train_ppo` needs, for two short iterations."
    torch.manual_seed(4)
    rm = RewardModel(vlm, RewardConfig(lora=SMALL_LORA)).requires_grad_(False)
    shake(vlm, "reward")
    short = dict(reward="rm", lora=SMALL_LORA, iterations=2, answers=6, minibatch=4, micro_batch=2, max_new_tokens=6, warmup=0., finish=0.,
                 eval_every=9, save_every=9, keep="last")
    cfg = PPOConfig(**short | changes)
    policy = ActorCritic(rm, cfg)
    policy.train_roles()
    return policy, rm, cfg, sample_prompts(12, "train", dict(detail=1.))


@pytest.mark.parametrize("changes", [dict(), dict(critic="adapter"), dict(lora=LoRAConfig(r=0), actor_lr=1e-3)],
                         ids=["head", "adapter", "copy"])
def test_after_ppo_the_reference_is_the_sft_model_bit_for_bit(prompts, tmp_path, changes):
    "Against the file that SFT wrote, after the real loop with its optimiser."
    torch.manual_seed(1)
    vlm = VLM(build_model(SMALL), build_processor(SMALL))
    vlm.model.requires_grad_(False)
    save_vlm(vlm, tmp_path / "sft")
    policy, rm, cfg, pool = small_ppo(vlm, **dict(actor_lr=.05) | changes)
    train_ppo(policy, rm, pool, pool[:2], cfg, tmp_path / "ppo")
    sft, said = load_vlm(tmp_path / "sft"), [p.answer for p in prompts]
    b = sft.batch(prompts, said)
    with torch.no_grad():
        assert torch.equal(vlm.answer_logits(vlm.batch(prompts, said)), sft.answer_logits(b))
        for role in ("actor", "reward", "critic")[:3 if cfg.critic == "adapter" else 2]:
            assert (vlm.hidden(b, role) - sft.hidden(b)).abs().max() > 1e-3, f"{role} speaks like the trunk"


def fused_step(tower):
    "One step of the optimiser that the library uses; it changes weights behind autograd's version counters."
    tower.requires_grad_(True)
    opt = torch.optim.AdamW(tower.parameters(), .1, fused=True)
    for p in tower.parameters(): p.grad = torch.ones_like(p)
    opt.step()
    tower.requires_grad_(False)


def other_weights(tower): tower.load_state_dict({k: v * 1.2 for k, v in tower.state_dict().items()})


def one_weight(tower): next(tower.parameters()).data.view(-1)[0] += 1.


@pytest.mark.parametrize("change", [fused_step, other_weights, one_weight])
def test_the_cache_notices_every_change_of_the_tower(vlm, prompts, change):
    refs = [p.image for p in prompts if p.image]
    old = vlm.features(refs)
    change(vlm.tower)
    fresh = copy.deepcopy(vlm)
    fresh._features.clear()
    new = vlm.features(refs)
    assert torch.equal(new, fresh.features(refs)) and not torch.equal(new, old)
    n = vlm.encoded
    assert torch.equal(vlm.features(refs[::-1]), new.flip(0)) and vlm.encoded == n, "frozen again, cached again"


def test_a_tower_that_learns_is_asked_every_time(vlm, prompts):
    refs = [p.image for p in prompts if p.image]
    next(vlm.tower.parameters()).requires_grad_(True)   # staged unfreezing: a single layer is enough
    for _ in range(2): vlm.features(refs)
    assert vlm.encoded == 2 * len(refs)


# --- the mutants ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_each_mutant_still_matches_its_source(mutant):
    "`python tests/mutants.py` is too slow for every day; that its snippets are there is not."
    assert mutate(mutant)


def test_the_long_proofs_are_recorded():
    "`make proof` was run on the mutants that are there now, and on thirty kills: tests/proofs.json."
    proofs = json.loads((REPO / "tests" / "proofs.json").read_text("utf-8"))
    assert proofs["mutants"]["killed"] == len(MUTANTS) and not proofs["mutants"]["SURVIVED"]
    assert proofs["kill"]["kills"] >= 30 and {"sft", "preferences", "reward", "ppo", "evaluate"} <= proofs["kill"]["hit"].keys()
    assert proofs["kill"]["while_a_checkpoint_was_written"] > 0
