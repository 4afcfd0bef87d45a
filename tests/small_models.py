"What several files of tests use: random tensors, a small model with its roles, and steps on it."

import copy
from dataclasses import replace
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from vlmrlhf_course.data.prompts import Prompt, open_image
from vlmrlhf_course.model.batch import Batch
from vlmrlhf_course.model.roles import LoRAConfig
from vlmrlhf_course.model.vlm import token_logprobs
from vlmrlhf_course.rl import loop
from vlmrlhf_course.rl.ppo import PPO, PPOConfig
from vlmrlhf_course.rl.rewards import Judges, Scores
from vlmrlhf_course.train.reward import RewardConfig, RewardModel
from vlmrlhf_course.world.llava import VLMConfig
from vlmrlhf_course.world.source import DrawnWorld, sample_prompts

SMALL = VLMConfig(vision_width=32, vision_layers=1, width=32, layers=2)
SMALL_LORA = LoRAConfig(r=4, alpha=8)
PAID = {  # what PPO may be paid by: the learned reward, that with a penalty, the truth
    "rm": dict(rm=1.0),
    "rm+penalty": dict(rm=1.0, penalty=1.0),
    "rm+oracle": dict(rm=1.0, oracle=1.0),
    "truth": dict(truth=1.0),
}
seeds = st.integers(0, 10**6)


# --- tensors --------------------------------------------------------------------------------------


def rand(*shape, seed=0, scale=1.0):
    "Normal numbers in float64, the same for the same seed."
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def right_mask(lengths, A):
    "Rows of `A` places of which the first `lengths` are real."
    return torch.arange(A) < torch.tensor(lengths).unsqueeze(1)


def mask():
    "Four answers of different lengths."
    return right_mask([6, 2, 4, 1], 6)


def slope(loss, x):
    return torch.autograd.grad(loss, x)[0]


def close(a, b):
    "The same but for the rounding of float64."
    assert_close(a, b, atol=1e-9, rtol=1e-7)


# --- the model and its batches --------------------------------------------------------------------


def logprobs(vlm, batch, role=None):
    "Log-probabilities of the answers' tokens, 0 at padding."
    return token_logprobs(vlm.answer_logits(batch, role), batch.answers) * batch.answer_mask


def log_ratio(vlm, role, prompt, said):
    "log π(y|x)/π_ref(y|x) of one answer under a role, read alone."
    b = vlm.batch([prompt], [said])
    with torch.no_grad():
        logits = (vlm.rule_out(vlm.answer_logits(b, who)) for who in (role, None))
        new, ref = (float(token_logprobs(z, b.answers).sum()) for z in logits)
    return new - ref


def pixels(vlm, refs):
    "What the processor makes of pictures, in float64."
    pictures = [open_image(r) for r in refs]
    return vlm.processor.image_processor(pictures, return_tensors="pt").pixel_values.double()


def answer_logits_from_pixels(vlm, batch, refs):
    "`answer_logits` by the forward pass of transformers, which knows nothing of cached features."
    logits = vlm.model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        pixel_values=pixels(vlm, refs),
    ).logits
    return logits[:, batch.prompt_length - 1 : -1]


def spread_out(b, left=0, middle=0, right=0, pad=0):
    "The same batch with more padding on the left, between prompt and answer, and on the right."

    def grow(x, y, n):
        return torch.cat([x, torch.full((len(x), n), y, dtype=x.dtype)], 1)

    def spread(x, y):
        prompt, answer = x[:, : b.prompt_length], x[:, b.prompt_length :]
        return torch.cat(
            [grow(x[:, :0], y, left), grow(prompt, y, middle), grow(answer, y, right)], 1
        )

    return Batch(
        spread(b.input_ids, pad),
        spread(b.attention_mask, 0),
        grow(b.answer_mask, False, right),
        b.pictures,
        b.prompt_length + left + middle,
    )


def two_pictures(prompts):
    "Rows with two pictures, none, one, and two of which one is known from another row."
    a, b, c = [p.image for p in prompts if p.image][:3]
    return [
        Prompt("x", "describe the picture .", "a cat .", (a, b)),
        prompts[2],
        replace(prompts[0], image=(c,)),
        Prompt("x", "is there a cat ?", "no .", (b, c)),
    ]


def push(vlm, ids, by=30.0):
    "Make the output layer love these tokens."

    def prefer(module, inputs, out):
        extra = torch.full((*out.shape[:-1], len(ids)), by, dtype=out.dtype)
        return out.index_add(-1, torch.tensor(ids), extra)

    return vlm.model.get_output_embeddings().register_forward_hook(prefer)


# --- roles ----------------------------------------------------------------------------------------


def shake(vlm, role, std=0.3, seed=1):
    "Random weights for a role's adapter or copy, so that it differs from the trunk."
    torch.manual_seed(seed)
    for name, w in vlm.roles[role].weights().items():
        if "lora_A" not in name:
            w.data.add_(torch.randn_like(w) * std)


def reward_model(vlm, kind):
    "A frozen reward model with random weights."
    torch.manual_seed(2)
    rm = RewardModel(vlm, RewardConfig(lora=SMALL_LORA, granularity=kind)).double()
    rm.requires_grad_(False)
    shake(vlm, "reward")
    nn.init.normal_(rm.head.out.weight)
    return rm


def rescaled(rm, shift=0.0, scale=1.0):
    "The same reward model on another scale."
    rm = copy.copy(rm)
    rm._buffers = dict(
        shift=torch.tensor(shift, dtype=torch.float64),
        scale=torch.tensor(scale, dtype=torch.float64),
    )
    return rm


def random_policy(rm, critic):
    "An actor and a critic (`head` or `adapter`) with random weights."
    policy = PPO(rm, PPOConfig(critic=critic, lora=SMALL_LORA)).double()
    for p in policy.critic.head.parameters():
        nn.init.normal_(p, std=0.3)
    shake(policy.vlm, "actor", std=0.05, seed=7)
    return policy


def values(policy, rm, batch):
    "The critic's values of a batch, without their graph."
    states = rm.states(batch) if policy.cfg.critic == "head" else None
    return policy.values(batch, states).detach()


# --- PPO ------------------------------------------------------------------------------------------


class World(DrawnWorld):
    "The drawn world, in which 0 is true of a prompt without a picture: all rewards can be paid."

    def truth(self, prompt, text):
        return super().truth(prompt, text) if prompt.image else 0.0


def scores_of(rm, cfg):
    "The score that a configuration asks for."
    return Scores(Judges(rm, World(), cfg.penalty, World()), cfg.reward, cfg.no_eos)


def with_settings(policy, **changes):
    "The same weights under other settings."
    policy = copy.copy(policy)
    policy.cfg = replace(policy.cfg, **changes)
    return policy


def experience_of(policy, rm, roll, beta=0.1, **more):
    "Experience and figures that `collect` makes of the answers `roll`."
    with mock.patch.object(loop, "try_sample", lambda *args, **kwargs: roll):
        return loop.collect(policy, scores_of(rm, policy.cfg), roll.prompts, beta, **more)


def experience(cast, roll, rm=None, **changes):
    "Experience and figures of the answers `roll`, with these changes of the settings."
    settings = dict(reward=PAID["rm+penalty"]) | changes
    return experience_of(with_settings(cast.policy, **settings), rm or cast.rm, roll)


def loss_of(policy, exp, rows):
    "Loss and metrics of some answers of an experience."
    return policy(policy.collate([(exp, row) for row in rows]))


def small_ppo(vlm, **changes):
    "What `train` needs for two short iterations: PPO, its scores, prompts."
    torch.manual_seed(4)
    rm = RewardModel(vlm, RewardConfig(lora=SMALL_LORA)).requires_grad_(False)
    shake(vlm, "reward")
    short = dict(
        lora=SMALL_LORA,
        iterations=2,
        answers=6,
        minibatch=4,
        micro_batch=2,
        max_new_tokens=6,
        warmup=0.0,
        finish=0.0,
        eval_every=9,
        save_every=9,
        keep="last",
    )
    policy = PPO(rm, PPOConfig(**short | changes))
    policy.learn()
    pool = sample_prompts(12, "train", dict(detail=1.0))
    return policy, scores_of(rm, policy.cfg), pool
