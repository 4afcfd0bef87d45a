"""Side by side with TRL 1.16, where it has the same function. Optional: skipped where TRL is not
installed; nothing here depends on it.

TRL removed PPO, its value loss, GAE and masked whitening (pull request 7020), so these have no
partner there."""

import inspect
import os
import types
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from small_models import mask, pixels, rand, shake, slope
from torch.testing import assert_close

try:
    TRL = version("trl")
except PackageNotFoundError:
    TRL = None
if TRL is None or not TRL.startswith("1.16."):
    pytest.skip(
        f"TRL {TRL or 'is not installed'}; these tests compare with 1.16: pip install trl==1.16.0",
        allow_module_level=True,
    )

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from trl.experimental.gold.gold_trainer import GOLDTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.experimental.utils import get_reward
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.utils import add_fused_lm_head, entropy_from_logits, pad, selective_log_softmax

from vlmrlhf_course.model.batch import pad_sides
from vlmrlhf_course.model.roles import LoRAConfig
from vlmrlhf_course.model.vlm import masked_mean, token_logprobs
from vlmrlhf_course.rl.kl import full_kl, kl_estimate
from vlmrlhf_course.rl.ppo import ppo_policy_loss
from vlmrlhf_course.train.reward import ScoreHead, bt_loss, last_real


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
def test_token_logprobs(dtype, temperature):
    """Values and gradients. In half precision TRL stays there; ours
    are those of the upcast logits, and closer to the truth."""
    z = rand(4, 6, 11, scale=3.0).to(dtype).requires_grad_()
    tokens = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(1))
    ours = token_logprobs(z, tokens, temperature)
    theirs = selective_log_softmax(z, tokens, temperature)
    if dtype == torch.bfloat16:
        exact = token_logprobs(z.double(), tokens, temperature)
        assert_close(ours.float(), theirs.float(), atol=0.1, rtol=0.02)
        assert (ours - exact).abs().max() < 0.01 * (theirs - exact).abs().max()
    else:
        assert_close(ours, theirs)
        w = rand(4, 6, seed=2).to(dtype)
        assert_close(slope((ours * w).sum(), z), slope((theirs * w).sum(), z))


def test_entropy():
    "The entropy that PPO logs."
    z = rand(4, 6, 11, scale=3.0)
    ours = torch.distributions.Categorical(logits=z, validate_args=False).entropy()
    assert_close(ours, entropy_from_logits(z, chunk_size=5))


def test_answer_logprobs_as_in_preference_losses(vlm, full):
    """DPO-style sums: TRL shifts labels and ignores -100, we lay
    answers out on their own. The same figure for each answer."""
    vlm.add_role("actor", LoRAConfig(r=4))
    shake(vlm, "actor")
    no_prompt = torch.zeros(len(full), full.prompt_length).bool()
    said = torch.cat([no_prompt, full.answer_mask], 1)
    labels = full.input_ids.masked_fill(~said, -100)
    for role in (None, "actor"):
        per_token = token_logprobs(vlm.answer_logits(full, role), full.answers) * full.answer_mask
        logits = vlm.parts(role)[1](vlm.hidden(full, role))
        total = ORPOTrainer.get_batch_logps(logits, labels)
        mean = ORPOTrainer.get_batch_logps(logits, labels, average_log_prob=True)
        assert_close(per_token.sum(1), total)
        assert_close(per_token.sum(1) / full.lengths, mean)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_vlm_logprobs_through_grpos_own_forward(vlm, prompts, temperature):
    """From pixels, through TRL's fused head, without our position ids
    or cached features: the same log-probabilities and entropy."""
    seen = [p for p in prompts if p.image]
    b = vlm.batch(seen, [p.answer for p in seen])
    want = token_logprobs(vlm.answer_logits(b), b.answers, temperature)
    entropy = torch.distributions.Categorical(logits=vlm.answer_logits(b) / temperature).entropy()
    add_fused_lm_head(vlm.model, temperature, outputs=("log_probs", "entropy"))
    trainer = types.SimpleNamespace(accelerator=types.SimpleNamespace(autocast=torch.no_grad))
    method = inspect.unwrap(GRPOTrainer._get_per_token_logps_and_entropies)  # without its profiler
    got, their_entropy, _ = method(
        trainer,
        vlm.model,
        b.input_ids,
        b.attention_mask,
        b.answers.shape[1],
        compute_entropy=True,
        pixel_values=pixels(vlm, [p.image for p in seen]),
        num_images=[1] * len(seen),
        batch_size=2,
    )
    for ours, theirs in ((want, got), (entropy, their_entropy)):  # theirs is float32
        assert_close(ours[b.answer_mask].float(), theirs[b.answer_mask], atol=1e-5, rtol=1e-5)


def grpo(new, old, ref, advantages, mask, beta=0.0, clip=0.2):
    """GRPO's own `_compute_loss`, with log-probabilities
    handed to it instead of a model: loss, metrics."""
    trainer = types.SimpleNamespace(
        beta=beta,
        epsilon_low=clip,
        epsilon_high=clip,
        loss_type="bnpo",
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        use_vllm=False,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        args=types.SimpleNamespace(delta=None, use_bias_correction_kl=False),
        model=types.SimpleNamespace(training=True),
        accelerator=types.SimpleNamespace(reduce=lambda x, reduction: x, gather=lambda x: x),
        _metrics=dict(train=defaultdict(list)),
    )
    of_model = new, torch.zeros_like(new), None
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: of_model
    ids = torch.zeros(mask.shape, dtype=torch.long)
    inputs = dict(
        prompt_ids=ids,
        prompt_mask=ids,
        completion_ids=ids,
        completion_mask=mask.long(),
        advantages=advantages,
        old_per_token_logps=old,
        ref_per_token_logps=ref,
    )
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss, {k: v[0] for k, v in trainer._metrics["train"].items()}


@pytest.mark.parametrize("clip", [0.1, 0.2, 0.4])
def test_clipped_loss(clip):
    """PPO's policy loss is GRPO's, given the same token
    advantages: values, gradients, share of clipped tokens."""
    new = rand(4, 6, seed=1).requires_grad_()
    old = rand(4, 6, seed=2)
    adv = rand(4, 6, seed=3)
    m = mask()
    loss, metrics = grpo(new, old, None, adv, m, clip=clip)
    ours = ppo_policy_loss(new, old, adv, m, clip) / m.sum()
    assert_close(ours, loss)
    assert_close(slope(ours, new), slope(loss, new))
    stopped = (slope(ppo_policy_loss(new, old, adv, m, clip), new) == 0) & m
    share = float(masked_mean(stopped.double(), m))
    assert share == pytest.approx(metrics["clip_ratio/region_mean"])


def test_k3_and_masked_mean():
    "GRPO's KL term and the mean that it logs."
    new, ref, m = rand(4, 6, seed=1).requires_grad_(), rand(4, 6, seed=2), mask()
    none = torch.zeros(4, 6, dtype=torch.float64)
    loss, metrics = grpo(new, new.detach(), ref, none, m, beta=0.3)
    kl = masked_mean(kl_estimate(new, ref, "k3"), m)
    assert_close(0.3 * kl, loss)
    assert_close(slope(0.3 * kl, new), slope(loss, new))
    assert metrics["kl"] == pytest.approx(float(kl.detach()))


def test_full_kl():
    "Distillation calls the policy the student: β = 1 is KL[policy‖ref], β = 0 the other way."
    z = rand(4, 6, 9).requires_grad_()
    ref = rand(4, 6, 9, seed=1)
    labels = torch.where(mask(), 0, -100)
    for way, beta in (("policy||ref", 1), ("ref||policy", 0)):
        ours = masked_mean(full_kl(z, ref, way), mask())
        theirs = GOLDTrainer.generalized_jsd_loss(z, ref, labels, beta)
        assert_close(ours, theirs)
        assert_close(slope(ours, z), slope(theirs, z))


def test_bradley_terry():
    """RewardTrainer's loss, gradient and accuracy. Its margin (inside
    the sigmoid) and its pull (on the sum) are other than ours."""
    chosen, rejected = rand(5).requires_grad_(), rand(5, seed=1)
    trainer = types.SimpleNamespace(
        model=types.SimpleNamespace(training=False),
        args=types.SimpleNamespace(center_rewards_coefficient=None),
        _total_train_tokens=0,
        accelerator=types.SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics=dict(eval=defaultdict(list)),
    )

    def model(**inputs):
        return types.SimpleNamespace(logits=torch.cat([chosen, rejected]).unsqueeze(-1))

    theirs = RewardTrainer.compute_loss(trainer, model, {})
    ours = bt_loss(chosen, rejected).mean()
    assert_close(ours, theirs)
    assert_close(slope(ours, chosen), slope(theirs, chosen))
    right = float((chosen > rejected).double().mean())
    assert trainer._metrics["eval"]["accuracy"] == [pytest.approx(right)]


def test_score_at_the_last_real_token():
    """A scalar head without normalisation, read where TRL
    reads it: at the token before the first padding."""
    torch.manual_seed(0)
    head, states, m = ScoreHead(8, norm="none").double(), rand(4, 6, 8), mask()

    def body(**inputs):
        return types.SimpleNamespace(last_hidden_state=states)

    model = types.SimpleNamespace(base_model_prefix="body", body=body, score=head.out)
    scores, theirs, _ = get_reward(model, torch.where(m, 5, 0), pad_token_id=0, context_length=0)
    assert_close(head(states, m), theirs)
    assert_close(last_real(scores.squeeze(-1), m), theirs)


def test_padding():
    prompts, answers = [[5, 6, 7], [8], [9, 10]], [[1], [2, 3, 4], [1, 2]]
    left = pad([torch.tensor(x) for x in prompts], 0, "left")
    right = pad([torch.tensor(x) for x in answers], 0, "right")
    b = pad_sides(prompts, answers, 0)
    assert torch.equal(b.input_ids, torch.cat([left, right], 1))
    assert torch.equal(b.answers, right)
