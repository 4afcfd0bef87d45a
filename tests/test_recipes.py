"""Full-scale recipes: do they say what the source's table says, is every key of them one that the
library reads, and does a tiny model go through each route?"""

import json
import os
import shlex
import subprocess
from importlib.resources import files

import pytest
from conftest import REPO
from own_data import checkpoint, lines, squares

from vlmrlhf_course.base.config import recipes
from vlmrlhf_course.base.sharding import LaunchConfig
from vlmrlhf_course.base.stages import config_of
from vlmrlhf_course.cli import build_parser, layers_of, main
from vlmrlhf_course.pipeline import own_run

MODELS = {  # recipe → type of model, column of the source's table
    "llava-1.5-7b": ("llava", "7B"),
    "llava-1.5-13b": ("llava", "13B"),
    "llava-next-34b": ("llava_next", "34B"),
    "qwen2.5-vl-7b": ("qwen2_5_vl", "7B"),
    "qwen2.5-vl-32b": ("qwen2_5_vl", "34B"),
    "qwen3-vl-8b": ("qwen3_vl", "7B"),
}
ROUTES = ("full", "language", "lora")
EACH = [(model, route) for model in MODELS for route in ROUTES]
P14 = {  # hyper-parameters by size; `per_gpu`: answers of a step on each of 8 GPUs
    "actor_lr": {"7B": 5e-7, "13B": 1e-6, "34B": 2e-6},
    "critic_lr": {"7B": 1e-6, "13B": 2e-6, "34B": 5e-6},
    "per_gpu": {"7B": 32, "13B": 64, "34B": 128},
    "epochs": {"7B": 4, "13B": 4, "34B": 2},
    "clip": {"7B": 0.2, "13B": 0.2, "34B": 0.1},
    "lam": {"7B": 0.95, "13B": 0.95, "34B": 0.97},
    "gamma": {"7B": 0.99, "13B": 0.99, "34B": 0.995},
    "kl_target": {"7B": 6, "13B": 6, "34B": 3},
    "beta": {"7B": 0.1, "13B": 0.2, "34B": 0.5},
}
RATES = ("actor_lr", "critic_lr")
STARTS = {  # (column, route) → DeepSpeed's stage, and is the optimiser in the host's memory?
    ("7B", "full"): (2, True),
    ("13B", "full"): (2, True),
    ("34B", "full"): (2, True),
    ("7B", "lora"): (2, False),
    ("13B", "lora"): (2, False),
    ("34B", "lora"): (3, False),
}
FEW = """
reward: {epochs: 1, fit: {batch: 8, micro_batch: 8}}
ppo: {iterations: 2, answers: 8, minibatch: 8, micro_batch: 8, max_new_tokens: 8, eval_every: 1}
"""


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    "A folder with a tiny checkpoint of each type, and pairs about squares."
    folder = tmp_path_factory.mktemp("desk")
    for kind in {kind for kind, _ in MODELS.values()}:
        checkpoint(kind, folder / kind)
    lines(squares(30, folder / "pictures"), folder / "pairs.jsonl")
    (folder / "few.yaml").write_text(FEW)
    return folder


def own(desk, kind, out, *recipe):
    "A run of a tiny model in the place of a recipe's."
    return own_run(desk / out, desk / kind, desk / "pairs.jsonl", list(recipe))


def test_the_package_has_these_recipes():
    assert sorted(recipes()) == sorted([*MODELS, *ROUTES])


@pytest.mark.parametrize("model, route", EACH)
def test_every_recipe_says_what_the_table_says(desk, model, route):
    "Every section is read by its stage's own code; the numbers are the source's."
    kind, size = MODELS[model]
    run = own(desk, kind, "never", model, route)  # which checks all sections
    ppo = config_of(run, "ppo")
    said = {name: getattr(ppo, name) for name in P14 if name != "per_gpu"}
    launch = LaunchConfig(**run.layers["launch"])
    said["per_gpu"] = ppo.minibatch // (launch.gpus * launch.nodes)
    assert (launch.gpus, launch.nodes, launch.gpu_memory) == (8, 1, 80)
    asked = {name: row[size] for name, row in P14.items()}
    if route == "lora":  # rates of adapters are others: the recipe says why
        asked |= dict(actor_lr=3e-5, critic_lr=6e-5)
    assert said == asked
    assert 2 <= ppo.critic_lr / ppo.actor_lr <= 5
    assert (ppo.schedule, ppo.warmup, ppo.grad_clip) == ("cosine", 0.1, 1.0)
    at = (size, "full" if route == "language" else route)
    assert (launch.zero, launch.offload) == STARTS[at]


@pytest.mark.parametrize("model, route", EACH)
def test_routes_are_configuration(desk, model, route):
    "Whole copies or adapters, in every stage; the tower learns on one route."
    run = own(desk, MODELS[model][0], "never", model, route)
    stages = {
        name: config_of(run, name) for name in ("sft", "reward", "ppo", "grpo", "rloo", "dpo")
    }
    assert {cfg.lora.r for cfg in stages.values()} == {64 if route == "lora" else 0}
    assert {cfg.lora.alpha for cfg in stages.values()} == {16 if route == "lora" else 32}
    assert stages["ppo"].critic == "adapter"
    assert (stages["sft"].tower_lr > 0) == (route == "full")
    for name in ("grpo", "rloo"):
        same = ("actor_lr", "answers", "minibatch", "epochs", "clip", "beta", "kl_target")
        assert all(getattr(stages[name], key) == getattr(stages["ppo"], key) for key in same)
    batch = 32 if MODELS[model][1] == "7B" else 8  # at 32 keys and values would not fit
    assert run.source.limits.gradient_checkpointing and run.source.limits.batch == batch
    assert config_of(run, "evaluate").arms == ("ppo",), "the scale `own` is below"


@pytest.mark.parametrize("route, kind", [*zip(ROUTES, ("llava", "qwen2_5_vl", "llava_next"))])
def test_a_tiny_model_goes_a_route(desk, route, kind):
    "The very command of the recipe: a reward model, then PPO, in bfloat16 as it says."
    words = ["--config", "llava-1.5-7b", route, desk / "few.yaml", "--out", desk / f"went-{route}"]
    words += ["--model", desk / kind, "--data", desk / "pairs.jsonl"]
    assert main(list(map(str, ["ppo", *words]))) == 0
    record = json.loads((desk / f"went-{route}" / "ppo" / "done.json").read_text())
    assert record["uses"]["ppo"]["gamma"] == 0.99 and record["uses"]["model"]["dtype"] == "bfloat16"
    assert not {"launch", "rollout"} & record["uses"].keys(), "how, and not what, is computed"
    assert (record["uses"]["ppo"]["lora"]["r"] == 0) == (route != "lora")


# --- how the command takes them -------------------------------------------------------------------


def layers(*words):
    return layers_of(build_parser().parse_args(list(map(str, words))))


def test_each_recipe_stands_above_those_before_it(tmp_path):
    (tmp_path / "mine.yaml").write_text("ppo: {beta: 0.3}\nlaunch: {gpus: 4}\n")
    one_by_one = layers(
        "ppo", "--config", "qwen3-vl-8b", "--config", "lora", "--config", "mine.yaml"
    )
    together = layers("ppo", "--config", "qwen3-vl-8b", "lora", "mine.yaml")
    assert one_by_one == together
    assert (together["ppo"]["beta"], together["ppo"]["actor_lr"]) == (0.3, 3e-5)
    assert together["launch"] == dict(gpus=4, nodes=1, zero=2, offload=False, gpu_memory=80)
    turned = layers("ppo", "--config", "lora", "qwen3-vl-8b")
    assert turned["ppo"]["actor_lr"] == 5e-7, "the model's, which now stands above"
    above = layers("ppo", "--config", "lora", "--set", "ppo.actor_lr=1e-3", "--model", "x")
    assert above["ppo"]["actor_lr"] == 1e-3 and above["model"]["path"] == "x"


def test_data_reads_the_recipe_of_a_run(desk, capsys):
    given = ["--config", "llava-1.5-7b", "--config", str(desk / "few.yaml")]
    assert main(["data", *given, "check", str(desk / "pairs.jsonl")]) == 0


@pytest.mark.parametrize(
    "name, near", [("lorra", True), ("llava-1.5-8b", True), ("elsewhere/mine.yaml", False)]
)
def test_a_recipe_that_is_none(name, near, capsys):
    assert main(["ppo", "--config", name]) == 2
    line = capsys.readouterr().err
    assert "--config" in line and name in line and "qwen3-vl-8b" in line
    assert ("did you mean" in line) == near


def test_a_recipe_with_a_model_stands_on_the_scale_of_own_models(desk, monkeypatch, capsys):
    "Without `--model`, too: the drawn world's sizes and arms are not those of 7 B weights."
    (desk / "model.yaml").write_text(f"model: {{path: {desk / 'llava'}}}\n")
    words = ["--config", "llava-1.5-7b", "lora", desk / "model.yaml", desk / "few.yaml"]
    words += ["--data", desk / "pairs.jsonl", "--out", desk / "by-recipe"]
    assert main(list(map(str, ["reward", *words]))) == 0
    assert "arms:\n  - ppo\n" in (desk / "by-recipe" / "config.yaml").read_text()
    assert main(list(map(str, ["reward", "--scale", "smoke", *words]))) == 2, (
        "said aloud, it counts"
    )


# --- DeepSpeed's own files ------------------------------------------------------------------------

FILES = sorted(f"zero{stage}{way}" for stage in (1, 2, 3) for way in ("", "-offload"))


def deepspeed_file(name):
    return files("vlmrlhf_course") / "recipes" / "deepspeed" / f"{name}.json"


@pytest.fixture(scope="module")
def read():
    "A file as DeepSpeed's own class reads it."
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    config = pytest.importorskip("deepspeed.runtime.config", reason="DeepSpeed is not installed")
    return lambda name: config.DeepSpeedConfig(str(deepspeed_file(name)))


def test_there_is_a_file_for_each_stage_with_and_without_offload():
    assert sorted(p.stem for p in deepspeed_file("zero1").parent.glob("*.json")) == FILES


@pytest.mark.parametrize("name", FILES)
def test_deepspeed_reads_what_a_file_says(read, name):
    cfg, zero = read(name), read(name).zero_config
    assert cfg.zero_optimization_stage == int(name[4])
    assert (zero.offload_optimizer is not None) == ("offload" in name)
    assert zero.offload_param is None
    assert cfg.gradient_clipping == 0.0, "ours clips each group by itself"
    assert (cfg.train_micro_batch_size_per_gpu, cfg.gradient_accumulation_steps) == (1, 1)
    assert cfg.bfloat16_config.enabled == (name[4] == "3"), "what learns is float32"
    assert not cfg.float16_config.enabled
    assert cfg.zero_allow_untested_optimizer and not cfg.zero_force_ds_cpu_optimizer


@pytest.mark.parametrize("name", FILES)
def test_no_key_of_a_file_is_passed_over(read, name):
    "DeepSpeed refuses unknown keys of ZeRO's section, and passes over those beside it."
    from deepspeed.runtime import constants, precision_config
    from deepspeed.runtime.zero import config as zero_config

    known = set()
    for module in (constants, precision_config, zero_config):
        known |= {value for value in vars(module).values() if isinstance(value, str)}
    said = json.loads(deepspeed_file(name).read_text())
    assert said.keys() <= known
    more = {key for key in said["zero_optimization"] if key.startswith("stage3_")}
    assert bool(more) == (said["zero_optimization"]["stage"] == 3)
    assert ("stage3_param_persistence_threshold" in more) == bool(more)


def test_the_table_of_reasons_names_every_key():
    text = (deepspeed_file("zero1").parent / "README.md").read_text("utf-8")
    said = json.loads(deepspeed_file("zero3-offload").read_text())
    of_stage_3 = {key for key in said["zero_optimization"] if key.startswith("stage3_")}
    top = {key if key != "bf16" else "bf16.enabled" for key in said if key != "zero_optimization"}
    assert not {key for key in {*top, *of_stage_3} if f"`{key}`" not in text}


# --- README ---------------------------------------------------------------------------------------


def commands_of_readme():
    "The commands of the section on many GPUs, word by word."
    section = (REPO / "README.md").read_text("utf-8").split("## On many GPUs\n")[1]
    block = section.split("```sh\n")[1].split("```")[0]
    return [shlex.split(line, comments=True) for line in block.splitlines()]


def shown(words, folder):
    "What a launcher of ours would start, by its own `--dry-run`: the words of `vlmrlhf`."
    if words[0] == "sbatch":
        words = words[3:]
    name, *rest = words
    at = 1 if name.endswith("hostfile.sh") else 0
    command = ["bash", str(REPO / name), *rest[:at], "--dry-run", *rest[at:]]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    line = shlex.split(done.stdout.splitlines()[0])
    line = shlex.split(line[-1]) if line[0] == "ssh" else line
    return line[line.index("--no-python") + 2 :]


@pytest.mark.parametrize("words", commands_of_readme(), ids=lambda words: " ".join(words[:3]))
def test_commands_of_the_section_on_many_gpus(desk, words):
    "Each is understood, to the last word; the recipes run above, and doctor in test_doctor.py."
    (desk / "hostfile").write_text("one slots=8\ntwo slots=8\n")
    words = words[1:] if words[0] == "vlmrlhf" else shown(words, desk)
    known = "--dry-run" in build_parser()._subparsers._group_actions[0].choices["ppo"].format_help()
    words = [word for word in words if known or word != "--dry-run"]
    args = build_parser().parse_args(words)
    if args.verb == "doctor":
        assert args.out == "runs/mine"
        return
    said = layers_of(args)
    model, route = args.config
    assert model in MODELS and route in ROUTES and args.out.startswith("runs/")
    assert said["data"]["train"] == "pairs.jsonl"
