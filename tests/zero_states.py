"What a process holds under DeepSpeed: bytes of weights, copies, gradients, optimiser states."

import json
import os
import socket
import time

import torch
from torch import nn

from vlmrlhf_course.model.roles import LoRAConfig
from vlmrlhf_course.model.vlm import VLM
from vlmrlhf_course.world.llava import VLMConfig, build_model, build_processor

SIZES = VLMConfig(vision_width=64, vision_layers=1, width=64, layers=2)
RANK = 8
ROUTES = dict(lora="float32", language="bfloat16")  # route → dtype of all that there is


def tiny(route: str) -> nn.Module:
    "A small LLaVA of which an adapter learns, or the whole language model."
    torch.manual_seed(0)
    vlm = VLM(build_model(SIZES), build_processor(SIZES))
    model = vlm.model.requires_grad_(False)
    if route == "language":
        vlm.language.requires_grad_(True)
        model.get_output_embeddings().requires_grad_(True)
    else:
        vlm.add_role("actor", LoRAConfig(r=RANK))
        for layer in vlm.lora_layers():
            vars(layer).update(_active_adapter=["actor"], _disable_adapters=False)
    return model.to(getattr(torch, ROUTES[route]))


def held(model: nn.Module, zero) -> int:
    "Bytes of a process: every storage once."
    found = [p.data for p in model.parameters()]
    found += [p.grad for p in model.parameters() if p.grad is not None]
    found += [p.ds_tensor.data for p in model.parameters() if hasattr(p, "ds_tensor")]
    found += getattr(zero, "single_partition_of_fp32_groups", [])
    found += getattr(zero, "fp32_partitioned_groups_flat", [])
    for kept in ("averaged_gradients", "all_grad_tensors"):
        for grads in (getattr(zero, kept, None) or {}).values():
            found += [x for x in grads or [] if x is not None]
    buffer = getattr(zero, "grad_partitions_flat_buffer", None)
    found += [] if buffer is None else [buffer]
    for state in zero.optimizer.state.values():
        found += [x for x in state.values() if torch.is_tensor(x) and x.dim()]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}
    return sum(storages.values())


def settings(stage: int, dtype: str) -> dict:
    "DeepSpeed's JSON, in which nothing is left to its defaults that would hide a share."
    return dict(
        train_micro_batch_size_per_gpu=1,
        gradient_accumulation_steps=2,
        gradient_clipping=0.0,
        zero_optimization=dict(stage=stage, stage3_param_persistence_threshold=0),
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,
        bf16=dict(enabled=dtype == "bfloat16"),
        steps_per_print=10**9,
    )


def states(route: str, stage: int) -> int:
    "Bytes that are held between the two micro-batches of a second step."
    import deepspeed

    model = tiny(route)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    how = dict(config=settings(stage, ROUTES[route]), dist_init_required=False)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, **how)
    words = torch.randint(8, 20, (1, 12))
    for micro in range(3):
        loss = engine(input_ids=words, attention_mask=torch.ones_like(words), use_cache=False)
        engine.backward(loss.logits.float().pow(2).mean())
        if micro == 2:
            return held(model, engine.optimizer)
        engine.step()


def process(rank: int, n: int, folder, port: int):
    "One of `n` processes: all cases, into `folder`."
    where = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu")
    where |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n))
    os.environ.update(where)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=n)
    found = {f"{route} {stage}": states(route, stage) for route in ROUTES for stage in (1, 2, 3)}
    (folder / f"{n}-{rank}.json").write_text(json.dumps(found))


def measured(n: int, folder) -> list[dict[str, int]]:
    "What each of `n` processes held, by case."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    how = dict(join=False, start_method="fork")
    started = torch.multiprocessing.start_processes(process, (n, folder, port), n, **how)
    end = time.time() + 120
    try:
        while not started.join(1):
            assert time.time() < end, "processes wait for each other"
    finally:
        for p in started.processes:
            p.kill()
    return [json.loads((folder / f"{n}-{rank}.json").read_text()) for rank in range(n)]
