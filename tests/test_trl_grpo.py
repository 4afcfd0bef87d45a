"""GRPO and RLOO side by side with TRL 1.16: losses, their gradients, and advantages.

Optional, as test_trl.py: skipped where TRL is not installed; nothing here depends on it."""

import inspect
import os
import textwrap
import types
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from small_models import mask, rand, slope
from torch.testing import assert_close

try:
    TRL = version("trl")
except PackageNotFoundError:
    TRL = None
if TRL is None or not TRL.startswith("1.16."):
    found = TRL or "is not installed"
    pytest.skip(
        f"TRL {found}; these tests compare with 1.16: pip install trl==1.16.0",
        allow_module_level=True,
    )

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from trl.trainer import grpo_trainer, rloo_trainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

from vlmrlhf_course.rl.grpo import group_advantages, grpo_loss, rloo_advantages, rloo_loss, whole_kl

MOST = 9  # longest answer that is possible
OURS = dict(grpo="answer", bnpo="tokens", dr_grpo="constant")  # their loss_type → our length


def same(x, *args, **kwargs):
    return x


# --- losses ---------------------------------------------------------------------------------------


def trainer_with(new, **settings):
    "What their losses ask of a trainer; log-probabilities are handed over instead of a model."
    fields = dict(
        beta=0.0,
        epsilon_low=0.2,
        epsilon_high=0.2,
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        use_vllm=False,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=MOST,
        args=types.SimpleNamespace(delta=None, use_bias_correction_kl=False),
        model=types.SimpleNamespace(training=True),
        accelerator=types.SimpleNamespace(reduce=same, gather=same),
        _metrics=dict(train=defaultdict(list)),
    )
    trainer = types.SimpleNamespace(**fields | settings)

    def logprobs(*args, **kwargs):
        return new, torch.zeros_like(new), None

    trainer._get_per_token_logps_and_entropies = logprobs
    return trainer


def theirs(kind, trainer, advantages, real, **more):
    "The loss of a trainer's own `_compute_loss`."
    ids = torch.zeros(real.shape, dtype=torch.long)
    inputs = dict(prompt_ids=ids, prompt_mask=ids, completion_ids=ids)
    inputs |= dict(completion_mask=real.long(), advantages=advantages)
    return kind._compute_loss(trainer, None, inputs | more)


@pytest.mark.parametrize("loss_type", OURS)
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("clip", [0.1, 0.2])
def test_grpo_loss(loss_type, beta, clip):
    new, old, ref = rand(4, 6, seed=1).requires_grad_(), rand(4, 6, seed=2), rand(4, 6, seed=3)
    adv, real = rand(4, seed=4), mask()
    settings = dict(beta=beta, loss_type=loss_type, epsilon_low=clip, epsilon_high=clip)
    trainer = trainer_with(new, **settings)
    more = dict(old_per_token_logps=old, ref_per_token_logps=ref)
    want = theirs(GRPOTrainer, trainer, adv, real, **more)
    token_adv = adv.unsqueeze(1).expand(4, 6)
    summed = grpo_loss(new, old, ref, token_adv, real, clip, beta, OURS[loss_type], MOST)
    ours = summed / (real.sum() if loss_type == "bnpo" else 4)
    assert_close(ours, want)
    assert_close(slope(ours, new), slope(want, new))


@pytest.mark.parametrize("clip", [0.1, 0.2, 0.5])
def test_rloo_loss(clip):
    new, old = rand(4, 6, seed=1, scale=0.3).requires_grad_(), rand(4, 6, seed=2, scale=0.3)
    adv, real = rand(4, seed=4), mask()
    trainer = trainer_with(new, epsilon_low=clip, epsilon_high=clip)
    want = theirs(RLOOTrainer, trainer, adv, real, old_logps=(old * real).sum(1))
    ours = rloo_loss(new, old, adv.unsqueeze(1).expand(4, 6), real, clip) / 4
    assert_close(ours, want)
    assert_close(slope(ours, new), slope(want, new))


# --- advantages -----------------------------------------------------------------------------------


def snippet(function, first, last):
    "The lines of a long method from one to another, as a function's body of their own."
    lines = inspect.getsource(inspect.unwrap(function)).splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip().startswith(first))
    stop = next(i for i, line in enumerate(lines) if i >= start and line.strip().startswith(last))
    return textwrap.dedent("\n".join(lines[start : stop + 1]))


def run_snippet(module, kind, first, last, result, settings=None, **names):
    "What `result` is after these very lines of their trainer, which find these `names`."
    code, local = snippet(kind._generate_and_score_completions, first, last), {}
    names["self"] = types.SimpleNamespace(**settings or {})
    exec(code, {**vars(module), **names}, local)
    return local[result]


@pytest.mark.parametrize("scale", ["group", "none"])
@pytest.mark.parametrize("k", [2, 4])
def test_grpo_advantages(scale, k):
    rewards = torch.cat([rand(8, seed=1), torch.full((k,), 3.0, dtype=torch.float64)])
    places = ("mean_grouped_rewards = ", "advantages = advantages / ")
    names = dict(rewards=rewards, num_generations=k, settings=dict(scale_rewards=scale))
    want = run_snippet(grpo_trainer, GRPOTrainer, *places, "advantages", **names)
    assert_close(group_advantages(rewards, k, scale == "group"), want)


@pytest.mark.parametrize("k", [2, 4])
def test_rloo_advantages(k):
    rewards = torch.cat([rand(8, seed=1), torch.full((k,), 3.0, dtype=torch.float64)])
    places = ("grouped_rewards = ", "advantages = torch.zeros_like")
    names = dict(rewards=rewards, num_generations=k)
    want = run_snippet(rloo_trainer, RLOOTrainer, *places, "advantages", **names)
    assert_close(rloo_advantages(rewards, k), want)


def test_kl_that_rloo_charges():
    old, ref, real = rand(4, 6, seed=2), rand(4, 6, seed=3), mask()
    places = ("per_token_kl = old_per", "kl = (per_token_kl")
    names = dict(old_per_token_logps=old, ref_per_token_logps=ref, completion_mask=real)
    want = run_snippet(rloo_trainer, RLOOTrainer, *places, "kl", **names)
    roll = types.SimpleNamespace(logprobs=old, batch=types.SimpleNamespace(answer_mask=real))
    assert_close(whole_kl(roll, types.SimpleNamespace(ref=ref)), want)
