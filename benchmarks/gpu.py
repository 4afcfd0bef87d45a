"""The same PPO step on a LLaVA of 1.5-7B's shape, random weights in bf16, LoRA on one shared trunk,
on a GPU: `python -m benchmarks.gpu`. Beside it the textbook pipeline; its four models share memory
here, as four of this size do not fit."""

import argparse
import contextlib
import sys

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from benchmarks.common import (
    PAID,
    Library,
    build,
    fresh_prompts,
    matmul_rate,
    medians,
    number,
    save,
    table,
    update_flops,
)
from benchmarks.textbook import Naive
from vlmrlhf_course.model.vlm import VLM
from vlmrlhf_course.rl.algorithm import Experience
from vlmrlhf_course.rl.ppo import PPOConfig
from vlmrlhf_course.world.llava import build_processor, build_tokenizer

SHAPES = {  # vision: CLIP ViT; text: Llama
    "7b": dict(
        vision=dict(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        ),
        text=dict(
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            vocab_size=32064,
        ),
    ),
    "tiny": dict(
        vision=dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        ),
        text=dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=128,
        ),
    ),
}

PEAK = {  # dense bf16, by the maker
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "4090": 165e12,
}


def llava(shape: str, device, dtype) -> VLM:
    "A LLaVA of a shape, with random weights made where they are used."
    sizes, tok = SHAPES[shape], build_tokenizer()
    text = LlamaConfig(
        **sizes["text"],
        max_position_embeddings=4096,
        pad_token_id=tok.pad_token_id,
        eos_token_id=tok.eos_token_id,
        bos_token_id=None,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes["vision"]),
        text_config=text,
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    how = dict(attn_implementation="sdpa", dtype=dtype)
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(config, **how)
    model.generation_config.update(pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id)
    side = sizes["vision"]["image_size"]
    square = dict(height=side, width=side)
    images = CLIPImageProcessorPil(size=dict(shortest_edge=side), crop_size=square)
    processor = LlavaProcessor(
        images,
        tok,
        patch_size=sizes["vision"]["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=build_processor().chat_template,
    )
    return VLM(model.eval(), processor)


def peak_rate(name: str) -> float | None:
    "The maker's dense bf16 FLOP/s, where we know the GPU."
    for gpu, rate in PEAK.items():
        if all(part in name for part in gpu.split()):
            return rate
    return None


def measure(vlm: VLM, cfg: PPOConfig, rounds: int, naive_answers: int) -> list[dict]:
    """Time the library, then the textbook pipeline on fewer answers. The first round of each is not
    counted."""
    device = vlm.device
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else "cpu"
    measured = matmul_rate(vlm.model.dtype, device, 8192 if on_gpu else 512)
    policy, rm = build(cfg, vlm=vlm)
    lib, naive, sides = Library(policy, rm), Naive(policy, rm, cfg, shared=True), []
    for side, n in ((lib, cfg.answers), (naive, naive_answers)):
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        t = timed(side, vlm, n, rounds)
        row = dict(
            side="library" if side is lib else "naive",
            answers_per_s=n / t["all"],
            tokens_per_s=t["tokens"] / t["all"],
            **{k: 1000 * t[k] / n for k in ("sample", "score", "update", "all")},
        )
        if side is lib:
            rate = t["flops"] / t["update"]
            peak = peak_rate(name) or measured
            row |= dict(tflops=rate / 1e12, of_measured=rate / measured, mfu=rate / peak)
        if on_gpu:
            row |= dict(peak_gib=torch.cuda.max_memory_allocated() / 2**30)
        sides.append(row)
    return sides


def timed(side: Library | Naive, vlm: VLM, n: int, rounds: int) -> dict[str, float]:
    "Medians of a side's seconds on `n` answers, its tokens, and the library's FLOPs."
    found = []
    for step, prompts in enumerate(fresh_prompts(side.cfg, n, rounds + 1)):
        with autocast(vlm):
            said = side.iteration(prompts, step)
        if isinstance(side, Library):
            spans = side.take()
            spans["update"] = spans["backward"] + spans["step"]
            spans["tokens"] = int(said.batch.answer_mask.sum())
            spans["flops"] = flops_of(side, said, step)
        else:
            spans = side.clock.take()
            spans["tokens"] = sum(e["answer"].shape[1] for e in said)
        found.append(spans)
    return medians(found[1:])


def autocast(vlm: VLM):
    "bfloat16 where the weights are."
    if vlm.model.dtype != torch.bfloat16:
        return contextlib.nullcontext()
    return torch.autocast(vlm.device.type, torch.bfloat16)


def flops_of(lib: Library, exp: Experience, step: int) -> float:
    "FLOPs of an iteration's updates, in the parts in which they are computed."
    total = 0.0
    for group in lib.groups(exp, step):
        for part in torch.tensor(group).split(lib.cfg.at_once):
            total += update_flops(lib.policy, exp.batch.rows(part))
    return total


HEAD = [
    "ms per answer",
    "sampling",
    "scoring",
    "update",
    "all",
    "answers/s",
    "answer tokens/s",
    "TFLOP/s of the update",
    "MFU",
    "peak memory, GiB",
]
FIGURES = ("sample", "score", "update", "all", "answers_per_s", "tokens_per_s")


def rows(result: dict) -> str:
    "The table of README.md."
    names = dict(library="library", naive="textbook, one answer at a time")
    body = []
    for side in result["sides"]:
        figures = [number(side[figure]) for figure in FIGURES]
        rate = number(side["tflops"]) if "tflops" in side else ""
        mfu = f"{side['mfu']:.0%}" if "mfu" in side else ""
        peak = number(side["peak_gib"]) if "peak_gib" in side else ""
        body.append([names[side["side"]], *figures, rate, mfu, peak])
    lib, naive = result["sides"]
    times = f"{naive['all'] / lib['all']:.1f}"
    said = f"The textbook pipeline takes {times} times as long. {result['machine']}."
    return f"{table(HEAD, body)}\n\n{said}"


def path_table(result: dict) -> str:
    "What stages of a run on a checkpoint of this shape held: read by hand off nvidia-smi's log."
    body = []
    for row in result.get("path", []):
        layers = "yes" if row["checkpointing"] else "no"
        held = "more than there was" if row["gb"] is None else number(row["gb"])
        body.append([row["stage"], layers, held, "yes" if row["ended"] else "no"])
    return table(["stage", "gradient checkpointing", "GB on the card", "ended"], body)


NO_GPU = "benchmarks.gpu: no GPU here (torch.cuda.is_available() is False); it needs one"
NO_GPU += " with about 80 GB"


def main(argv=None) -> int:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--answers", type=int, default=32)
    parser.add_argument("--naive-answers", type=int, default=4)
    parser.add_argument("--group", type=int, default=4, help="answers to a prompt")
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    cpu = "try the code on the CPU, with --shape tiny; nothing is saved"
    parser.add_argument("--cpu", action="store_true", help=cpu)
    args = parser.parse_args(argv)
    if not args.cpu and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    if args.naive_answers % args.group:
        wrong = f"--naive-answers {args.naive_answers}"
        parser.error(f"{wrong} must be a multiple of --group {args.group}")
    cfg = PPOConfig(
        reward=PAID,
        answers=args.answers,
        answers_per_prompt=args.group,
        minibatch=args.answers,
        micro_batch=args.micro_batch,
        max_new_tokens=args.new_tokens,
        actor_lr=1e-9,
        critic_lr=1e-9,
    )
    vlm = llava(args.shape, "cpu" if args.cpu else "cuda", torch.bfloat16)
    sides = measure(vlm, cfg, args.rounds, args.naive_answers)
    result = dict(
        shape=args.shape,
        answers=args.answers,
        group=args.group,
        micro_batch=args.micro_batch,
        new_tokens=args.new_tokens,
        sides=sides,
    )
    print(rows(dict(machine="CPU") | result if args.cpu else save("gpu", result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
