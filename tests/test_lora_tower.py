"Adapters in the vision tower: who sees what, and which features may be kept."

import json
from dataclasses import replace

import pytest
import torch
from own_data import SECONDS, checkpoint, lines, recipe, squares
from peft import PeftModel
from report_models import full, make, prompts, shake  # noqa: F401 (fixture)
from small_models import experience_of, loss_of
from test_export import logits_of
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText

from vlmrlhf_course.base.config import build_config, recorded
from vlmrlhf_course.base.launch import make_accelerator
from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.cli import main
from vlmrlhf_course.model.export import plain_model, save_adapter
from vlmrlhf_course.model.family import FAMILIES
from vlmrlhf_course.model.memory import Limits
from vlmrlhf_course.model.roles import LoRAConfig, merged
from vlmrlhf_course.model.vision import (
    attention_layers,
    unread,
)
from vlmrlhf_course.model.vlm import VLM, load_vlm, token_logprobs
from vlmrlhf_course.pipeline import made
from vlmrlhf_course.rl.grpo import GRPO, GRPOConfig
from vlmrlhf_course.rl.ppo import PPO, PPOConfig
from vlmrlhf_course.rl.rollout import sample
from vlmrlhf_course.train.dpo import DPOConfig, DPOTask
from vlmrlhf_course.train.fit import backward_through
from vlmrlhf_course.train.reward import RewardConfig, RewardModel, RewardTask
from vlmrlhf_course.train.sft import (
    SFTTask,
)

EYES = LoRAConfig(r=2, alpha=4, tower=True)
CASES = [*FAMILIES, "general"]


def model_of(kind, dtype=torch.float32):
    "A family's tiny model; LLaVA's for the general family, which keeps no features."
    if kind != "general":
        return make(kind, dtype)
    vlm = make("llava", dtype)
    vlm.family = FAMILIES.general()
    vlm.family.placeholders = FAMILIES["llava"].placeholders
    return vlm


def seeing(kind="llava", dtype=torch.float32):
    "A model with an actor that sees in a way of its own, and speaks so."
    vlm = model_of(kind, dtype)
    vlm.add_role("actor", EYES)
    shake(vlm, "actor")
    return vlm


def said(vlm, prompts, role=None):
    "Logits where the answers' tokens are predicted."
    batch = full(vlm, prompts)
    return vlm.answer_logits(batch, role)[batch.answer_mask]


def reached(weights):
    return all(w.grad is not None and bool(w.grad.abs().sum() > 0) for w in weights)


# --- what everybody agrees on ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", CASES)
def test_the_plain_libraries_see_the_same(kind, prompts, tmp_path):
    "As an adapter, and merged; and the trunk is what it was."
    vlm = model_of(kind)
    vlm.model.save_pretrained(tmp_path / "trunk")
    with torch.no_grad():
        trunk = said(vlm, prompts)
        role = vlm.add_role("actor", EYES)
        assert_close(said(vlm, prompts, "actor"), trunk)
        shake(vlm, "actor")
        want = said(vlm, prompts, "actor")
        assert_close(said(vlm, prompts), trunk)
        whole = VLM(plain_model(vlm, "actor"), vlm.processor)
        assert_close(said(whole, prompts), want, atol=1e-4, rtol=1e-4)
        save_adapter(vlm, "actor", tmp_path / "adapter", tmp_path / "trunk")
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "trunk")
        theirs = PeftModel.from_pretrained(model, tmp_path / "adapter").get_base_model()
        assert_close(said(VLM(theirs, vlm.processor), prompts), want)
        for w in role.tower_weights():
            w.zero_()
        assert (said(vlm, prompts, "actor") - want).abs().max() > 1e-4, "the tower has no say"


@pytest.mark.parametrize("kind", CASES)
def test_the_first_ratio_is_1(kind, prompts):
    "Also where answers share a prompt; and gradients reach both sides, and nothing else."
    vlm = seeing(kind)
    roll = sample(vlm, [p for p in prompts for _ in range(2)], "actor", max_new_tokens=5)
    logits = vlm.rule_out(vlm.answer_logits(roll.batch, "actor"))
    new = token_logprobs(logits, roll.batch.answers) * roll.batch.answer_mask
    assert_close(new, roll.logprobs, atol=1e-5, rtol=1e-5)
    new.sum().backward()
    role = vlm.roles["actor"]
    assert len(role.tower_weights()) > 3 and reached(role.tower_weights())
    own = {id(w) for w in role.trained()}
    assert all(p.grad is None for p in vlm.model.parameters() if id(p) not in own)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision(dtype, prompts):
    "What learns is float32, and the ratio is 1 within 1e-3."
    vlm = seeing("llava", dtype)
    assert {w.dtype for w in vlm.roles["actor"].tower_weights()} == {torch.float32}
    roll = sample(vlm, prompts, "actor", max_new_tokens=5)
    with torch.no_grad():
        logits = vlm.rule_out(vlm.answer_logits(roll.batch, "actor"))
    new = token_logprobs(logits, roll.batch.answers) * roll.batch.answer_mask
    assert_close(new, roll.logprobs, atol=1e-3, rtol=0)


def test_layers_that_are_computed_twice(prompts):
    "Gradient checkpointing gives the same gradients, in the tower, too."
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        vlm = seeing()
        vlm.limits = Limits(gradient_checkpointing=again)
        vlm.answer_logits(full(vlm, prompts), "actor").square().sum().backward()
        found.append([w.grad for w in vlm.roles["actor"].trained()])
    assert_close(*found)


def test_who_speaks_by_greedy_words(prompts):
    "`answer` goes through the role's tower: it says what the merged model says."
    vlm = seeing()
    whole = VLM(plain_model(vlm, "actor"), vlm.processor)
    how = dict(temperature=0, max_new_tokens=8)
    said = vlm.answer(prompts, role="actor", **how)
    assert said == whole.answer(prompts, **how) != vlm.answer(prompts, **how)


def test_a_role_with_eyes_is_not_merged(prompts):
    vlm = seeing()
    with merged(vlm, "actor") as role:
        assert role == "actor"


# --- where the adapters are -----------------------------------------------------------------------


def test_layers_that_nobody_reads_get_none():
    vlm = make()
    assert len(vlm.tower_targets()) == 8
    vlm.model.config.vision_feature_layer = [0, -2]
    assert len(vlm.tower_targets()) == 4 and len([*unread(vlm)]) > 10
    qwen = make("qwen2_5_vl")
    assert not any("merger" in path for path in qwen.tower_targets())
    pool = nn.ModuleDict(dict(attention=nn.MultiheadAttention(4, 2), mlp=nn.Linear(4, 4)))
    assert attention_layers(pool, set()) == []


def test_a_second_role_finds_the_same_layers():
    vlm = make()
    first = vlm.tower_targets()
    vlm.add_role("one", EYES)
    assert vlm.tower_targets() == first
    two = vlm.add_role("two", EYES, like="one")
    assert two.weights().keys() == vlm.roles["one"].weights().keys()
    assert not vlm.add_role("blind", LoRAConfig(r=2)).sees


def test_a_tower_without_such_layers_is_named():
    vlm = make()
    for layer in vlm.tower.encoder.layers:
        layer.self_attn = nn.Identity()
    with pytest.raises(UserError, match="lora.tower: no linear layer.*llava's.*leave lora.tower"):
        vlm.add_role("actor", EYES)
    assert not vlm.roles and not vlm.lora_layers()


def test_settings():
    "A copy has no adapters; and older records do not know the key."
    with pytest.raises(UserError, match="tower=true: adapters need a rank"):
        build_config(PPOConfig, dict(lora=dict(r=0, tower=True)), "ppo")
    assert "tower" not in recorded(PPOConfig())["lora"]
    cfg = build_config(PPOConfig, dict(lora=dict(tower=True)), "ppo")
    assert recorded(cfg)["lora"]["tower"] is True
    with pytest.raises(UserError, match="'critic'.*'reward'.*same lora"):
        vlm = make()
        vlm.add_role("reward", LoRAConfig(r=2))
        vlm.add_role("critic", EYES, like="reward")


# --- what is kept ---------------------------------------------------------------------------------


def test_features_are_kept_as_long_as_they_are_right(prompts):
    vlm = seeing()
    batch = full(vlm, prompts)
    assert (vlm.encoded, len(vlm._features)) == (2, 2)

    def looks(role):
        before = vlm.encoded
        with torch.no_grad():
            vlm.answer_logits(batch if role else full(vlm, prompts), role)
        return vlm.encoded - before

    assert [looks(r) for r in ("actor", "actor", None)] == [2, 2, 0], "one that learns: never"
    vlm.model.requires_grad_(False)
    assert [looks(r) for r in ("actor", "actor", None)] == [2, 0, 0], "a frozen one: once"
    vlm.roles["actor"].load({k: w + 0.1 for k, w in vlm.roles["actor"].state().items()})
    assert [looks(r) for r in ("actor", "actor", None)] == [2, 0, 0], "until its weights change"
    next(vlm.tower.parameters()).data += 1
    full(vlm, prompts)
    assert vlm.encoded == 12 and len(vlm._features) == 2, "the trunk's tower is under all of them"
    assert looks("actor") == 2


def test_a_batch_that_has_lost_its_pictures(prompts):
    vlm = seeing()
    batch = full(vlm, prompts)
    batch.pictures.refs = ()
    vlm.answer_logits(batch)
    with pytest.raises(ValueError, match="'actor' has a vision tower of its own"):
        vlm.answer_logits(batch, "actor")


def test_rows_and_texts(prompts):
    "Some rows of a batch, one without a picture among them, are those rows alone."
    vlm = seeing()
    asked = [prompts[0], replace(prompts[1], image=None), prompts[1]]
    batch = full(vlm, asked)
    with torch.no_grad():
        want = vlm.answer_logits(batch, "actor")
        for rows in ([2], [1], [2, 0]):
            part = batch.rows(torch.tensor(rows))
            found = vlm.answer_logits(part, "actor")
            assert_close(found, want[rows][:, : found.shape[1]], atol=1e-4, rtol=1e-4)
        alone = vlm.answer_logits(full(vlm, asked[1:2]), "actor")
        back = vlm.as_seen(vlm.as_seen(batch, "actor"), None)
        assert torch.equal(back.features, batch.features), "and back again"
    assert_close(alone[0], want[1, : alone.shape[1]], atol=1e-4, rtol=1e-4)


# --- every stage ----------------------------------------------------------------------------------


def pairs_about(prompts):
    rows = [dict(image=p.image, prompt=p.text, chosen=p.answer) for p in prompts]
    return [[row | dict(rejected="a blue boat .")] for row in rows]


@pytest.mark.parametrize("name", ["sft", "reward", "dpo"])
def test_a_supervised_stage_reaches_the_tower(name, prompts):
    "And leaves no micro-batch out: the gradient of two parts is that of the whole."
    found = []
    for size in (2, 1):
        torch.manual_seed(0)
        vlm = make()
        if name == "sft":
            role, items = vlm.add_role("sft", EYES), prompts
            task = SFTTask(vlm, "sft")
        elif name == "reward":
            task, items = (
                RewardTask(RewardModel(vlm, RewardConfig(lora=EYES))),
                pairs_about(prompts),
            )
            role = task.rm.role
        else:
            task, items = DPOTask(vlm, DPOConfig(lora=EYES)), pairs_about(prompts)
            role = task.role
        shake(vlm, role.name)
        backward_through(task, items, size, make_accelerator())
        assert reached(role.tower_weights())
        found.append([w.grad for w in role.trained()])
    assert_close(*found, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("which", [PPO, GRPO])
def test_rl_reaches_the_tower(which, prompts):
    "The actor's, and that of a critic with an adapter; the reward model's is frozen, and kept."
    vlm = make()
    rm = RewardModel(vlm, RewardConfig(lora=EYES)).requires_grad_(False)
    shake(vlm, "reward")
    if which is PPO:
        policy = PPO(rm, PPOConfig(lora=EYES, critic="adapter", max_new_tokens=5), "actor")
        nn.init.normal_(policy.critic.head.out.weight, std=0.3)
    else:
        policy = GRPO(rm, GRPOConfig(lora=EYES, answers_per_prompt=2, max_new_tokens=5), "actor")
    shake(vlm, "actor", 0.05)
    policy.learn()
    roll = sample(vlm, [p for p in prompts for _ in range(2)], "actor", max_new_tokens=5)
    exp, _ = experience_of(policy, rm, roll)
    kept = {key[0] for key in vlm._features}
    assert kept == {None, "reward"}
    loss, metrics = loss_of(policy, exp, range(4))
    loss.backward()
    assert reached(policy.actor.tower_weights()) or which is GRPO
    assert any(w.grad is not None and w.grad.any() for w in policy.actor.tower_weights())
    if which is PPO:
        assert metrics["clipped"] == 0 and reached(policy.critic.tower_weights())


# --- the whole way --------------------------------------------------------------------------------


def test_a_run_from_files_to_an_exported_adapter(tmp_path, capsys):
    "SFT's place is taken by the checkpoint; a reward model and a policy that both have eyes."
    text = SECONDS.replace("lora: {r: 4, alpha: 8}", "lora: {r: 4, alpha: 8, tower: true}")
    text = text.replace("ppo: {", "ppo: {lora: {r: 4, tower: true}, actor_lr: 0.01, ")
    lines(squares(16, tmp_path / "pictures"), tmp_path / "pairs.jsonl")
    model = checkpoint("llava", tmp_path / "llava")
    given = ["--model", model, "--data", tmp_path / "pairs.jsonl", "--out", tmp_path / "run"]
    words = [*map(str, given), "--config", str(recipe(tmp_path, text))]
    assert main(["ppo", *words]) == 0
    arm, out = tmp_path / "run" / "ppo", tmp_path / "adapter"
    assert main(["export", str(arm), "--to", str(out)]) == 0
    assert main(["export", str(arm), "--to", str(tmp_path / "whole"), "--merge"]) == 0
    speaker = made(arm)
    assert speaker.vlm.roles["ppo"].sees and speaker.vlm.roles["reward"].sees
    want = logits_of(*speaker)
    assert (want - logits_of(speaker.vlm)).abs().max() > 1e-4
    assert_close(logits_of(load_vlm(tmp_path / "whole")), want, atol=1e-5, rtol=1e-4)
    base = json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]
    theirs = AutoModelForImageTextToText.from_pretrained(base)
    theirs = PeftModel.from_pretrained(theirs, out).get_base_model()
    assert_close(logits_of(VLM(theirs, speaker.vlm.processor)), want)
    # what was exported pays another run's policies
    assert main(["export", str(tmp_path / "run/reward"), "--to", str(tmp_path / "judge")]) == 0
    words[words.index(str(tmp_path / "run"))] = str(tmp_path / "other")
    assert main(["reward", *words, "--reward-model", str(tmp_path / "judge")]) == 0
    first, again = (made(tmp_path / name / "reward").state() for name in ("run", "other"))
    assert first.keys() == again.keys() and all(torch.equal(first[k], again[k]) for k in first)
    assert any(k.startswith("tower.") for k in first)
