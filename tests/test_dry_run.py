"A dry run says what would be done, and touches nothing; a recipe may say how it is started."

import json

import pytest
import yaml
from small_models import SMALL

from vlmrlhf_course.base.config import load_layers
from vlmrlhf_course.base.runs import Run
from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.base.sharding import LaunchConfig
from vlmrlhf_course.base.stages import launch_config
from vlmrlhf_course.cli import main
from vlmrlhf_course.scale.dry_run import plan_of, unread_source
from vlmrlhf_course.scale.launching import Rates, comments_of, launch_line
from vlmrlhf_course.world.llava import build_model

OWN = ["--data", "pairs.jsonl", "--out", "runs/new"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(**sections) -> str:
    with open("recipe.yaml", "w", encoding="utf-8") as file:
        yaml.safe_dump(sections, file)
    return "recipe.yaml"


def run_of(**given) -> Run:
    given = dict(model=dict(path="7b"), data=dict(train="pairs.jsonl")) | given
    run = Run("nowhere", layers=load_layers("own", (), None, given))
    run.source = unread_source(run)
    return run


# --- the section `launch` -------------------------------------------------------------------------


def test_a_run_takes_the_section_and_records_nothing_of_it():
    "The same recipe on a laptop: nothing of how a cluster is started is on record."
    words = ["detector", "--scale", "smoke", "--out", "made", "--config"]
    assert main([*words, recipe(launch=dict(gpus=8, zero=3))]) == 0
    for name in ("config.yaml", "detector/done.json"):
        with open(f"made/{name}", encoding="utf-8") as file:
            assert "launch" not in yaml.safe_load(file) and "gpus" not in str(file)
    assert main([*words, recipe(launch=dict(gpus=16, nodes=2))]) == 0  # not another run
    record = json.loads(open("made/detector/done.json", encoding="utf-8").read())
    assert "launch" not in record["uses"]


@pytest.mark.parametrize(
    "section, fault",
    [
        (dict(gpu=8), "unknown key launch.gpu"),
        (dict(zero=4), "launch: zero=4"),
        (dict(offload=True), "needs DeepSpeed"),
        (dict(kind="ppo"), "launch.kind"),
    ],
)
def test_a_mistake_in_it_is_a_line(section, fault, capsys):
    words = ["ppo", "--scale", "smoke", "--config", recipe(launch=section)]
    assert main([*words, "--out", "made"]) == 2
    assert fault in capsys.readouterr().err


def test_the_line_that_starts_a_run():
    words = ["ppo", "--config", "a b.yaml"]
    assert launch_line(LaunchConfig(), words) == "vlmrlhf ppo --config 'a b.yaml'"
    copies = launch_line(LaunchConfig(8), words)
    assert copies.startswith("torchrun --standalone --nproc_per_node 8 -m vlmrlhf_course.cli ppo")
    several = launch_line(LaunchConfig(8, 2), words)
    assert "--nnodes 2 --node_rank $NODE_RANK --master_addr $MASTER_ADDR" in several
    assert "--nproc_per_node 8 " in several
    for zero in (1, 2, 3):  # what is shared out is said by the section, not by the launcher
        assert launch_line(LaunchConfig(8, 2, zero), words) == several


def test_help_says_what_the_dataclass_says():
    assert comments_of(LaunchConfig)["gpus"] == "in each node"
    assert comments_of(Rates)["mfu"].startswith("of an update")


# --- dry runs -------------------------------------------------------------------------------------


def test_a_stage_is_planned_and_nothing_is_touched(folder, capsys):
    given = recipe(launch=dict(gpus=8, zero=2))
    words = ["ppo", "--model", "7b", *OWN, "--config", given, "--dry-run"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "KV cache" in said and "runs/new/reward: would be made" in said
    line = "torchrun --standalone --nproc_per_node 8 -m vlmrlhf_course.cli ppo"
    assert line in said and "--dry-run" not in said.split("command")[1]
    assert [p.name for p in folder.iterdir()] == ["recipe.yaml"]


def test_what_cannot_fit_is_refused_with_what_would_help(folder, capsys):
    words = ["ppo", "--model", "13b", *OWN, "--set", "ppo.lora.r=0", "launch.gpus=8", "--dry-run"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "ppo does not fit" in said and "--route lora" in said and "--zero 3 or" not in said
    assert not list(folder.iterdir())


def test_a_checkpoint_in_a_folder_is_planned_from_its_configuration(folder, capsys):
    build_model(SMALL).config.save_pretrained("small")
    assert main(["reward", "--model", "small", *OWN, "--dry-run"]) == 0
    assert "runs/new/reward: would be made" in capsys.readouterr().out
    assert [p.name for p in folder.iterdir()] == ["small"]


def test_an_unknown_model_is_not_planned_and_that_is_said(capsys):
    assert main(["dpo", "--model", "somebody/model", *OWN, "--dry-run"]) == 0
    assert "not planned" in capsys.readouterr().out


def test_the_drawn_world_fits_anywhere(folder, capsys):
    assert main(["run", "--scale", "smoke", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "ppo_rm: would be made" in said and "vlmrlhf run --scale smoke" in said
    assert not list(folder.iterdir())


def test_what_is_there_stays(capsys):
    words = ["detector", "--scale", "smoke", "--out", "made"]
    assert main(words) == 0
    capsys.readouterr()
    assert main([*words, "--dry-run"]) == 0
    assert "made/detector: is there, and stays" in capsys.readouterr().out


def test_a_mistake_is_found_without_a_gpu():
    assert main(["ppo", "--model", "7b", *OWN, "--set", "ppo.epoch=2", "--dry-run"]) == 2
    assert main(["ppo", "--model", "7b", *OWN, "--arm", "nobody", "--dry-run"]) == 2


# --- from sections to plans -----------------------------------------------------------------------


def test_a_plan_says_what_the_sections_say():
    launch = dict(gpus=4, nodes=2, zero=3, offload=True, gpu_memory=40.0)
    ppo = dict(answers=256, minibatch=64, micro_batch=2, critic="adapter", max_new_tokens=99)
    run = run_of(launch=launch, ppo=ppo | dict(lora=dict(r=8)), reward=dict(lora=dict(r=32)))
    cfg = plan_of(run, "ppo")
    assert launch_config(run) == LaunchConfig(**launch)
    assert (cfg.gpus, cfg.nodes, cfg.zero, cfg.offload, cfg.gpu_memory) == (4, 2, 3, True, 40.0)
    assert (cfg.answers, cfg.micro_batch, cfg.critic, cfg.answer) == (256, 2, "adapter", 99)
    assert (cfg.r, cfg.reward_r, cfg.route) == (8, 32, "lora")
    assert (cfg.accumulation, cfg.rollout, cfg.checkpointing) == (4, 32, True)
    assert plan_of(run_of(ppo=dict(lora=dict(r=0))), "ppo").route == "language"


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo", "grpo", "rloo"])
def test_every_stage_that_trains_has_a_plan(kind):
    cfg = plan_of(run_of(), kind)
    assert cfg.stage == kind and cfg.micro_batch >= 1 and cfg.dtype == "bfloat16"


def test_a_dtype_that_is_said_counts():
    assert plan_of(run_of(model=dict(path="7b", dtype="float32")), "ppo").dtype == "float32"


def test_a_source_is_named_and_not_opened():
    source = run_of().source
    assert source.data.train == "pairs.jsonl" and "found" not in vars(source)
    assert unread_source(Run("nowhere", "smoke")) is None
    run = Run("nowhere", layers=load_layers("own", (), None, dict(model=dict(dtype="float8"))))
    with pytest.raises(UserError, match="model: dtype"):
        unread_source(run)


# --- the verb -------------------------------------------------------------------------------------


def test_plan_prints_and_its_status_says_whether_it_fits(folder, capsys):
    assert main(["plan", "--model", "7b", "--zero", "3", "--gpus", "8", "--plot", "p.png"]) == 0
    said = capsys.readouterr().out
    assert "fits: up to" in said and "an iteration:" in said and "$" in said
    assert (folder / "p.png").stat().st_size > 10_000
    assert main(["plan", "--model", "7b", "--gpu-memory", "10"]) == 1
    said = capsys.readouterr().out
    assert "does not fit" in said and "an iteration" not in said


def test_plan_shows_claims_beside_figures(capsys):
    assert main(["plan", "--model", "7b", "--claims", "--no-checkpointing", "--mfu", "0.5"]) in (
        0,
        1,
    )
    said = capsys.readouterr().out
    assert "said" in said and "counted" in said and "vision encoder" in said


@pytest.mark.parametrize(
    "words, fault",
    [
        (["--model", "35b"], "did you mean"),
        (["--zero", "4"], "zero=4"),
        (["--route", "lorra"], "did you mean 'lora'"),
        (["--mfu", "2"], "mfu=2"),
        (["--gpus", "many"], "invalid int"),
    ],
)
def test_plan_refuses_in_a_line(words, fault, capsys):
    assert main(["plan", *words]) == 2
    assert fault in capsys.readouterr().err


@pytest.mark.parametrize("zero, refused", [(2, False), (3, True)])
def test_full_copies_are_refused_before_anything_is_read(capsys, zero, refused):
    "SFT learns whole at any stage; it is shared out as in stage 2."
    layers = recipe(launch=dict(gpus=8, zero=zero), reward=dict(lora=dict(r=0)))
    words = ["reward", "--model", "7b", *OWN, "--config", layers, "--dry-run"]
    main(words)
    said = capsys.readouterr().err
    assert ("launch.zero=3, reward.lora.r=0" in said) == refused
    layers = recipe(launch=dict(gpus=8, zero=zero), sft=dict(lora=dict(r=0)))
    assert main(["sft", "--model", "7b", *OWN, "--config", layers, "--dry-run"]) in (0, 2)
    assert "launch.zero=3" not in capsys.readouterr().err
