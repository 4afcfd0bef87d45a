"""Tiny random models of types that have no family of their own: the real classes of transformers,
each with its real processor on a word-level tokenizer.

A configuration starts from the type's own default; whatever is large in it is made small by name
(`SMALL`), and `OTHERS` of `other_specs.py` says what a type needs besides."""

import torch
import transformers as T
from other_specs import AT_WORK, NAMED, OTHERS, merged
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from vlmrlhf_course.model.family import WORDS, chat_template, word_tokenizer

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

SPECIAL = dict(pad_token_id=0, eos_token_id=1, bos_token_id=None)


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
    spec = dict((OTHERS | AT_WORK)[kind])
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
