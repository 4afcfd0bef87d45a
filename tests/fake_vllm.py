"""A stand-in for the package `vllm`, which needs a GPU: the part of vLLM 0.33.0's public interface
that `rl.vllm_engine` uses, by the same names, over a model that plain libraries load.

What is easily got wrong there goes wrong here, too: adapters are kept by number, prompts are
expanded by the processor, log-probabilities are raw unless somebody asks for others, memory that
sleeps cannot be used, and at level 2 it is gone."""

import copy
import sys
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, LogitsProcessor

from vlmrlhf_course.model.vlm import load_vlm


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True
    logit_bias: dict[int, float] | None = None


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None
    load_inplace: bool = False

    def __post_init__(self):
        assert self.lora_int_id > 0 and self.lora_path


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None


@dataclass
class CompletionOutput:
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)


class Biased(LogitsProcessor):
    "What a request adds to logits, and what other kernels do to them."

    def __init__(self, bias: dict[int, float], noise: float):
        self.bias, self.noise = bias, noise

    def __call__(self, input_ids, scores):
        drawn = torch.randn(scores.shape[1], generator=torch.Generator().manual_seed(5))
        scores = scores + self.noise * drawn
        for token, value in self.bias.items():
            scores[:, token] += value
        return scores


class LLM:
    noise = 0.0  # how far its logits are from those of the same weights elsewhere
    more = 0  # placeholders that its processor writes too many

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        gpu_memory_utilization: float = 0.92,
        enable_sleep_mode: bool = False,
        generation_config: str = "auto",
        logprobs_mode: str = "raw_logprobs",
        max_model_len: int | None = None,
        enable_lora: bool = False,
        max_loras: int = 1,
        max_lora_rank: int = 16,
        distributed_executor_backend: str | None = None,
    ):
        self.vlm = load_vlm(model, dtype=getattr(torch, dtype))
        if generation_config == "vllm":
            self.vlm.model.generation_config = GenerationConfig()
        self.mode, self.sleeps = logprobs_mode, enable_sleep_mode
        self.rank = max_lora_rank if enable_lora else 0
        self.awake, self.adapters, self.calls = {"weights", "kv_cache"}, {}, []

    def sleep(self, level: int = 1, mode: str = "abort"):
        assert self.sleeps and self.awake == {"weights", "kv_cache"}
        self.awake = set()
        self.calls.append(f"sleep {level}")
        if level == 2:
            for p in self.vlm.model.parameters():
                p.data.zero_()

    def wake_up(self, tags: list[str] | None = None) -> bool:
        self.awake |= set(tags or ("weights", "kv_cache"))
        self.calls.append(f"wake {tags}")
        return len(self.awake) == 2

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        self.calls.append("reset")
        return True

    def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list:
        assert "weights" in self.awake
        self.calls.append(method)
        return [getattr(self, method)(*args, **(kwargs or {}))]

    def reload_weights(self, weights_iterator=None, weights_path: str | None = None):
        "Of a worker."
        read = load_vlm(weights_path, dtype=self.vlm.model.dtype).model
        self.vlm.model.load_state_dict(read.state_dict())

    def speaker(self, request: LoRARequest | None):
        "The model with an adapter: the one that it knows by this number, where it knows one."
        if request is None:
            return self.vlm.model
        if request.load_inplace or request.lora_int_id not in self.adapters:
            adapted = PeftModel.from_pretrained(copy.deepcopy(self.vlm.model), request.lora_path)
            assert adapted.peft_config["default"].r <= self.rank
            self.adapters = {request.lora_int_id: adapted.eval()}  # max_loras=1
        return self.adapters[request.lora_int_id]

    def generate(
        self,
        prompts,
        sampling_params=None,
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
        priority=None,
        tokenization_kwargs=None,
        mm_processor_kwargs=None,
    ) -> list[RequestOutput]:
        assert self.awake == {"weights", "kv_cache"}, "memory that sleeps"
        self.calls.append("generate")
        model = self.speaker(lora_request)
        return [self.answer(model, *pair) for pair in zip(prompts, sampling_params, strict=True)]

    @torch.no_grad()
    def answer(self, model, prompt: dict, params: SamplingParams) -> RequestOutput:
        tokenizer, pictures = self.vlm.tokenizer, prompt.get("multi_modal_data", {}).get("image")
        text = tokenizer.decode(prompt["prompt_token_ids"])
        images = [pictures] if pictures else None
        inputs = self.vlm.processor(
            text=[text], images=images, return_tensors="pt", add_special_tokens=False
        )
        inputs = {k: x.to(model.dtype) if x.is_floating_point() else x for k, x in inputs.items()}
        start = inputs["input_ids"].shape[1]
        with torch.random.fork_rng():
            torch.manual_seed(params.seed)
            out = model.generate(
                **inputs,
                do_sample=True,
                temperature=params.temperature,
                top_k=params.top_k,
                top_p=params.top_p,
                max_new_tokens=params.max_tokens,
                eos_token_id=params.stop_token_ids,
                pad_token_id=tokenizer.pad_token_id,
                logits_processor=[Biased(params.logit_bias or {}, self.noise)],
                return_dict_in_generate=True,
                output_scores=True,
                output_logits=True,
            )
        said = out.sequences[0, start:].tolist()
        steps = out.scores if self.mode == "processed_logprobs" else out.logits
        found = [float(step[0].log_softmax(-1)[token]) for step, token in zip(steps, said)]
        read = inputs["input_ids"][0].tolist() + [self.vlm.image_token_id] * self.more
        told = [{token: Logprob(value)} for token, value in zip(said, found)]
        return RequestOutput(read, [CompletionOutput(said, told)])


def modules() -> dict[str, ModuleType]:
    "By the names under which they are imported."
    here, names = sys.modules[__name__], ("vllm", "vllm.lora", "vllm.lora.request")
    found = {name: ModuleType(name) for name in names}
    for name, module in found.items():
        module.__spec__ = ModuleSpec(name, None)
    found["vllm"].LLM, found["vllm"].SamplingParams = here.LLM, here.SamplingParams
    found["vllm.lora.request"].LoRARequest = here.LoRARequest
    return found
