"What must not change a result, and what must: padding, order, a lost end, dropout."

import copy
from dataclasses import replace

import pytest
import torch
from conftest import FAULTY, SCENE
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import (
    PAID,
    SMALL,
    SMALL_LORA,
    close,
    experience,
    rand,
    rescaled,
    right_mask,
    scores_of,
    seeds,
    shake,
    small_ppo,
    spread_out,
    values,
)
from torch.testing import assert_close

from vlmrlhf_course.base.records import read_jsonl
from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.data.prompts import Prompt
from vlmrlhf_course.model.roles import LoRAConfig
from vlmrlhf_course.model.vlm import VLM, load_vlm, save_vlm
from vlmrlhf_course.rl.advantages import whiten
from vlmrlhf_course.rl.loop import train
from vlmrlhf_course.rl.penalty import penalty
from vlmrlhf_course.rl.ppo import PPOConfig
from vlmrlhf_course.rl.rewards import Judges, Scores
from vlmrlhf_course.rl.rollout import Rollout, sample
from vlmrlhf_course.train.fit import FitConfig, fit
from vlmrlhf_course.train.reward import score_texts
from vlmrlhf_course.train.sft import SFTTask
from vlmrlhf_course.world.judge import judge
from vlmrlhf_course.world.llava import build_model, build_processor
from vlmrlhf_course.world.rubric import true_score
from vlmrlhf_course.world.scenes import describe
from vlmrlhf_course.world.source import DrawnWorld

few = settings(max_examples=12)


@given(
    seeds,
    st.floats(-50, 50),
    st.floats(0.1, 20),
    st.lists(st.integers(1, 5), min_size=2, max_size=4),
)
def test_whitened_advantages_do_not_feel_a_shift_or_a_scale(seed, shift, scale, lengths):
    x, mask = rand(len(lengths), 5, seed=seed), right_mask(lengths, 5)
    assert_close(whiten(scale * x + shift, mask), whiten(x, mask), atol=1e-5, rtol=1e-5)


@few
@given(left=st.integers(0, 9), middle=st.integers(0, 3), right=st.integers(0, 9))
def test_rewards_and_values_do_not_depend_on_padding(cast, left, middle, right):
    b, mask = spread_out(cast.full, left, middle, right), cast.full.answer_mask
    A = mask.shape[1]
    with torch.no_grad():
        # The state before the first token, which its score and V(s_0) read, stands at the last
        # place of the prompt: that is padding where there is a gap, as in no batch of ours.
        first, token_head = int(middle > 0), cast.rm.cfg.granularity == "token"
        if not (first and token_head):
            close(cast.rm(b), cast.rm(cast.full))
        if token_head:
            tokens, want = (cast.rm.token_scores(x) for x in (b, cast.full))
            close(tokens[:, first:A], want[:, first:])
            assert not tokens[:, A:].any()
        got, want = (values(cast.policy, cast.rm, x)[:, :A] for x in (b, cast.full))
        close(got[:, first:][mask[:, first:]], want[:, first:][mask[:, first:]])


@few
@given(
    left=st.integers(0, 6),
    right=st.integers(0, 6),
    order=st.permutations(range(6)),
    n=st.integers(1, 6),
    m=st.integers(1, 6),
)
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
    long = sample(cast.vlm, cast.prompts, "actor", max_new_tokens=9, seed=seed)
    cut = sample(cast.vlm, cast.prompts, "actor", max_new_tokens=short, seed=seed)
    n = cut.batch.answers.shape[1]
    assert torch.equal(cut.batch.answers, long.batch.answers[:, :n])
    assert torch.equal(cut.logprobs, long.logprobs[:, :n])
    assert torch.equal(cut.batch.answer_mask, long.batch.answer_mask[:, :n])
    assert not (cut.ended & ~long.ended).any()


@few
@given(order=st.permutations(range(6)), reward=st.sampled_from([*PAID]))
def test_permuting_the_answers_permutes_the_experience(cast, roll, order, reward):
    "Scores, values, advantages and returns belong to their row; the loss does not know the order."
    index = torch.tensor(order)
    other = Rollout(
        [roll.prompts[i] for i in order],
        roll.batch.rows(index),
        roll.logprobs[index],
        roll.ended[index],
        roll.temperature,
    )
    a, info = experience(cast, roll, reward=PAID[reward])
    b, again = experience(cast, other, reward=PAID[reward])
    assert a.tokens.keys() == {"logprobs", "values", "advantages", "returns"}
    for name in a.tokens:
        x, y = a.tokens[name][index], b.tokens[name]
        close(y[b.batch.answer_mask], x[b.batch.answer_mask])
    assert info == pytest.approx(again, rel=1e-6)


def cut_off(roll, rows):
    "The same answers, as if these rows had not ended."
    ended = roll.ended.clone()
    ended[rows] = False
    return replace(roll, ended=ended)


@pytest.mark.parametrize("reward", PAID)
def test_a_missing_eos_costs(cast, roll, reward):
    "The same answer without its end gets `no_eos`, at its last token; no other row notices."
    whole = replace(roll, ended=torch.ones(6).bool())
    cut = cut_off(whole, [1, 4])
    how = dict(reward=PAID[reward], no_eos=-200.0)
    scores = scores_of(cast.rm, PPOConfig(**how))
    before, after = (scores(r)[0] for r in (whole, cut))
    keep = [0, 2, 3, 5]
    assert (after[[1, 4]] == -200.0).all()
    assert (before > -200.0).all()
    assert torch.equal(after[keep], before[keep])
    # λ = 1: each return holds all that is still to come
    a, _ = experience(cast, whole, lam=1.0, **how)
    b, _ = experience(cast, cut, lam=1.0, **how)
    mask = roll.batch.answer_mask
    want = (before - after).unsqueeze(1) * mask
    got = (a.tokens["returns"] - b.tokens["returns"]) * mask
    assert_close(got, want, atol=1e-5, rtol=1e-5, check_dtype=False)


@pytest.mark.parametrize("reward", PAID)
def test_the_penalty_lowers_the_score_of_a_false_answer(cast, reward):
    "Reward, reward with penalty, by a detector or by the truth itself, or the true score."
    prompts = [Prompt("detail", "describe the picture .", "", f"scene:{SCENE}")] * 2
    said = [describe(SCENE), FAULTY]
    roll = Rollout(prompts, cast.vlm.batch(prompts, said), None, torch.ones(2).bool(), 1.0)
    got, info = scores_of(cast.rm, PPOConfig(reward=PAID[reward]))(roll)
    learned = score_texts(cast.rm, prompts, said)
    extra = torch.tensor([penalty(judge(t, SCENE)) for t in said])
    truth = torch.tensor([true_score(p, t) for p, t in zip(prompts, said)])
    assert extra[1] < 1 < extra[0]
    want = {"rm": learned, "truth": truth - 5}
    want |= {"rm+penalty": learned + extra, "rm+oracle": learned + extra}
    assert_close(got, want[reward], check_dtype=False)
    assert info["true_score"] == pytest.approx(float(truth.mean()))
    assert info["reward"] == pytest.approx(float(learned.mean()))


def test_a_truth_that_nobody_knows_cannot_be_paid(cast, roll):
    "It is no zero: neither in the score nor in the figures. The penalty then judges nothing."
    judges = Judges(cast.rm, DrawnWorld(), PPOConfig().penalty, DrawnWorld())
    with pytest.raises(UserError, match="reward truth: nothing is known about None"):
        Scores(judges, PAID["truth"])(roll)
    got, info = Scores(judges, PAID["rm+penalty"])(roll)
    assert "true_score" not in info
    lone = [i for i, p in enumerate(roll.prompts) if not p.image]
    learned, _ = Scores(judges, PAID["rm"])(roll)
    assert lone == [2] and got[2] == learned[2] and (got != learned).any()


def test_a_penalty_that_nobody_can_judge_is_refused(cast, roll):
    "A source without a judge would pay nothing, and nobody would notice."
    source = DrawnWorld()
    source.judge = lambda prompt, text: None
    judges = Judges(cast.rm, source, PPOConfig().penalty, source)
    for name in ("penalty", "oracle"):
        with pytest.raises(
            UserError, match=f"reward {name}: nobody can judge any .*; leave it out"
        ):
            Scores(judges, {name: 1.0})(roll)
    blind = replace(judges, detector=None)
    with pytest.raises(UserError, match="reward penalty: there is no detector"):
        Scores(blind, PAID["rm+penalty"])(roll)


def test_whose_opinion_is_paid(cast):
    "The penalty is the detector's opinion, the oracle is the source's: here they contradict."

    class Dreamer:
        def judge(self, prompt, text):
            return judge(text, replace(SCENE, groups=SCENE.groups[1:]))  # sees a kite, and no more

    prompts = [Prompt("detail", "describe the picture .", "", f"scene:{SCENE}")] * 2
    said = ["a cat .", "a kite ."]
    roll = Rollout(prompts, cast.vlm.batch(prompts, said), None, torch.ones(2).bool(), 1.0)
    cfg = PPOConfig()
    judges = Judges(cast.rm, DrawnWorld(), cfg.penalty, Dreamer())
    alone = replace(SCENE, groups=SCENE.groups[1:])
    for name, scene in (("penalty", alone), ("oracle", SCENE)):
        got, info = Scores(judges, {name: 1.0})(roll)
        want = torch.tensor([penalty(judge(text, scene), cfg.penalty) for text in said])
        assert_close(got, want, check_dtype=False)
        assert info[name] == pytest.approx(float(want.mean()))
        assert (want[0] < want[1]) == (name == "penalty")


@pytest.mark.parametrize("reward", ["rm", "rm+penalty"])
def test_a_bad_answer_does_not_gain_by_not_ending(cast, roll, reward):
    rm = rescaled(cast.rm, shift=99.0)  # all rewards are far below `no_eos`
    scores = scores_of(rm, PPOConfig(reward=PAID[reward]))
    whole = replace(roll, ended=torch.ones(6).bool())
    ended, _ = scores(whole)
    cut, _ = scores(cut_off(whole, list(range(6))))
    assert (cut <= ended).all()


def with_dropout(seed=0, double=True):
    "A small model whose configuration asks for dropout everywhere."
    torch.manual_seed(seed)
    model = build_model(SMALL)
    for m in model.modules():
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(m, name, None), float):
                setattr(m, name, 0.5)
    vlm = VLM(model.double() if double else model, build_processor(SMALL))
    vlm.model.requires_grad_(False)
    return vlm


@pytest.mark.parametrize(
    "cfg",
    [SMALL_LORA, LoRAConfig(r=0), LoRAConfig(r=4, dropout=0.5)],
    ids=["adapter", "copy", "adapter with dropout"],
)
def test_dropout_is_off_in_every_role(prompts, cfg):
    "Sampling and update must hear the same policy: two passes give the same, bit for bit."
    vlm = with_dropout()
    for role in ("actor", "critic", "reward"):
        vlm.add_role(role, cfg)
        shake(vlm, role)
    b = vlm.batch(prompts, [p.answer for p in prompts])
    for role in (None, "actor", "critic", "reward"):
        assert torch.equal(vlm.hidden(b, role), vlm.hidden(b, role)), role
    vlm.model.train()
    assert not torch.equal(vlm.hidden(b), vlm.hidden(b)), "this model would drop"


def test_no_stage_turns_dropout_on(prompts, tmp_path):
    "At learning rate 0 nothing may move: the loss repeats, the KL is 0, no ratio leaves 1."
    vlm = with_dropout()
    vlm.language.requires_grad_(True)
    cfg = FitConfig(steps=2, lr=0.0, batch=6, weight_decay=0.0)
    fit(SFTTask(vlm), lambda step: prompts, cfg, tmp_path / "sft", "")
    one, two = (r["loss"] for r in read_jsonl(tmp_path / "sft" / "metrics.jsonl"))
    assert one == pytest.approx(two, rel=1e-12)
    ppo, scores, pool = small_ppo(with_dropout(double=False), actor_lr=0.0, critic_lr=0.0)
    train(ppo, scores, pool, pool[:2], tmp_path / "ppo")
    for row in read_jsonl(tmp_path / "ppo" / "metrics.jsonl"):
        assert abs(row["kl"]) < 1e-6 and row["clipped"] == 0


@pytest.mark.parametrize(
    "changes",
    [dict(), dict(critic="adapter"), dict(lora=LoRAConfig(r=0), actor_lr=1e-3)],
    ids=["head", "adapter", "copy"],
)
def test_after_ppo_the_reference_is_the_sft_model_bit_for_bit(prompts, tmp_path, changes):
    "Against the file that SFT wrote, after the real loop with its optimiser."
    torch.manual_seed(1)
    vlm = VLM(build_model(SMALL), build_processor(SMALL))
    vlm.model.requires_grad_(False)
    save_vlm(vlm, tmp_path / "sft")
    ppo, scores, pool = small_ppo(vlm, **dict(actor_lr=0.05) | changes)
    train(ppo, scores, pool, pool[:2], tmp_path / "ppo")
    sft, said = load_vlm(tmp_path / "sft"), [p.answer for p in prompts]
    b = sft.batch(prompts, said)
    roles = ["actor", "reward"] + ["actor_critic"] * (ppo.cfg.critic == "adapter")
    with torch.no_grad():
        assert torch.equal(vlm.answer_logits(vlm.batch(prompts, said)), sft.answer_logits(b))
        for role in roles:
            gap = (vlm.hidden(b, role) - sft.hidden(b)).abs().max()
            assert gap > 1e-3, f"{role} speaks like the trunk"


def fused_step(tower):
    """One step of the optimiser that the library uses:
    it changes weights behind autograd's version counters."""
    tower.requires_grad_(True)
    opt = torch.optim.AdamW(tower.parameters(), 0.1, fused=True)
    for p in tower.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    tower.requires_grad_(False)


def other_weights(tower):
    tower.load_state_dict({k: v * 1.2 for k, v in tower.state_dict().items()})


def one_weight(tower):
    next(tower.parameters()).data.view(-1)[0] += 1.0


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
    assert torch.equal(vlm.features(refs[::-1]), new.flip(0))
    assert vlm.encoded == n, "frozen again, cached again"


def test_a_tower_that_learns_is_asked_every_time(vlm, prompts):
    refs = [p.image for p in prompts if p.image]
    next(vlm.tower.parameters()).requires_grad_(True)  # staged unfreezing: a single layer is enough
    for _ in range(2):
        vlm.features(refs)
    assert vlm.encoded == 2 * len(refs)
