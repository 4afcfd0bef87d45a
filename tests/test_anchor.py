"""The anchor: what a policy shall keep saying as it did, at a price for each nat of a
demonstration, whatever the loss is a mean over."""

from types import SimpleNamespace

import pytest
import torch
from commands import copy_stages, smoke
from small_models import SMALL, experience_of, loss_of, push, shake, small_ppo, with_settings
from test_learning import same_for_every_split

from vlmrlhf_course.base.records import read_jsonl
from vlmrlhf_course.base.runs import Run
from vlmrlhf_course.base.stages import config_of
from vlmrlhf_course.cli import main
from vlmrlhf_course.data.prompts import KINDS, Prompt
from vlmrlhf_course.model.vlm import VLM
from vlmrlhf_course.rl.grpo import GRPO, RLOO, GRPOConfig, RLOOConfig
from vlmrlhf_course.rl.loop import kept_in_mind, train
from vlmrlhf_course.rl.rollout import sample
from vlmrlhf_course.world.llava import build_model, build_processor
from vlmrlhf_course.world.source import DrawnWorld

# --- its price ------------------------------------------------------------------------------------


def forgotten_by_hand(vlm, prompts):
    "Σ over answer tokens, and over the vocabulary, of p_ref · (log p_ref − log p)."
    total = 0.0
    with torch.no_grad():
        for p in prompts:
            b = vlm.batch([p], [p.answer])
            now, ref = (
                vlm.rule_out(vlm.answer_logits(b, role)).log_softmax(-1)[0]
                for role in ("actor", None)
            )
            said = ref > -1e4  # what is ruled out has no share
            total += float(((ref.exp() * (ref - now))[said]).sum())
    return total


@pytest.fixture
def step(policy, token_rm, vlm, prompts):
    "PPO with an anchor, an experience of six answers, and demonstrations for three of them."
    push(vlm, [vlm.eos_id], 2.0)
    ppo = with_settings(policy, micro_batch=2, anchor=0.7)
    roll = sample(vlm, prompts, "actor", max_new_tokens=9, seed=2)
    exp, _ = experience_of(ppo, token_rm, roll)
    exp.remember = tuple(prompts[:3])
    return ppo, exp, prompts


GROUPED = [(GRPO, GRPOConfig, dict(length=length)) for length in ("answer", "tokens")]
GROUPED.append((RLOO, RLOOConfig, {}))


@pytest.fixture(params=GROUPED, ids=["grpo", "grpo by tokens", "rloo"])
def grouped(request, token_rm, vlm, prompts):
    "An algorithm of groups with an anchor, and four answers with three demonstrations."
    push(vlm, [vlm.eos_id], 2.0)
    kind, config, changes = request.param
    cfg = config(anchor=0.5, answers_per_prompt=2, **changes)
    algorithm = kind(token_rm, cfg, "actor").double()
    shake(vlm, "actor", std=0.05, seed=7)
    algorithm.learn()
    asked = [p for p in prompts[:2] for _ in range(2)]
    exp, _ = experience_of(algorithm, token_rm, sample(vlm, asked, "actor", max_new_tokens=5))
    exp.remember = tuple(prompts[3:])
    return algorithm, exp


def test_forgetting_by_hand(step):
    ppo, _, prompts = step
    want = forgotten_by_hand(ppo.vlm, prompts)
    got = ppo.forgotten(tuple(prompts)).detach()
    assert float(got) == pytest.approx(want, rel=1e-6) and want > 0.01


def test_the_anchor_is_added_to_the_loss(step):
    """A demonstration weighs as much as the answers have tokens for each demonstration, in all of
    the experience. The figure is the mean, and has no price."""
    ppo, exp, prompts = step
    rows = [4, 0, 2]  # the first and the third of the demonstrations come along
    anchored, metrics = loss_of(ppo, exp, rows)
    free, plain = loss_of(with_settings(ppo, anchor=0.0), exp, rows)
    each = int(exp.batch.answer_mask.sum()) / 3
    want = forgotten_by_hand(ppo.vlm, [prompts[0], prompts[2]]) * each
    assert float(anchored.detach() - free.detach()) == pytest.approx(0.7 * want, rel=1e-6)
    tokens = int(exp.batch.answer_mask[rows].sum())
    assert metrics["anchor"] == pytest.approx(want / tokens, rel=1e-6)
    assert "anchor" not in plain and metrics.keys() - plain.keys() == {"anchor"}


def added_to_the_mean(algorithm, exp):
    "What the anchor adds to the loss of all answers, and the figure of the log."
    rows = range(len(exp.batch))
    anchored, metrics = loss_of(algorithm, exp, rows)
    free, _ = loss_of(with_settings(algorithm, anchor=0.0), exp, rows)
    return float((anchored - free).detach()) / algorithm.count(exp), metrics["anchor"]


def test_a_price_for_each_nat_of_a_demonstration(step):
    "PPO's loss is a mean over tokens."
    ppo, exp, prompts = step
    nats = forgotten_by_hand(ppo.vlm, prompts[:3]) / 3
    assert added_to_the_mean(ppo, exp) == pytest.approx((0.7 * nats, nats), rel=1e-6)


def test_the_same_price_for_groups(grouped):
    "A mean over answers, or over tokens: the anchor means the same as PPO's."
    algorithm, exp = grouped
    nats = forgotten_by_hand(algorithm.vlm, exp.remember) / 3
    assert added_to_the_mean(algorithm, exp) == pytest.approx((0.5 * nats, nats), rel=1e-6)


def test_the_price_does_not_depend_on_how_many_demonstrations(grouped, prompts):
    "One of them, or the same one for each answer."
    algorithm, exp = grouped
    found = []
    for often in (1, 4):
        exp.remember = (prompts[4],) * often
        found.append(added_to_the_mean(algorithm, exp))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_the_anchor_does_not_depend_on_micro_batches(step):
    "Also where some of them have no demonstration: each is remembered just once."
    ppo, exp, _ = step
    shake(ppo.vlm, "actor", std=0.02, seed=11)
    _, metrics = same_for_every_split(ppo, [(exp, i) for i in (3, 0, 5, 2, 1, 4)])
    assert metrics["anchor"] > 0


def test_an_anchored_group_does_not_depend_on_micro_batches(grouped):
    algorithm, exp = grouped
    _, metrics = same_for_every_split(algorithm, [(exp, i) for i in (3, 0, 2, 1)])
    assert metrics["anchor"] > 0


def test_an_anchored_update_without_a_demonstration_is_logged(tmp_path):
    "Of six answers one has a demonstration: some minibatches have none, and all have the figure."
    vlm = VLM(build_model(SMALL), build_processor(SMALL))
    ppo, scores, pool = small_ppo(vlm, anchor=1.0, minibatch=2, epochs=2)
    one = [Prompt("brief", "what is this ?", "a cat .", pool[0].image)]
    train(ppo, scores, pool, pool[:2], tmp_path / "ppo", demonstrations=lambda step: one)
    first, second = (row["anchor"] for row in read_jsonl(tmp_path / "ppo" / "metrics.jsonl"))
    assert 0 < first < second or 0 < second  # nothing is forgotten before the first update


# --- what is kept in mind -------------------------------------------------------------------------


def in_mind(tmp_path, *overrides):
    "Demonstrations of three steps, for an arm of 80 answers with these settings."
    run = Run(tmp_path, "smoke", ["ppo_rm.answers=80", "ppo_rm.pool=200", *overrides])
    run.source = DrawnWorld()
    task = SimpleNamespace(cfg=config_of(run, "ppo_rm"), run=run, name="ppo_rm")
    demonstrations = kept_in_mind(task)
    return [demonstrations(step) for step in range(3)]


def kinds_of(steps):
    return {p.kind for prompts in steps for p in prompts}


def test_nothing_is_kept_in_mind_without_an_anchor(tmp_path):
    assert in_mind(tmp_path) == [[], [], []]


def test_a_demonstration_for_each_answer_is_kept_in_mind(tmp_path):
    "Questions whether something is there, unless `anchor_kinds` says more; whatever the arm asks."
    steps = in_mind(tmp_path, "ppo_rm.anchor=1")
    assert list(map(len, steps)) == [80, 80, 80] and kinds_of(steps) == {"exists"}
    assert {p.answer for prompts in steps for p in prompts} == {"yes .", "no ."}
    assert steps[0] != steps[1] and steps == in_mind(tmp_path, "ppo_rm.anchor=1")
    for asked in ("{exists: 1}", "{detail: 1}"):
        assert in_mind(tmp_path, "ppo_rm.anchor=1", f"ppo_rm.kinds={asked}") == steps


def test_the_kinds_that_are_kept_in_mind(tmp_path):
    "Those with a weight. Where a picture has no relation, none is remembered."
    mixture = "ppo_rm.anchor_kinds={count: 1, text: 3, brief: 0}"
    steps = in_mind(tmp_path, "ppo_rm.anchor=1", mixture)
    assert list(map(len, steps)) == [80, 80, 80] and kinds_of(steps) == {"count", "text"}
    drawn = [p.kind for prompts in steps for p in prompts]
    assert 0.6 < drawn.count("text") / len(drawn) < 0.9
    apart = in_mind(tmp_path, "ppo_rm.anchor=1", "ppo_rm.anchor_kinds={relation: 1}")
    assert kinds_of(apart) == {"relation"} and all(0 < len(prompts) < 80 for prompts in apart)
    every = "{" + ", ".join(f"{kind}: 1" for kind in KINDS) + "}"
    assert kinds_of(in_mind(tmp_path, "ppo_rm.anchor=1", f"ppo_rm.anchor_kinds={every}")) == {
        *KINDS
    }


def test_an_anchored_arm(smoke_run, tmp_path):
    "Through the command; what it has forgotten is in its log."
    copy_stages(smoke_run, tmp_path / "run", "sft", "preferences", "reward")
    sets = ["ppo_rm.anchor=2", "ppo_rm.minibatch=2"]
    assert main(smoke("ppo", tmp_path / "run", "--arm", "ppo_rm", "--set", *sets)) == 0
    rows = read_jsonl(tmp_path / "run" / "ppo_rm" / "metrics.jsonl")
    assert all(row["anchor"] >= 0 for row in rows) and rows[-1]["anchor"] > 0
