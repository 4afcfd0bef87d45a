"""The planner: what it says of weights, gradients and optimiser states is what processes of
DeepSpeed hold; what it says of a step is what PyTorch allocates."""

from contextlib import ExitStack, nullcontext
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from small_models import SMALL
from zero_states import RANK, ROUTES, SIZES, measured

from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.model.memory import Limits
from vlmrlhf_course.model.roles import LoRAConfig
from vlmrlhf_course.scale import shapes
from vlmrlhf_course.scale.fitting import changes, in_words, largest, limit, remedies, table
from vlmrlhf_course.scale.launching import PlanConfig
from vlmrlhf_course.scale.planner import GB, plan, roles_of
from vlmrlhf_course.scale.shapes import Allocated, Blank, Step, model_config, step_bytes, weights
from vlmrlhf_course.world.llava import build_model

STATES = {"trunk, the reference", "actor", "gradients", "optimiser", "masters"}


def folder_of(tmp_path, sizes):
    "A folder with the configuration of a small model, and nothing else."
    build_model(sizes).config.save_pretrained(tmp_path)
    return str(tmp_path)


# --- model states ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2])
def test_model_states_are_those_of_deepspeed(n, tmp_path):
    "Within 5 %, on each process, for all stages, an adapter in float32 and a model in bfloat16."
    pytest.importorskip("deepspeed")
    model = folder_of(tmp_path, SIZES)
    for held in measured(n, tmp_path):
        for case, size in held.items():
            route, stage = case.split()
            cfg = PlanConfig(
                model,
                stage="sft",
                route=route,
                r=RANK,
                zero=int(stage),
                gpus=n,
                dtype=ROUTES[route],
                trained=ROUTES[route],
                accumulation=2,
            )
            planned = sum(part.bytes for part in plan(cfg).parts if part.name in STATES)
            assert planned == pytest.approx(size, rel=0.05), (case, n)


def test_states_of_copies_are_those_of_adamw(tmp_path):
    "Without DeepSpeed: weights, gradients and Adam's numbers, as PyTorch has them."
    cfg = PlanConfig(folder_of(tmp_path, SIZES), stage="sft", r=RANK)
    (actor,) = [role for role in roles_of(cfg) if role.role == "actor"]
    w = torch.nn.Parameter(torch.zeros(int(actor.learned)))
    optimizer = torch.optim.AdamW([w])
    w.grad = torch.ones_like(w)
    optimizer.step()
    tensors = [w, w.grad, *(x for x in optimizer.state[w].values() if x.dim())]
    found = {part.name: part.bytes for part in plan(cfg).parts}
    states = sum(found[name] for name in ("actor", "gradients", "optimiser"))
    assert states == sum(x.nbytes for x in tensors)


# --- shapes ---------------------------------------------------------------------------------------


def test_weights_are_those_of_a_real_model(tmp_path):
    model = build_model(SMALL)
    found = weights(folder_of(tmp_path, SMALL), 4, 4, "head")
    tower = sum(p.numel() for p in model.model.vision_tower.parameters())
    assert found.tower == tower
    assert found.tower + found.projector + found.language == sum(
        p.numel() for p in {id(p): p for p in model.parameters()}.values()
    )


def test_a_step_on_shapes_allocates_what_a_real_one_does(tmp_path):
    "On the CPU, in float32: the same operations, the same bytes."
    model = folder_of(tmp_path, SIZES)
    config, step, found = model_config(model), Step(20, 12), []
    for device in ("meta", "cpu"):
        blank = Blank(config, torch.float32)
        shapes._roles(blank, 4, 4, "head")
        if device == "cpu":
            blank.model.to_empty(device="cpu")
        blank.model.requires_grad_(False)
        for p in blank.role("actor").trained():
            p.requires_grad_(True)
            p.grad = torch.zeros_like(p)
        with torch.device(device):
            found.append(run_on(blank, device, step))
    on_shapes, real = found
    assert on_shapes == pytest.approx(real, rel=0.02)


def run_on(blank, device, step):
    "Bytes that wait for the way back, and the most there are."
    long = step.prompt + step.answer
    x = torch.zeros(3, long, blank.width, device=device)
    sees = torch.ones(3, 1, long, long, dtype=torch.bool, device=device)
    at = torch.zeros(3, long, dtype=torch.long, device=device)
    there = [*blank.model.parameters(), *blank.model.buffers(), x, sees, at]
    fused = mock.patch.object(F, "scaled_dot_product_attention", shapes._fused)
    with ExitStack() as stack:
        stack.enter_context(fused if device == "meta" else nullcontext())
        held = stack.enter_context(Allocated(there))
        language = stack.enter_context(shapes.passing(blank, blank.language, "actor"))
        how = dict(attention_mask=sees, position_ids=at, use_cache=False)
        h = language(inputs_embeds=x, **how).last_hidden_state
        waiting = held.now
        torch.autograd.backward([h.sum()])
    return waiting, held.most


def test_checkpointing_keeps_the_inputs_of_layers(tmp_path):
    model = folder_of(tmp_path, SIZES)
    plain, again = (
        step_bytes(model, torch.float32, 4, Step(64, 8, checkpointing=on))[1].held
        for on in (False, True)
    )
    inputs = 72 * SIZES.width * 4 * SIZES.layers
    assert inputs <= again < 2.5 * inputs and again < plain / 3


def test_limits_of_a_blank_model_are_its_own():
    assert Blank(model_config("7b"), layers=1).limits == Limits()


@pytest.mark.parametrize("name", shapes.KNOWN)
def test_every_known_model_can_be_planned(name):
    found = plan(PlanConfig(name, gpus=8, zero=3))
    assert found.fits and 0 < found.bytes("sampling") and 0 < found.bytes("update")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="no shapes are known by that name"):
        model_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(UserError, match="no configuration"):
        model_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="bert"):
        plan(PlanConfig(str(tmp_path)))


# --- plans ----------------------------------------------------------------------------------------


def test_more_gpus_and_higher_stages_never_take_more():
    "Model states of one GPU; what is put together on the way is another matter."
    sizes = []
    for zero in (1, 2, 3):
        cfg = PlanConfig("7b", route="full", gpus=8, zero=zero)
        sizes.append(sum(p.bytes for p in plan(cfg).parts if p.name in STATES))
    assert sizes == sorted(sizes, reverse=True)
    by_nodes = [
        sum(p.bytes for p in plan(cfg).parts if p.name in STATES)
        for cfg in (PlanConfig("7b", route="full", gpus=8, nodes=n, zero=3) for n in (1, 2, 4))
    ]
    assert by_nodes[0] > 1.9 * by_nodes[1] > 3.6 * by_nodes[2]


def test_the_table_of_known_facts():
    """LoRA of rank 64 on one trunk, eight GPUs, GB by hand: without heads, which are the rest."""
    for model, zero, size in (("7b", 2, 15.6), ("7b", 3, 2.4), ("13b", 2, 29.1)):
        cfg = PlanConfig(model, r=64, reward_r=64, critic="adapter", gpus=8, zero=zero)
        cfg = PlanConfig(**vars(cfg) | dict(trained="bfloat16"))
        roles = {*STATES, "critic", "reward"}
        states = sum(p.bytes for p in plan(cfg).parts if p.name in roles) / GB
        assert states == pytest.approx(size, rel=0.08), model


def test_offload_moves_states_to_the_host():
    here, away = (
        plan(PlanConfig("13b", route="full", gpus=8, zero=3, offload=on)) for on in (False, True)
    )
    assert here.host == 0 < away.host and away.most < here.most
    names = {part.name for part in away.parts}
    assert not names & {"gradients", "optimiser", "masters"}


def test_the_largest_batch_is_where_the_plan_turns():
    cfg = PlanConfig("7b", rollout=8)
    n = largest(cfg, "micro_batch", 512)
    at = [plan(PlanConfig("7b", rollout=8, micro_batch=m)).fits for m in (n, n + 1)]
    assert at == [True, False]


def test_remedies_are_tried_and_named():
    cfg = PlanConfig("13b", route="full", gpus=8)
    ways = remedies(cfg)
    assert ways and all(found.fits for _, found in ways)
    assert all(some in changes(cfg) for some, _ in ways)
    assert in_words(ways[0][0]) in table(plan(cfg))
    assert limit(plan(cfg))[0] in ("sampling", "update")


def test_roles_that_must_be_copied_say_so():
    "Under ZeRO-3 with `gather` the trunk stands whole beside its share while answers are sampled."
    apart, whole = (plan(PlanConfig("7b", gpus=8, zero=3, gather=g)) for g in (False, True))
    assert whole.bytes("sampling") - apart.bytes("sampling") == pytest.approx(12.1e9, rel=0.02)
    assert whole.bytes("update") == apart.bytes("update")


def test_single_precision_needs_the_merged_weights_besides():
    one = plan(PlanConfig("7b", dtype="float32"))
    (merged,) = [p for p in one.parts if p.name == "weights with the adapter added"]
    assert merged.when == "sampling" and merged.bytes > 20 * GB


def test_adapters_of_a_role_like_the_librarys(tmp_path):
    found = weights(folder_of(tmp_path, SIZES), 4, 8, "adapter")
    blank = Blank(model_config(str(tmp_path)), torch.float32)
    with torch.device("meta"):
        role = blank.add_role("actor", LoRAConfig(r=4))
    assert found.actor == sum(p.numel() for p in role.trained())
    assert found.critic > found.actor and found.reward > found.actor
