"""Tiny random models of types that have no family of their own: the real classes of transformers,
each with its real processor on a word-level tokenizer.

A configuration starts from the type's own default; whatever is large in it is made small by name
(`SMALL`), and `OTHERS` says what a type needs besides."""

import torch
import transformers as T
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from vlmrlhf_course.model.family import WORDS, chat_template, word_tokenizer

SQUARE = dict(height=32, width=32)
WIDTHS = """hidden_size embed_dim out_hidden_size projection_dim d_model text_hidden_size
    vision_output_dim encoder_hidden_size mm_hidden_size"""
LAYERS = """num_hidden_layers num_layers n_layer depth encoder_layers decoder_layers
    resampler_depth"""
HEADS = """num_attention_heads num_heads n_head encoder_attention_heads decoder_attention_heads
    num_experts n_routed_experts num_local_experts linear_num_value_heads"""
FEW = "num_key_value_heads num_experts_per_tok linear_num_key_heads"
HEAD = """head_dim patch_size kv_lora_rank q_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim
    linear_key_head_dim linear_value_head_dim global_head_dim hidden_size_per_layer_input"""
INNER = """intermediate_size mlp_dim ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff
    lm_intermediate_size"""
EXPERTS = "moe_intermediate_size shared_expert_intermediate_size"
SMALL = dict(image_size=32, max_position_embeddings=1024)
for names, value in (
    (WIDTHS, 32),
    (LAYERS, 2),
    (HEADS, 4),
    (FEW, 2),
    (HEAD, 8),
    (INNER, 64),
    (EXPERTS, 16),
):
    SMALL |= dict.fromkeys(names.split(), value)

NAMED = dict(
    image_token="<image>",
    video_token="<video>",
    vision_start_token="<vision>",
    vision_end_token="</vision>",
    boi_token="<boi>",
    eoi_token="<eoi>",
    image_start_token="<begin>",
    image_end_token="<end>",
    image_break_token="<break>",
    image_boundary_token="<fake>",
)
SPECIAL = dict(pad_token_id=0, eos_token_id=1, bos_token_id=None)
QWEN = "<vision><image></vision>"


def shrunk(config, words: int, ids: dict[str, int]):
    "A default configuration, made small."
    if not isinstance(config, dict):
        return config
    found = {}
    for key, value in config.items():
        if key in SPECIAL:
            found[key] = SPECIAL[key]
        elif key in ids:
            found[key] = ids[key]
        elif key == "per_layer_config":
            found[key] = {}
        elif key == "vocab_size":
            found[key] = words
        elif key == "layer_types" and value:
            found[key] = [value[0], value[-1]]
        elif key in SMALL and isinstance(value, (list, tuple)):
            found[key] = [SMALL[key]] * len(value)
        elif key in SMALL and value is not None:
            found[key] = SMALL[key]
        else:
            found[key] = shrunk(value, words, ids)
    return found


def merged(old: dict, new: dict) -> dict:
    "Nested dictionaries, the new entries in the old ones' places."
    nested = {k: merged(old[k], v) for k, v in new.items() if isinstance(old.get(k), dict)}
    return old | new | nested


def numbered(config, tok):
    "The same, with tokens' numbers for their names, which begin with @."
    if isinstance(config, dict):
        return {key: numbered(value, tok) for key, value in config.items()}
    if isinstance(config, list):
        return [numbered(value, tok) for value in config]
    named = isinstance(config, str) and config.startswith("@")
    return tok.convert_tokens_to_ids(config[1:]) if named else config


def tiny_config(kind: str, tok, changes: dict):
    "A small configuration of a type."
    ids = {f"{name}_id": tok.convert_tokens_to_ids(mark) for name, mark in NAMED.items()}
    ids |= dict(image_token_index=ids["image_token_id"], video_token_index=ids["video_token_id"])
    default = CONFIG_MAPPING[kind]().to_dict()
    for name in ("transformers_version", "architectures", "dtype", "_name_or_path"):
        default.pop(name, None)
    small = merged(shrunk(default, len(tok), ids), numbered(changes, tok))
    return CONFIG_MAPPING[kind].from_dict(small)


class Without(T.ProcessorMixin):
    "Takes no parts for films and sounds, which need libraries that are not installed."

    def __init__(self, *args, **kwargs):
        given = dict(zip(self.all_parts, args)) | kwargs
        super().__init__(**{name: part for name, part in given.items() if part is not None})


def processor_of(kind: str, tok, images, mark: str, **more):
    "A type's own processor, without films and sounds."
    cls = getattr(T, PROCESSOR_MAPPING_NAMES[kind])
    parts = cls.get_attributes()
    absent = {"video_processor", "feature_extractor"} & {*parts}
    if absent:
        left = [name for name in parts if name not in absent]
        own = dict(get_attributes=staticmethod(lambda: left), all_parts=parts)
        cls, more = type(cls.__name__, (cls, Without), own), dict.fromkeys(absent) | more
    if mark:
        more |= dict(chat_template=chat_template(mark))
    return cls(image_processor=images, tokenizer=tok, **more)


def tiny_other(kind: str, seed: int = 0) -> tuple:
    "A random model of a type, in eval mode, and its processor."
    spec = dict(OTHERS[kind])
    named = NAMED | spec.pop("named", {})
    named = {name: mark for name, mark in named.items() if mark}
    tok = word_tokenizer(WORDS, named, spec.pop("tokens", ()), **spec.pop("special", {}))
    config, images = spec.pop("config", {}), spec.pop("images")
    processor = processor_of(kind, tok, images(), spec.pop("mark", "<image>"), **spec)
    config = tiny_config(kind, processor.tokenizer, config)
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = T.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
        for p in model.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.15)
        for name, p in model.named_parameters():
            if "gate" in name and not p.any():  # closed at first: no picture would be seen
                nn.init.constant_(p, 0.5)
    return model, processor


def patches(cls, **more):
    "An image processor that takes pictures of any size."
    return lambda: cls(patch_size=8, **more)


def tiles(cls, **more):
    "An image processor that makes squares."
    return lambda: cls(size=SQUARE, **more)


AREA = dict(size=dict(shortest_edge=16 * 16, longest_edge=48 * 48))
ROPE = dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])
PLAIN_ROPE = dict(rope_type="default", rope_theta=1e4)
QWEN2 = patches(T.Qwen2VLImageProcessorPil, min_pixels=16 * 16, max_pixels=48 * 48)
MROPE = dict(text_config=dict(rope_parameters=ROPE))
WOVEN = dict(text_config=dict(rope_parameters=ROPE | dict(mrope_interleaved=True)))
DEEP = dict(vision_config=dict(num_position_embeddings=36, deepstack_visual_indexes=[0, 1]))
FULL = dict(vision_feature_layer=-1, vision_feature_select_strategy="full")
SIGLIP = dict(vision_config=dict(vision_use_head=False))
SHAPES = [[32, 64], [64, 32], [64, 64]]
AYA = ["<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>"]
AYA += ["TILE_GLOBAL", *(f"TILE_{i}" for i in range(1, 7))]
OVIS = ["<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
CUT = dict(crop_to_patches=True, min_patches=1, max_patches=4)
INTERN = dict(start_image_token="<img>", end_image_token="</img>")
INTERN |= dict(context_image_token="<IMG_CONTEXT>")
GEMMA_TOWER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8)
GEMMA_TOWER |= dict(
    num_attention_heads=4, num_key_value_heads=4, patch_size=8, position_embedding_size=64
)
CODES = {f"IMGIMG{c}Z": 10 + i for i, c in enumerate("ABCDEFGH")}
OTHERS = {
    "qwen3_vl_moe": dict(images=QWEN2, mark=QWEN, config=merged(WOVEN, DEEP)),
    "qwen3_5": dict(images=QWEN2, mark=QWEN, config=merged(WOVEN, DEEP)),
    "qwen3_5_moe": dict(images=QWEN2, mark=QWEN, config=merged(WOVEN, DEEP)),
    "aya_vision": dict(
        images=tiles(T.GotOcr2ImageProcessorPil, **CUT),
        tokens=AYA,
        patch_size=8,
        img_size=32,
        downsample_factor=2,
        config=dict(downsample_factor=2, image_token_id="@<|IMG_PATCH|>", **SIGLIP),
    ),
    "llava_onevision": dict(
        images=tiles(T.LlavaOnevisionImageProcessorPil, image_grid_pinpoints=SHAPES),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        config=dict(image_grid_pinpoints=SHAPES, **SIGLIP, **FULL),
    ),
    "mllama": dict(
        images=tiles(T.MllamaImageProcessorPil, max_image_tiles=4),
        special=dict(bos_token="<bos>"),
        config=dict(
            vision_config=dict(
                intermediate_layers_indices=[0],
                num_global_layers=1,
                max_num_tiles=4,
                vision_output_dim=64,
            ),
            text_config=dict(
                bos_token_id="@<bos>", cross_attention_layers=[1], rope_parameters=PLAIN_ROPE
            ),
        ),
    ),
    "gemma4": dict(
        images=patches(T.Gemma4ImageProcessorPil, max_soft_tokens=70),
        image_seq_length=4,
        named=dict(audio_token="<audio>", boa_token="<boa>", eoa_token="<eoa>"),
        config=dict(
            vision_config=dict(GEMMA_TOWER),
            audio_config=None,
            text_config=dict(
                layer_types=["sliding_attention", "full_attention"], vocab_size_per_layer_input=64
            ),
        ),
    ),
    "idefics2": dict(
        images=lambda: T.Idefics2ImageProcessorPil(size=dict(shortest_edge=16, longest_edge=32)),
        image_seq_len=4,
        config=dict(perceiver_config=dict(resampler_n_latents=4)),
    ),
    "aria": dict(
        images=lambda: T.AriaImageProcessorPil(max_image_size=490, min_image_size=336),
        size_conversion={490: 4, 980: 4},
        config=dict(
            vision_config=dict(patch_size=140, image_size=980),
            projector_patch_to_query_dict={49: 4},
        ),
    ),
    "llava_next_video": dict(
        images=tiles(T.LlavaNextImageProcessorPil, crop_size=SQUARE, image_grid_pinpoints=SHAPES),
        config=dict(image_grid_pinpoints=SHAPES),
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        patch_size=8,
    ),
    "vipllava": dict(
        images=tiles(T.CLIPImageProcessorPil, crop_size=SQUARE),
        config=dict(vision_feature_layers=[-1, -2]),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ),
    "glm4v": dict(images=patches(T.Glm4vImageProcessorPil, **AREA), mark=QWEN, config=MROPE),
    "glm4v_moe": dict(
        images=patches(T.Glm4vImageProcessorPil, **AREA),
        mark=QWEN,
        config=merged(MROPE, dict(text_config=dict(head_dim=16) | MROPE["text_config"])),
    ),
    "glm46v": dict(images=patches(T.Glm46VImageProcessorPil, **AREA), mark=QWEN, config=MROPE),
    "lighton_ocr": dict(
        images=lambda: T.PixtralImageProcessorPil(
            patch_size=dict(height=16, width=16), size=dict(longest_edge=64)
        ),
        patch_size=8,
    ),
    "ovis2": dict(
        images=tiles(T.Ovis2ImageProcessorPil, **CUT),
        image_seq_length=16,
        tokens=OVIS,
        config=dict(
            image_token_id="@<IMG_ATOM>",
            visual_indicator_token_ids=[f"@{OVIS[i]}" for i in (1, 2, 3, 4, 5)],
        ),
    ),
    "paddleocr_vl": dict(
        images=patches(T.PaddleOCRVLImageProcessorPil, **AREA), mark=QWEN, config=MROPE
    ),
    "video_llama_3": dict(images=patches(T.VideoLlama3ImageProcessorPil, **AREA)),
    "video_llava": dict(images=tiles(T.VideoLlavaImageProcessor, crop_size=SQUARE), patch_size=8),
    "deepseek_vl": dict(
        images=tiles(T.DeepseekVLImageProcessorPil), num_image_tokens=16, config=SIGLIP
    ),
    "deepseek_vl_hybrid": dict(
        images=tiles(T.DeepseekVLHybridImageProcessorPil, high_res_size=dict(height=64, width=64)),
        num_image_tokens=16,
        config=dict(
            high_res_vision_config=dict(image_size=64, global_attn_indexes=[1], output_channels=16),
            **SIGLIP,
        ),
    ),
    "janus": dict(
        images=tiles(T.JanusImageProcessorPil),
        num_image_tokens=16,
        config=dict(vq_config=dict(base_channels=32, latent_channels=32, num_embeddings=64)),
    ),
    "exaone4_5": dict(images=QWEN2, mark=QWEN, config=MROPE),
    "hyperclovax_vision_v2": dict(images=QWEN2, mark=QWEN),
    "qianfan_ocr": dict(
        named=INTERN,
        images=tiles(T.GotOcr2ImageProcessorPil, **CUT),
        image_seq_length=4,
        config=dict(image_token_id="@<IMG_CONTEXT>"),
    ),
    "granite_docling": dict(
        images=tiles(T.GraniteDoclingImageProcessorPil, **CUT), image_seq_len=1
    ),
    "ernie4_5_vl_moe": dict(
        named=dict(video_start_token="<film>", video_end_token="</film>"),
        images=patches(T.Ernie4_5_VLMoeImageProcessorPil, **AREA),
        mark="<begin><image><end>",
        config=MROPE,
    ),
}
