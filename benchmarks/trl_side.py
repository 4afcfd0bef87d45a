"""TRL's side of `trl_peer.py`: its trainers, with settings under which they only train.

TRL and what imports it are imported where they are used: without TRL this module can be read."""

LENGTHS = []  # of TRL's answers, in tokens


def settings(folder, **more) -> dict:
    "Settings of a TRL trainer that only trains: nothing saved, logged or checkpointed."
    return dict(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        learning_rate=1e-9,
        max_grad_norm=1.0,
        seed=0,
        optim="adamw_torch_fused",
        **more,
    )


def adapter():
    "The adapter that the library trains: rank 16 on every linear layer of the language model."
    from peft import LoraConfig

    return LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.0,
        target_modules=r".*language_model.*(q|k|v|o|gate|up|down)_proj",
    )


def chat(prompt):
    "A prompt as TRL wants it."
    return [{"role": "user", "content": prompt.text}]


def picture(prompt):
    from vlmrlhf_course.data.prompts import open_image

    return open_image(prompt.image)


def preference_rows(pairs):
    "Pairs as TRL wants them."
    from vlmrlhf_course.data.prompts import open_image

    return [
        dict(
            prompt=[{"role": "user", "content": pair["prompt"]}],
            chosen=[{"role": "assistant", "content": pair["chosen"]}],
            rejected=[{"role": "assistant", "content": pair["rejected"]}],
            images=[open_image(pair["image"])],
        )
        for pair in pairs
    ]


def few_repeats(completions, **kwargs) -> list[float]:
    "A reward that costs nothing: the share of different words."
    words = [c[0]["content"].split() for c in completions]
    LENGTHS.extend(len(ids) for ids in kwargs["completion_ids"])
    return [len(set(w)) / max(1, len(w)) for w in words]


def dpo_trainer(folder, model, processor, pairs, size: int, steps: int, lora: bool):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(
        **settings(folder),
        max_length=None,
        beta=0.3,
        per_device_train_batch_size=size,
        max_steps=steps,
    )
    return DPOTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(preference_rows(pairs)),
        processing_class=processor,
        peft_config=adapter() if lora else None,
    )


def online_trainer(
    kind: str, folder, model, processor, prompts, cfg, steps: int, lora: bool, fixed: bool
):
    """GRPO or RLOO with KL, the library's temperature, epochs and minibatches; `fixed`: every
    answer has the largest length."""
    import trl
    from datasets import Dataset

    rows = [dict(prompt=chat(p), images=[picture(p)]) for p in prompts]
    args = dict(
        settings(folder),
        per_device_train_batch_size=cfg.minibatch,
        steps_per_generation=cfg.answers // cfg.minibatch,
        num_iterations=cfg.epochs,
        num_generations=cfg.answers_per_prompt,
        max_completion_length=cfg.max_new_tokens,
        generation_kwargs=dict(min_new_tokens=cfg.max_new_tokens if fixed else 1),
        temperature=cfg.temperature,
        beta=0.05,
        shuffle_dataset=False,
        max_steps=steps,
    )
    if kind == "GRPO":
        config, trainer = trl.GRPOConfig, trl.GRPOTrainer
    else:
        config, trainer = trl.RLOOConfig, trl.RLOOTrainer
    return trainer(
        model=model,
        args=config(**args),
        reward_funcs=few_repeats,
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        peft_config=adapter() if lora else None,
    )


def in_turn(trainer, steps_a_round: int, ours) -> list[tuple[float, float]]:
    """Train with TRL; after each round of its steps do a round of ours. Seconds of both, round by
    round: loading data counts on both sides."""
    from transformers import TrainerCallback

    from benchmarks.common import Clock

    clock, rounds = Clock(), []

    class Turn(TrainerCallback):
        mark = None

        def on_train_begin(self, *args, **kwargs):
            self.mark = clock.now()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % steps_a_round:
                return
            theirs = clock.now() - self.mark
            start = clock.now()
            ours(len(rounds))
            rounds.append((theirs, clock.now() - start))
            self.mark = clock.now()

    trainer.add_callback(Turn())
    trainer.train()
    return rounds


def their_model(folder):
    "The LLaVA in `folder`, its tower frozen as ours is."
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="sdpa")
    model.model.vision_tower.requires_grad_(False)
    return model
