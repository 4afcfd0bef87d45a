"""The textbook pipeline, and whether it computes what the library does.

Prompt by prompt, `generate` for one answer at a time, four full models (actor, reference, critic,
reward), each of which encodes the picture at every pass, a pass for the log-probabilities of what
was sampled, advantages in a Python list, then one forward and one backward pass an answer. The same
answers, minibatches, optimiser steps, loss."""

import copy
from contextlib import nullcontext

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.testing import assert_close

from benchmarks.common import Clock, Library, TowerCount
from vlmrlhf_course.data.prompts import open_image
from vlmrlhf_course.model.vlm import VLM, token_logprobs
from vlmrlhf_course.rl.penalty import penalty
from vlmrlhf_course.rl.ppo import PPOConfig
from vlmrlhf_course.train.fit import backward_through
from vlmrlhf_course.world.judge import judge_reply
from vlmrlhf_course.world.scenes import scene_of


def full_model(vlm: VLM, role: str | None):
    """A model of its own that says what `vlm` says in `role`: a copy of everything, the adapter
    merged into the weights."""
    model = copy.deepcopy(vlm.model)
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, BaseTunerLayer):
            continue
        if role:
            layer.merge(adapter_names=[role])
        model.set_submodule(name, layer.get_base_layer())
    vars(vlm.family.part(model, "language")).pop("_adapted", None)
    return model.requires_grad_(False)


class Naive:
    """Four models. `shared`: one in memory that acts as all four, for sizes of which four do not
    fit; the work is the same."""

    def __init__(self, policy, rm, cfg: PPOConfig, shared: bool = False):
        self.vlm, self.rm, self.cfg, self.shared = policy.vlm, rm, cfg, shared
        self.clock = Clock(policy.vlm.device)
        reward = rm.role.name
        critic = policy.critic.name if cfg.critic == "adapter" else reward
        self.roles = dict(actor=policy.actor.name, reference=None, critic=critic, reward=reward)
        self.models = {}
        for name, role in self.roles.items():
            self.models[name] = self.vlm.model if shared else full_model(self.vlm, role)
        self.towers = {m: TowerCount(self.vlm, m) for m in self.models.values()}
        value = policy.critic.head
        self.value = value if shared else copy.deepcopy(value)
        if shared:
            groups = [group.params for group in policy.groups()]
        else:
            # towers stay frozen here too: where they are trained there is nothing to cache
            head = self.models["actor"].get_output_embeddings()
            for part in (self.language("actor"), head, self.language("critic")):
                part.requires_grad_(True)
            of_critic = [*self.models["critic"].parameters(), *self.value.parameters()]
            groups = [[*self.models["actor"].parameters()], of_critic]
        self.trained = [[p for p in group if p.requires_grad] for group in groups]
        usual = dict(betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.optimizer = torch.optim.AdamW(sum(self.trained, []), lr=cfg.actor_lr, **usual)

    def language(self, name):
        return self.vlm.family.part(self.models[name], "language")

    def acting(self, name):
        return self.vlm.acting(self.roles[name]) if self.shared else nullcontext()

    @property
    def encoded(self):
        return sum(t.images for t in self.towers.values())

    def inputs(self, prompt):
        "Tokens and pixels of one prompt."
        ids = torch.tensor([self.vlm.prompt_ids(prompt)], device=self.vlm.device)
        if not prompt.image:
            return dict(input_ids=ids)
        picture = open_image(prompt.image, self.vlm.model.config.vision_config.image_size)
        pixels = self.vlm.processor.image_processor([picture], return_tensors="pt").pixel_values
        return dict(input_ids=ids, pixel_values=pixels.to(self.vlm.device, self.vlm.tower.dtype))

    def states(self, name: str, inputs: dict, answer: torch.Tensor) -> torch.Tensor:
        "One model on a prompt with its answer (1, A), from pixels: hidden states (1, P+A, H)."
        whole = inputs | dict(input_ids=torch.cat([inputs["input_ids"], answer], 1))
        with self.acting(name):
            return self.models[name].model(**whole, use_cache=False).last_hidden_state

    def logprobs(self, name, inputs, answer):
        "(1, A), from logits at every position."
        head = self.models[name].get_output_embeddings()
        logits = self.vlm.rule_out(head(self.states(name, inputs, answer)))
        first = inputs["input_ids"].shape[1] - 1  # the position that predicts the first token
        return token_logprobs(logits[:, first:-1], answer, self.cfg.temperature)

    def values(self, inputs, answer):
        "(1, A) from the critic, whose head looks at the tower's output."
        states, seen = self.states("critic", inputs, answer), "pixel_values" in inputs
        features = self.towers[self.models["critic"]].features if seen else None
        first = inputs["input_ids"].shape[1] - 1
        sees = torch.tensor([seen], device=states.device)
        return self.value(states[:, first:-1], features, sees)

    @torch.no_grad()
    def answer(self, inputs, seed: int):
        "Sample one answer: (1, A)."
        cfg = self.cfg
        torch.manual_seed(seed)
        with self.acting("actor"):
            ids = self.models["actor"].generate(
                **inputs,
                attention_mask=torch.ones_like(inputs["input_ids"]),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=cfg.temperature,
                max_new_tokens=cfg.max_new_tokens,
                suppress_tokens=self.vlm.banned_ids,
                pad_token_id=self.vlm.pad_id,
            )
        return ids[:, inputs["input_ids"].shape[1] :]

    @torch.no_grad()
    def score(self, prompt, inputs, answer) -> dict:
        "Everything PPO needs to know of one answer, advantages not yet whitened."
        cfg, rm = self.cfg, self.rm
        old = self.logprobs("actor", inputs, answer)
        ref = self.logprobs("reference", inputs, answer)
        values = self.values(inputs, answer)
        states = self.states("reward", inputs, answer)[:, inputs["input_ids"].shape[1] - 1 :]
        both = torch.cat([states[:, :-1], states[:, 1:]], -1)
        token_scores = rm.role.head(both, torch.ones_like(answer, dtype=torch.bool))
        score = cfg.reward["rm"] * (token_scores.sum() - rm.shift) / rm.scale
        if cfg.reward.get("penalty") and scene_of(prompt):
            text = self.vlm.tokenizer.decode(answer[0], skip_special_tokens=True)
            found = penalty(judge_reply(prompt, text, scene_of(prompt)), cfg.penalty)
            score = score + cfg.reward["penalty"] * found
        if answer[0, -1] != self.vlm.eos_id:
            score = score.clamp(max=cfg.no_eos)
        rewards = -cfg.beta * (old - ref)
        rewards[0, -1] += score
        if cfg.dense:
            rewards += self.paid_early(cfg.reward["rm"] * token_scores / rm.scale)
        raw = self.advantages(rewards, values)
        found = dict(old=old, ref=ref, values=values, score=score, raw=raw, returns=raw + values)
        return dict(inputs=inputs, answer=answer) | found

    def paid_early(self, earned):
        "(1, A) γ times what was earned up to this token, less what was before; in the end nothing."
        paid, before = torch.zeros_like(earned), 0.0
        for t in range(earned.shape[1]):
            last = t + 1 == earned.shape[1]
            following = 0.0 if last else before + earned[0, t]
            paid[0, t] = self.cfg.gamma * following - before
            before = following
        return paid

    def advantages(self, rewards, values):
        "(1, A), token by token from the last one."
        cfg, advantages, running = self.cfg, [], 0.0
        for t in reversed(range(values.shape[1])):
            after = values[0, t + 1] if t + 1 < values.shape[1] else 0.0
            surprise = rewards[0, t] + cfg.gamma * after - values[0, t]
            running = surprise + cfg.gamma * cfg.lam * running
            advantages.insert(0, running)
        return torch.stack(advantages).unsqueeze(0)

    def loss(self, e: dict):
        "PPO's loss of one answer, summed over its tokens."
        cfg = self.cfg
        ratio = torch.exp(self.logprobs("actor", e["inputs"], e["answer"]) - e["old"])
        clipped = ratio.clamp(1 - cfg.clip, 1 + cfg.clip)
        policy = torch.maximum(-e["advantages"] * ratio, -e["advantages"] * clipped).sum()
        values = self.values(e["inputs"], e["answer"])
        missed = (values - e["returns"]) ** 2
        if cfg.value_clip:
            near = e["values"] + (values - e["values"]).clamp(-cfg.value_clip, cfg.value_clip)
            missed = torch.maximum(missed, (near - e["returns"]) ** 2)
        return policy + cfg.value_coef * 0.5 * missed.sum()

    def whiten(self, experience: list[dict]):
        "Mean 0 and variance 1 over all tokens of all answers."
        flat = torch.cat([e["raw"][0] for e in experience])
        for e in experience:
            e["advantages"] = (e["raw"] - flat.mean()) * torch.rsqrt(flat.var(correction=0) + 1e-8)

    def update(self, experience: list[dict], step: bool = True) -> float:
        "One optimiser step on some answers, a pass for each."
        tokens, total = sum(e["answer"].shape[1] for e in experience), 0.0
        for e in experience:
            loss = self.loss(e) / tokens
            loss.backward()
            total += float(loss.detach())
        if step:
            for group in self.trained:
                torch.nn.utils.clip_grad_norm_(group, self.cfg.grad_clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return total

    def iteration(self, prompts, step: int):
        "Sample and score answer by answer, then update."
        with self.clock("all"):
            experience = []
            for i, prompt in enumerate(prompts):
                inputs = self.inputs(prompt)
                with self.clock("sample"):
                    answer = self.answer(inputs, seed=1000 * step + i)
                with self.clock("score"):
                    experience.append(self.score(prompt, inputs, answer))
            self.whiten(experience)
            with self.clock("update"):
                for _ in range(self.cfg.epochs):
                    for group in torch.randperm(len(experience)).split(self.cfg.minibatch):
                        self.update([experience[i] for i in group])
        return experience


# --- the same thing, computed twice -----------------------------------------------------------


def check(lib: Library, naive: Naive, prompts, atol: float) -> dict[str, float]:
    """Both sides on answers that the library sampled: the largest difference of every figure.
    Raises AssertionError where one exceeds `atol`."""
    vlm, cfg = lib.policy.vlm, lib.cfg
    exp, score = lib.experience(prompts, step=0)
    b, found, head = exp.batch, [], lib.policy.critic.head
    naive.value.fit(head.shift, head.scale)  # the units, which are compared below
    for i, prompt in enumerate(prompts):
        answer = b.answers[i, b.answer_mask[i]].unsqueeze(0)
        found.append(naive.score(prompt, naive.inputs(prompt), answer))
    naive.whiten(found)
    with torch.no_grad():
        ref = token_logprobs(vlm.rule_out(vlm.answer_logits(b)), b.answers, cfg.temperature)
    ours = dict(old=exp.tokens["logprobs"], ref=ref)
    ours |= {name: exp.tokens[name] for name in ("values", "returns", "advantages")}
    pairs = {}
    for name, figure in ours.items():
        pairs[name] = figure[b.answer_mask], torch.cat([e[name][0] for e in found])
    scores = torch.stack([e["score"] for e in found])
    pairs["score"] = score, scores
    units = torch.stack([head.shift, head.scale])
    pairs["units"] = units, torch.stack([scores.mean(), scores.std(correction=0)])
    pairs |= gradients(lib, naive, exp, found)
    for name, (x, y) in pairs.items():
        assert_close(x, y.to(x), atol=atol, rtol=atol, msg=lambda m, name=name: f"{name}: {m}")
    return {name: float((x - y).abs().max()) for name, (x, y) in pairs.items()}


def gradients(lib: Library, naive: Naive, exp, found: list[dict]) -> dict:
    "Loss and the actor's gradient on all answers at once, of both sides."
    vlm, rows = lib.policy.vlm, [(exp, i) for i in range(len(found))]
    learner, at_once = lib.learner, lib.cfg.micro_batch
    loss = backward_through(learner.task, rows, at_once, learner.accelerator, shard=False)[0]
    gradient = actor_gradient(vlm, vlm.language)
    learner.optimizer.zero_grad()
    other_loss = naive.update(found, step=False)
    other_gradient = actor_gradient(vlm, naive.language("actor"))
    naive.optimizer.zero_grad()
    losses = torch.tensor(loss), torch.tensor(other_loss)
    return dict(loss=losses, gradient=(gradient, other_gradient))


def actor_gradient(vlm: VLM, language) -> torch.Tensor:
    """The gradient of the actor's adapter, from a language model with it or from one with full
    matrices: there dA = s·BᵀG, dB = s·GAᵀ."""
    parts, layers = [], dict(language.named_modules())
    for name, layer in vlm.language.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        a, b = layer.lora_A["actor"].weight, layer.lora_B["actor"].weight
        s, other = layer.scaling["actor"], layers[name]
        if isinstance(other, BaseTunerLayer):
            parts += [a.grad.flatten(), b.grad.flatten()]
        else:
            full = other.weight.grad
            parts += [(s * b.detach().T @ full).flatten(), (s * full @ a.detach().T).flatten()]
    return torch.cat(parts)
