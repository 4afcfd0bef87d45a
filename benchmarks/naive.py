"""The textbook pipeline against the library: `python -m benchmarks.naive`.

Textbook: prompt by prompt, `generate` for one answer at a time, four full models (actor, reference, critic, reward), each of
which encodes the picture at every pass, a pass for the log-probabilities of what was sampled, advantages in a Python list,
then one forward and one backward pass an answer. The same answers, minibatches, optimiser steps, loss. Before anything is timed,
both sides score the same answers, and every figure and the gradient must agree."""
import argparse
import copy
from contextlib import nullcontext

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.testing import assert_close

from benchmarks.common import Clock, Library, TowerCount, build, fresh_prompts, medians, number, save, shake, table
from vlmrlhf_course.world.hallucination import penalty
from vlmrlhf_course.rl.ppo import PPOConfig, answer_scores, make_experience
from vlmrlhf_course.train.sft import backward_through
from vlmrlhf_course.model.vlm import VLM, VLMConfig, token_logprobs
from vlmrlhf_course.world.scenes import judge, open_image


def full_model(vlm: VLM, role: str | None):
    "A model of its own that says what `vlm` says in `role`: a copy of everything, the adapter merged into the weights."
    model = copy.deepcopy(vlm.model)
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, BaseTunerLayer): continue
        if role: layer.merge(adapter_names=[role])
        model.set_submodule(name, layer.get_base_layer())
    vars(VLM(model, vlm.processor).language).pop("_adapted", None)
    return model.requires_grad_(False)


class Naive:
    "Four models. `shared`: one in memory that acts as all four, for sizes of which four do not fit; the work is the same."
    def __init__(self, policy, rm, cfg: PPOConfig, shared: bool = False):
        self.vlm, self.rm, self.cfg, self.shared, self.clock = policy.vlm, rm, cfg, shared, Clock(policy.vlm.device)
        self.roles = dict(actor="actor", reference=None, critic="critic" if cfg.critic == "adapter" else "reward", reward="reward")
        self.models = {name: self.vlm.model if shared else full_model(self.vlm, role) for name, role in self.roles.items()}
        self.towers = {m: TowerCount(VLM(m, self.vlm.processor)) for m in self.models.values()}
        self.value = policy.value if shared else copy.deepcopy(policy.value)
        if not shared:   # towers stay frozen here too: where they are trained there is nothing to cache
            for part in (self.language("actor"), self.models["actor"].get_output_embeddings(),
                         self.language("critic")): part.requires_grad_(True)
        models = [policy] if shared else [self.models["actor"], self.models["critic"], self.value]
        self.trained = [p for m in models for p in m.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=cfg.actor_lr, betas=(.9, .95), weight_decay=0., fused=True)

    def language(self, name): return VLM(self.models[name], self.vlm.processor).language

    def acting(self, name): return self.vlm.acting(self.roles[name]) if self.shared else nullcontext()

    @property
    def encoded(self): return sum(t.images for t in self.towers.values())

    def inputs(self, prompt):
        "Tokens and pixels of one prompt."
        ids = torch.tensor([self.vlm.prompt_ids(prompt)], device=self.vlm.device)
        if not prompt.image: return dict(input_ids=ids)
        picture = open_image(prompt.image, self.vlm.model.config.vision_config.image_size)
        pixels = self.vlm.processor.image_processor([picture], return_tensors="pt").pixel_values
        return dict(input_ids=ids, pixel_values=pixels.to(self.vlm.device, self.vlm.tower.dtype))

    def states(self, name: str, inputs: dict, answer: torch.Tensor) -> torch.Tensor:
        "One model on a prompt with its answer (1, A), from pixels: hidden states (1, P+A, H)."
        with self.acting(name):
            return self.models[name].model(**inputs | dict(input_ids=torch.cat([inputs["input_ids"], answer], 1)),
                                           use_cache=False).last_hidden_state

    def logprobs(self, name, inputs, answer):
        "(1, A), from logits at every position."
        logits = self.vlm.rule_out(self.models[name].get_output_embeddings()(self.states(name, inputs, answer)))
        return token_logprobs(logits[:, inputs["input_ids"].shape[1] - 1:-1], answer, self.cfg.temperature)

    def values(self, inputs, answer):
        "(1, A) from the critic, whose head looks at the tower's output."
        states, seen = self.states("critic", inputs, answer), "pixel_values" in inputs
        features = self.towers[self.models["critic"]].features if seen else None
        return self.value(states[:, inputs["input_ids"].shape[1] - 1:-1], features, torch.tensor([seen], device=states.device))

    @torch.no_grad()
    def answer(self, inputs, seed: int):
        "Sample one answer: (1, A)."
        cfg = self.cfg
        torch.manual_seed(seed)
        with self.acting("actor"):
            ids = self.models["actor"].generate(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]), do_sample=True, top_k=0,
                                                top_p=1.,
                                                temperature=cfg.temperature, max_new_tokens=cfg.max_new_tokens,
                                                suppress_tokens=self.vlm.banned_ids,
                                                pad_token_id=self.vlm.pad_id)
        return ids[:, inputs["input_ids"].shape[1]:]

    @torch.no_grad()
    def score(self, prompt, inputs, answer) -> dict:
        "Everything PPO needs to know of one answer, advantages not yet whitened."
        cfg, rm, P = self.cfg, self.rm, inputs["input_ids"].shape[1]
        old, ref = self.logprobs("actor", inputs, answer), self.logprobs("reference", inputs, answer)
        values = self.values(inputs, answer)
        token_scores = rm.head(self.states("reward", inputs, answer)[:, P:], torch.ones_like(answer, dtype=torch.bool))
        score = (token_scores.sum() - rm.shift) / rm.scale
        if cfg.reward == "rm+penalty" and prompt.scene:
            text = self.vlm.tokenizer.decode(answer[0], skip_special_tokens=True)
            score = score + penalty(judge(text, prompt.scene), cfg.penalty)
        if answer[0, -1] != self.vlm.eos_id: score = score.clamp(max=cfg.no_eos)
        early = token_scores / rm.scale if cfg.dense else torch.zeros_like(token_scores)
        rewards = early - cfg.beta * (old - ref)
        rewards[0, -1] += score - early.sum()
        advantages, running = [], 0.
        for t in reversed(range(answer.shape[1])):
            after = values[0, t + 1] if t + 1 < answer.shape[1] else 0.
            running = rewards[0, t] + cfg.gamma * after - values[0, t] + cfg.gamma * cfg.lam * running
            advantages.insert(0, running)
        raw = torch.stack(advantages).unsqueeze(0)
        return dict(inputs=inputs, answer=answer, old=old, ref=ref, values=values, score=score, raw=raw, returns=raw + values)

    def loss(self, e: dict):
        "PPO's loss of one answer, summed over its tokens."
        cfg = self.cfg
        ratio = torch.exp(self.logprobs("actor", e["inputs"], e["answer"]) - e["old"])
        policy = torch.maximum(-e["advantages"] * ratio, -e["advantages"] * ratio.clamp(1 - cfg.clip, 1 + cfg.clip)).sum()
        values = self.values(e["inputs"], e["answer"])
        near = e["values"] + (values - e["values"]).clamp(-cfg.value_clip, cfg.value_clip)
        return policy + cfg.value_coef * .5 * torch.maximum((values - e["returns"]) ** 2, (near - e["returns"]) ** 2).sum()

    def whiten(self, experience: list[dict]):
        flat = torch.cat([e["raw"][0] for e in experience])
        for e in experience: e["advantages"] = (e["raw"] - flat.mean()) * torch.rsqrt(flat.var(correction=0) + 1e-8)

    def update(self, experience: list[dict], step: bool = True) -> float:
        "One optimiser step on some answers, a pass for each."
        tokens, total = sum(e["answer"].shape[1] for e in experience), 0.
        for e in experience:
            loss = self.loss(e) / tokens
            loss.backward()
            total += float(loss.detach())
        if step:
            torch.nn.utils.clip_grad_norm_(self.trained, self.cfg.grad_clip)
            self.optimizer.step(); self.optimizer.zero_grad()
        return total

    def iteration(self, prompts, step: int):
        with self.clock("all"):
            experience = []
            for i, prompt in enumerate(prompts):
                inputs = self.inputs(prompt)
                with self.clock("sample"): answer = self.answer(inputs, seed=1000 * step + i)
                with self.clock("score"): experience.append(self.score(prompt, inputs, answer))
            self.whiten(experience)
            with self.clock("update"):
                for _ in range(self.cfg.epochs):
                    for group in torch.randperm(len(experience)).split(self.cfg.minibatch): self.update([experience[i] for i in group])
        return experience


# --- the same thing, computed twice -----------------------------------------------------------------------------------------

def check(lib: Library, naive: Naive, prompts, atol: float) -> dict[str, float]:
    "Both sides on answers that the library sampled: the largest difference of every figure. Raises AssertionError where one exceeds `atol`."
    vlm, rm, cfg = lib.policy.vlm, lib.rm, lib.cfg
    roll, exp, _ = lib.experience(prompts, step=0)
    b, found = roll.batch, []
    for i, prompt in enumerate(prompts):
        found.append(naive.score(prompt, naive.inputs(prompt), b.answers[i, b.answer_mask[i]].unsqueeze(0)))
    naive.whiten(found)
    with torch.no_grad(): ref = token_logprobs(vlm.rule_out(vlm.answer_logits(b)), b.answers, cfg.temperature)
    ours = dict(old=roll.logprobs, ref=ref, values=exp.values, returns=exp.returns, advantages=exp.advantages)
    pairs = {name: (x[b.answer_mask], torch.cat([e[name][0] for e in found])) for name, x in ours.items()}
    with torch.no_grad(): pairs["score"] = answer_scores(rm, roll, cfg)[0], torch.stack([e["score"] for e in found])
    loss = backward_through(lib.task, [(exp, i) for i in range(len(prompts))], cfg.micro_batch, lib.accelerator, shard=False)[0]
    gradient = actor_gradient(vlm, vlm.language)
    lib.optimizer.zero_grad()
    pairs["loss"] = torch.tensor(loss), torch.tensor(naive.update(found, step=False))
    pairs["gradient"] = gradient, actor_gradient(vlm, naive.language("actor"))
    naive.optimizer.zero_grad()
    for name, (x, y) in pairs.items(): assert_close(x, y.to(x), atol=atol, rtol=atol, msg=lambda m, name=name: f"{name}: {m}")
    return {name: float((x - y).abs().max()) for name, (x, y) in pairs.items()}


def actor_gradient(vlm: VLM, language) -> torch.Tensor:
    "The gradient of the actor's adapter, from a language model with it or from one with full matrices: there dA = s·BᵀG, dB = s·GAᵀ."
    parts, layers = [], dict(language.named_modules())
    for name, layer in vlm.language.named_modules():
        if not isinstance(layer, BaseTunerLayer): continue
        a, b, s, other = layer.lora_A["actor"].weight, layer.lora_B["actor"].weight, layer.scaling["actor"], layers[name]
        if isinstance(other, BaseTunerLayer): parts += [a.grad.flatten(), b.grad.flatten()]
        else: parts += [(s * b.detach().T @ other.weight.grad).flatten(), (s * other.weight.grad @ a.detach().T).flatten()]
    return torch.cat(parts)


# --- timing -----------------------------------------------------------------------------------------------------------------

def compare(cfg: PPOConfig, rounds: int, sizes: VLMConfig | None = None, atol: float = 2e-4) -> dict:
    "Check, then time both sides in turn, each round on pictures that neither has seen. The first round is not counted."
    policy, rm = build(cfg, sizes)
    shake(policy, rm)
    lib, naive = Library(policy, rm, cfg), Naive(policy, rm, cfg)
    first, *sets = fresh_prompts(cfg, cfg.answers, rounds + 2)
    differences = check(lib, naive, first[:18], atol)
    tower, timings = TowerCount(policy.vlm), dict(library=[], naive=[])
    for step, prompts in enumerate(sets, 1):
        for name, side in (("library", lib), ("naive", naive)):
            before, cached = naive.encoded, tower.images
            side.clock.take()
            said = side.iteration(prompts, step)
            tokens = int(said[0].batch.answer_mask.sum()) if name == "library" else sum(e["answer"].shape[1] for e in said)
            images = tower.images - cached if name == "library" else naive.encoded - before
            timings[name].append(side.clock.take() | dict(tokens=tokens, images=images))
        unique = len({p.image for p in prompts if p.image})
        assert timings["library"][-1]["images"] == unique, "the library encodes each picture once while the tower is frozen"
    sides = [describe(name, medians(t[1:]), cfg) for name, t in timings.items()]
    ratios = sorted(n["all"] / l["all"] for n, l in zip(timings["naive"][1:], timings["library"][1:]))
    return dict(critic=cfg.critic, epochs=cfg.epochs, differences=differences, sides=sides, ratios=ratios, ratio=ratios[len(ratios) // 2])


def describe(name: str, t: dict, cfg: PPOConfig) -> dict:
    "A side's figures, in ms an answer."
    n = cfg.answers
    update = t["update"] if name == "naive" else t["backward"] + t["step"]
    out = dict(side=name, critic=cfg.critic, epochs=cfg.epochs, answers_per_s=n / t["all"], sample=t["sample"], score=t["score"], update=update)
    for k in ("sample", "score", "update"): out[k] *= 1000 / n
    return out | dict(all=1000 * t["all"] / n, tokens=t["tokens"] / n, images=t["images"] / n)


def rows(result: dict) -> str:
    "The table of README.md."
    head = ["ms per answer", "epochs", "sampling", "scoring", "update", "all", "answers/s", "tokens per answer", "images encoded per answer",
            "textbook / library"]
    body = []
    for part in result["critics"]:
        for side in part["sides"]:
            cells = [number(side[k]) for k in ("sample", "score", "update", "all", "answers_per_s", "tokens", "images")]
            body.append([LABELS[side["side"], part["critic"]], part["epochs"], *cells, f"{part['ratio']:.1f}" if side["side"] == "naive" else ""])
    return table(head, body)


LABELS = {("library", "head"): "library, critic on the reward model's states",
          ("naive", "head"): "textbook, the same critic as a model of its own",
          ("library", "adapter"): "library, critic with an adapter of its own", ("naive", "adapter"): "textbook, critic a model of its own"}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=120)
    parser.add_argument("--group", type=int, default=3, help="answers to a prompt")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    parts = []
    for critic, epochs in (("head", 1), ("head", 3), ("adapter", 3)):
        cfg = PPOConfig(critic=critic, epochs=epochs, answers=args.answers, answers_per_prompt=args.group, minibatch=args.answers // 2,
                        micro_batch=args.answers // 4, actor_lr=1e-9, critic_lr=1e-9)
        parts.append(compare(cfg, args.rounds))   # learning rate ~0, so that answers stay as long as they are
    result = save("naive", dict(answers=args.answers, group=args.group, rounds=args.rounds, critics=parts,
                                sides=[s for p in parts for s in p["sides"]]))
    print(rows(result))


if __name__ == "__main__": main()
