"""What PPO does when numbers break: an update that is not finite is skipped and counted, three in a
row stop the run, and so does a KL that no rollback tames."""

import statistics
from dataclasses import replace

import pytest
import torch
from small_models import SMALL, scores_of
from torch.testing import assert_close

from vlmrlhf_course.base.launch import make_accelerator
from vlmrlhf_course.base.metrics import StepGuard
from vlmrlhf_course.base.records import read_jsonl
from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.cli import main
from vlmrlhf_course.model.roles import LoRAConfig
from vlmrlhf_course.model.vlm import VLM
from vlmrlhf_course.rl import loop, ppo
from vlmrlhf_course.rl import state as state_of_a_run
from vlmrlhf_course.rl.algorithm import phase
from vlmrlhf_course.rl.ppo import PPO, PPOConfig
from vlmrlhf_course.rl.rollout import answer_figures, sample
from vlmrlhf_course.train.reward import RewardConfig, RewardModel
from vlmrlhf_course.world.llava import build_model, build_processor
from vlmrlhf_course.world.source import sample_prompts

LORA, UPDATES = LoRAConfig(r=4, alpha=8), 4  # updates in an iteration


def config(**changes):
    settings = dict(
        lora=LORA,
        iterations=2,
        answers=8,
        minibatch=4,
        epochs=2,
        max_new_tokens=6,
        warmup=0.0,
        finish=0.0,
        actor_lr=1e-3,
        eval_every=9,
        save_every=9,
        keep="last",
    )
    return PPOConfig(**settings | changes)


def start(cfg):
    "PPO and a reward model with random weights, and prompts."
    torch.manual_seed(0)
    vlm = VLM(build_model(SMALL), build_processor(SMALL))
    vlm.model.requires_grad_(False)
    rm = RewardModel(vlm, RewardConfig(lora=LORA)).requires_grad_(False)
    policy = PPO(rm, cfg)
    policy.learn()
    return policy, rm, sample_prompts(12, "train", dict(detail=1.0))


def run(folder, policy, rm, prompts):
    "Train into `folder/arm`."
    loop.train(policy, scores_of(rm, policy.cfg), prompts, prompts[:2], folder / "arm")


def train(folder, cfg):
    "A policy that was trained, and what was logged."
    policy, rm, prompts = start(cfg)
    run(folder, policy, rm, prompts)
    return policy, read_jsonl(folder / "arm" / "metrics.jsonl")


def spoil(monkeypatch, calls, break_it):
    "Let `break_it` change the policy loss at these calls (0 is the first; None: at each)."
    right, seen = ppo.ppo_policy_loss, []

    def wrapped(logprobs, *args, **kwargs):
        seen.append(1)
        loss = right(logprobs, *args, **kwargs)
        return break_it(loss, logprobs) if calls is None or len(seen) - 1 in calls else loss

    monkeypatch.setattr(ppo, "ppo_policy_loss", wrapped)


def nan_loss(loss, logprobs):
    return loss * float("nan")


def infinite_loss(loss, logprobs):
    return loss + float("inf")  # its gradient is finite


def nan_gradient(loss, logprobs):
    # its value is finite, its gradient is 0 × the infinite slope of the root
    return loss + (logprobs * 0).sqrt().sum()


@pytest.mark.parametrize("break_it", [nan_loss, infinite_loss, nan_gradient])
def test_a_broken_update_is_skipped_and_counted(tmp_path, monkeypatch, break_it):
    spoil(monkeypatch, {1}, break_it)
    policy, rows = train(tmp_path, config())
    assert [r["skipped"] for r in rows] == [1, 1]
    assert all(p.isfinite().all() for p in policy.parameters())
    for key in ("loss", "grad_norm", "policy_loss", "value_loss"):
        figures = torch.tensor([r[key] for r in rows])
        assert (figures.abs() < 1e9).all(), "the mean holds the broken update"


def test_skipping_leaves_the_weights_alone(tmp_path, monkeypatch):
    """With every other update broken, the weights are those of a run that never had it: nothing of
    it is in the moments of Adam, or left over in the gradient."""
    good, rows = train(tmp_path / "a", config(iterations=1, epochs=1, minibatch=8))
    assert rows[0]["skipped"] == 0
    spoil(monkeypatch, {0, 1}, nan_gradient)  # two broken updates, and then the one of above
    monkeypatch.setattr(loop, "minibatches", lambda exp, *a: [torch.arange(8)] * 3)
    other, rows = train(tmp_path / "b", config(iterations=1, epochs=1, minibatch=8))
    assert rows[0]["skipped"] == 2
    for a, b in zip(good.parameters(), other.parameters()):
        assert_close(a, b, rtol=0, atol=2e-5)
    adapters = [p for n, p in good.named_parameters() if "lora_B" in n and ".actor." in n]
    assert any((p.abs() > 1e-4).any() for p in adapters), "the run learned nothing"


def test_three_in_a_row_stop_the_run(tmp_path, monkeypatch):
    second_iteration = {UPDATES, UPDATES + 1, UPDATES + 2}  # which is step 1
    spoil(monkeypatch, second_iteration, nan_loss)
    policy, rm, prompts = start(config(iterations=3))
    message = "arm, step 1: loss nan.*3 updates in a row.*learning rate"
    with pytest.raises(UserError, match=message) as e:
        run(tmp_path, policy, rm, prompts)
    assert "\n" not in str(e.value)
    assert all(p.isfinite().all() for p in policy.parameters()), "a broken update was taken"


def test_two_in_a_row_do_not(tmp_path, monkeypatch):
    # a sound one in between starts the count again
    spoil(monkeypatch, {0, 1, 3, 4, 6, 7}, nan_loss)
    _, rows = train(tmp_path, config())
    assert [r["skipped"] for r in rows] == [3, 6]


def test_an_iteration_without_a_sound_update_is_logged(tmp_path, monkeypatch):
    spoil(monkeypatch, {0, 1}, nan_loss)
    _, rows = train(tmp_path, config(iterations=1, epochs=1))
    assert rows[0]["skipped"] == 2 and "loss" not in rows[0] and rows[0]["kl"] < 1e-6


def test_a_broken_reward_model_stops_the_run(tmp_path):
    """The likeliest cause in practice: one reward that is
    not a number would spoil every advantage of the batch."""
    policy, rm, prompts = start(config())
    with torch.no_grad():
        rm.head.out.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="reward rm: nan for the answer"):
        run(tmp_path, policy, rm, prompts)
    for n, p in policy.named_parameters():
        if ".actor." in n or n.startswith("critic."):
            assert p.isfinite().all(), n


def test_guard_remembers_over_a_resumption():
    a, b = (StepGuard(make_accelerator(), "arm") for _ in range(2))
    for norm in (1.0, float("inf"), float("nan")):
        a(0, 0.0, norm)
    b.load_state_dict(a.state_dict())
    assert b.skipped == 2
    with pytest.raises(UserError):
        b(1, float("nan"), 1.0)


def test_emergencies_have_a_limit(monkeypatch):
    monkeypatch.setattr(state_of_a_run, "MAX_EMERGENCIES", 2)
    cfg = config(kl_emergency=10.0)
    policy, *_ = start(cfg)
    state = state_of_a_run.State(policy, cfg)
    assert state.after(11.0, cfg)
    assert state.after(float("nan"), cfg)  # a KL that is no number is an emergency, too
    with pytest.raises(UserError, match="kl_emergency=10.*3 times.*actor_lr"):
        state.after(12.0, cfg)


def test_the_command_line_says_it_in_one_line(tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, None, nan_loss)
    where = ["--scale", "smoke", "--out", str(tmp_path / "run")]
    assert main(["ppo", *where, "--set", "ppo.epochs=4"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("vlmrlhf: ppo, step 0: loss nan")


# --- figures and settings that the loop logs and uses ---------------------------------------------


@pytest.fixture
def spoken():
    "A reward model, and answers to it; some of them are cut off."
    policy, rm, prompts = start(config())
    roll = sample(policy.vlm, prompts, "actor", max_new_tokens=12, seed=1)
    assert not roll.ended.all() and roll.ended.any()
    return rm, roll


def test_answer_figures(spoken):
    roll = spoken[1]
    noise = torch.randn(roll.logprobs.shape, generator=torch.Generator().manual_seed(0))
    ref = roll.logprobs + 0.1 * noise
    got, n = answer_figures(roll, ref), roll.batch.lengths.tolist()
    said = [row[:k].tolist() for row, k in zip(roll.batch.answers, n)]
    by_policy = [p[:k] for p, k in zip(roll.logprobs, n)]
    by_ref = [r[:k] for r, k in zip(ref, n)]
    kl = [float((p - r).sum()) for r, p in zip(by_ref, by_policy)]
    want = dict(
        kl=sum(kl) / len(kl),
        kl_std=statistics.pstdev(kl),
        kl_max=max(kl),
        kl_token=sum(kl) / sum(n),
        length=sum(n) / len(n),
        unique=sum(len(set(s)) / len(s) for s in said) / len(said),
        perplexity=float((-torch.cat(by_policy)).mean().exp()),
    )
    assert got == pytest.approx(want, rel=1e-5)
    assert 0 < got["unique"] < 1 < got["perplexity"]


def test_length_costs_points(spoken):
    """For each token, not for each character; an answer that was
    cut off pays, too, and has at most the score of those."""
    rm, roll = spoken
    plain, cfg = rm(roll.batch), config(reward=dict(rm=1.0, length=-0.5))
    dear, info = scores_of(rm, cfg)(roll)
    want = plain - 0.5 * roll.batch.lengths
    assert_close(dear, torch.where(roll.ended, want, want.clamp(max=cfg.no_eos)))
    assert info["score"] == pytest.approx(float(dear.mean()))
    assert info["reward_min"] <= info["reward"] <= info["reward_max"]
    assert info["reward_std"] > 0


def test_half_precision_does_not_round_points(spoken):
    "The reward model may answer in bfloat16; the exact score keeps its decimals."
    rm, roll = spoken
    whole = replace(roll, ended=torch.ones_like(roll.ended))

    class Half:
        vlm, shift = rm.vlm, rm.shift.bfloat16()

        def __call__(self, *args):
            return rm(*args).bfloat16()

    cfg = config(reward=dict(truth=1.0, length=-0.01))
    exact, half = (scores_of(model, cfg)(whole)[0] for model in (rm, Half()))
    assert torch.equal(exact, half)
    assert half.dtype == torch.float32


def test_every_metric_is_logged(tmp_path):
    _, rows = train(tmp_path, config())
    keys = (
        "reward reward_std reward_max reward_min kl kl_max kl_token length unique perplexity "
        "grad_norm value_loss value policy_loss entropy clipped skipped"
    )
    for key in keys.split():
        assert all(isinstance(r[key], (int, float)) for r in rows), key


def test_cosine_schedule():
    cfg = config(schedule="cosine", iterations=100, warmup=0.1)
    factors = [phase(i, cfg)[1] for i in range(100)]
    assert factors[9] == max(factors) == 1
    assert factors[0] == pytest.approx(0.1)
    assert factors[-1] < 0.01
    assert all(a > b for a, b in zip(factors[10:], factors[11:]))
    assert [phase(i, cfg)[0] for i in (0, 50)] == ["warm-up", "main"]
    with pytest.raises(ValueError, match="schedule"):
        config(schedule="linear")
