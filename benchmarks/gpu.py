"""The same PPO step on a LLaVA of 1.5-7B's shape, random weights in bf16, LoRA on one shared trunk, on a GPU:
`python -m benchmarks.gpu`. Beside it the textbook pipeline; its four models share memory here, as four of this size do not fit."""
import argparse
import contextlib
import sys

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from benchmarks.common import Library, build, fresh_prompts, matmul_rate, medians, number, save, table, update_flops
from benchmarks.naive import Naive
from vlmrlhf_course.rl.ppo import PPOConfig
from vlmrlhf_course.model.vlm import VLM, build_processor, build_tokenizer

SHAPES = {   # vision: CLIP ViT; text: Llama
    "7b": dict(vision=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
                           patch_size=14),
               text=dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
                         vocab_size=32064)),
    "tiny": dict(vision=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28,
                             patch_size=14),
                 text=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                           vocab_size=128))}

PEAK = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12,
        "4090": 165e12}   # dense bf16, by the maker


def llava(shape: str, device, dtype) -> VLM:
    "A LLaVA of a shape, with random weights made where they are used."
    sizes, tok = SHAPES[shape], build_tokenizer()
    text = LlamaConfig(**sizes["text"], max_position_embeddings=4096, pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id,
                       bos_token_id=None)
    config = LlavaConfig(vision_config=CLIPVisionConfig(**sizes["vision"]), text_config=text,
                         image_token_id=tok.convert_tokens_to_ids("<image>"),
                         vision_feature_layer=-2, vision_feature_select_strategy="default", tie_word_embeddings=False)
    with torch.device(device): model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa", dtype=dtype)
    model.generation_config.update(pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id)
    side = sizes["vision"]["image_size"]
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = LlavaProcessor(images, tok, patch_size=sizes["vision"]["patch_size"], vision_feature_select_strategy="default",
                               num_additional_image_tokens=1, chat_template=build_processor().chat_template)
    return VLM(model.eval(), processor)


def peak_rate(name: str) -> float | None:
    "The maker's dense bf16 FLOP/s, where we know the GPU."
    return next((v for k, v in PEAK.items() if all(part in name for part in k.split())), None)


def measure(vlm: VLM, cfg: PPOConfig, rounds: int, naive_answers: int) -> list[dict]:
    "Time the library, then the textbook pipeline on fewer answers. The first round of each is not counted."
    device, half = vlm.device, vlm.model.dtype == torch.bfloat16
    cast = torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    measured = matmul_rate(vlm.model.dtype, device, 8192 if device.type == "cuda" else 512)
    policy, rm = build(cfg, vlm=vlm)
    lib, naive, sides = Library(policy, rm, cfg), Naive(policy, rm, cfg, shared=True), []
    for side, n in ((lib, cfg.answers), (naive, naive_answers)):
        if device.type == "cuda": torch.cuda.reset_peak_memory_stats()
        found, ours = [], side is lib
        for step, prompts in enumerate(fresh_prompts(cfg, n, rounds + 1)):
            with cast: said = side.iteration(prompts, step)
            t = side.clock.take()
            if ours:
                groups = [part for g in lib.groups(said[0], step) for part in torch.tensor(g).split(cfg.at_once)]   # as they are computed
                flops = sum(update_flops(policy, said[0].batch.rows(g), cfg.critic) for g in groups)
                t |= dict(update=t["backward"] + t["step"], tokens=int(said[0].batch.answer_mask.sum()), flops=flops)
            else: t |= dict(tokens=sum(e["answer"].shape[1] for e in said))
            found.append(t)
        t = medians(found[1:])
        row = dict(side="library" if ours else "naive", answers_per_s=n / t["all"], tokens_per_s=t["tokens"] / t["all"],
                   **{k: 1000 * t[k] / n for k in ("sample", "score", "update", "all")})
        if ours: row |= dict(tflops=t["flops"] / t["update"] / 1e12, of_measured=t["flops"] / t["update"] / measured,
                             mfu=t["flops"] / t["update"] / (peak_rate(name) or measured))
        if device.type == "cuda": row |= dict(peak_gib=torch.cuda.max_memory_allocated() / 2 ** 30)
        sides.append(row)
    return sides


def rows(result: dict) -> str:
    "The table of README.md."
    names, (lib, naive) = dict(library="library", naive="textbook, one answer at a time"), result["sides"]
    body = [[names[s["side"]], *(number(s[k]) for k in ("sample", "score", "update", "all", "answers_per_s", "tokens_per_s")),
             number(s["tflops"]) if "tflops" in s else "", f"{s['mfu']:.0%}" if "mfu" in s else "",
             number(s["peak_gib"]) if "peak_gib" in s else ""] for s in (lib, naive)]
    head = ["ms per answer", "sampling", "scoring", "update", "all", "answers/s", "answer tokens/s", "TFLOP/s of the update", "MFU",
            "peak memory, GiB"]
    return table(head, body) + f"\n\nThe textbook pipeline takes {naive['all'] / lib['all']:.1f} times as long. {result['machine']}."


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--answers", type=int, default=32)
    parser.add_argument("--naive-answers", type=int, default=4)
    parser.add_argument("--group", type=int, default=4, help="answers to a prompt")
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="try the code on the CPU, with --shape tiny; nothing is saved")
    args = parser.parse_args(argv)
    if not args.cpu and not torch.cuda.is_available():
        print("benchmarks.gpu: no GPU here (torch.cuda.is_available() is False); it needs one with about 80 GB", file=sys.stderr)
        return 2
    if args.naive_answers % args.group: parser.error(f"--naive-answers {args.naive_answers} must be a multiple of --group {args.group}")
    cfg = PPOConfig(answers=args.answers, answers_per_prompt=args.group, minibatch=args.answers, micro_batch=args.micro_batch, max_new_tokens=args.new_tokens,
                    actor_lr=1e-9, critic_lr=1e-9)
    vlm = llava(args.shape, "cpu" if args.cpu else "cuda", torch.bfloat16)
    sides = measure(vlm, cfg, args.rounds, args.naive_answers)
    result = dict(shape=args.shape, answers=args.answers, group=args.group, micro_batch=args.micro_batch, new_tokens=args.new_tokens, sides=sides)
    print(rows(dict(machine="CPU") | result if args.cpu else save("gpu", result)))
    return 0


if __name__ == "__main__": sys.exit(main())
