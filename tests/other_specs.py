"""What each type in `other_models.py` needs besides a small configuration: an image processor, a
mark for a picture, settings. `@token` stands for the number of a token."""

import importlib.util

import transformers as T

SQUARE = dict(height=32, width=32)
QWEN = "<vision><image></vision>"
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


def merged(old: dict, new: dict) -> dict:
    "Nested dictionaries, the new entries in the old ones' places."
    nested = {k: merged(old[k], v) for k, v in new.items() if isinstance(old.get(k), dict)}
    return old | new | nested


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
    "mistral3": dict(
        images=lambda: T.PixtralImageProcessorPil(
            patch_size=dict(height=16, width=16), size=dict(longest_edge=64)
        ),
        patch_size=8,
        spatial_merge_size=2,
        image_token="<image>",
        image_break_token="<break>",
        image_end_token="<end>",
        config=dict(vision_feature_layer=-1),
    ),
    "lfm3_vl": dict(
        images=QWEN2,
        mark=QWEN,
        config=dict(text_config=dict(layer_types=["conv", "full_attention"])),
    ),
    "cohere2_vision": dict(
        images=lambda: T.Cohere2VisionImageProcessor(
            size=SQUARE, min_patches=1, max_patches=4, patch_size=4
        ),
        named=dict(
            image_token="<|IMG_PATCH|>",
            boi_token="<|START_OF_IMG|>",
            eoi_token="<|END_OF_IMG|>",
            img_line_break_token="<|IMG_LINE_BREAK|>",
        ),
        mark="<|IMG_PATCH|>",
        config=dict(
            image_token_id="@<|IMG_PATCH|>",
            downsample_factor=1,
            alignment_intermediate_size=64,
            **SIGLIP,
        ),
    ),
    "lfm2_vl": dict(
        images=lambda: T.Lfm2VlImageProcessor(
            encoder_patch_size=8,
            tile_size=32,
            min_image_tokens=4,
            max_image_tokens=16,
            max_num_patches=64,
        ),
        named=dict(image_thumbnail_token="<thumb>"),
        config=dict(text_config=dict(layer_types=["conv", "full_attention"])),
    ),
    "llama4": dict(
        images=lambda: T.Llama4ImageProcessor(size=SQUARE, max_patches=4),
        patch_size=8,
        tokens=[
            "<|image|>",
            "<|patch|>",
            "<|image_start|>",
            "<|image_end|>",
            "<|tile_x_separator|>",
            "<|tile_y_separator|>",
        ],
        mark="<|image|>",
        config=dict(
            image_token_id="@<|patch|>",
            image_token_index="@<|patch|>",
            vision_config=dict(
                intermediate_size=128,
                projector_input_dim=32,
                projector_output_dim=32,
                vision_output_dim=32,
            ),
            text_config=dict(intermediate_size_mlp=64),
        ),
    ),
}
# types that are refused at their first pass
AT_WORK = {
    "chameleon": dict(
        images=lambda: T.ChameleonImageProcessorPil(size=dict(shortest_edge=32), crop_size=SQUARE),
        image_seq_length=4,
        mark="",
        config=dict(
            vocabulary_map={"<image>": "@<image>"} | CODES,
            vq_config=dict(num_embeddings=8, base_channels=32, latent_channels=32),
        ),
    ),
    "git": dict(images=tiles(T.CLIPImageProcessorPil, crop_size=SQUARE), mark=""),
}
# types whose processors need torchvision: they are run where it is installed
TORCHVISION = ("cohere2_vision", "lfm2_vl", "llama4", "mistral3")
if importlib.util.find_spec("torchvision") is None:
    OTHERS = {kind: spec for kind, spec in OTHERS.items() if kind not in TORCHVISION}
