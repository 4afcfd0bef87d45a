"""Settings, overrides, configurations and the stages of a run."""

import json
import os
import signal
import time
from dataclasses import asdict, dataclass, field, fields
from types import SimpleNamespace
from typing import get_origin

import pytest
from commands import tree

from vlmrlhf_course.base import files
from vlmrlhf_course.base.config import (
    MIXTURES,
    arms_layer,
    build_config,
    load_layers,
    recorded,
    scales,
)
from vlmrlhf_course.base.folders import lock, unlock
from vlmrlhf_course.base.runs import META, Run, cached_run
from vlmrlhf_course.base.settings import Settings, UserError, load_settings, nearest
from vlmrlhf_course.base.stages import (
    MEANS,
    SOURCES,
    STAGES,
    before,
    config_of,
    kind_of,
    label_of,
    stage_names,
    uses_of,
)
from vlmrlhf_course.pipeline import course_run
from vlmrlhf_course.world.scenes import WorldConfig


@dataclass(frozen=True)
class Inner:
    steps: int = 5
    rate: float = 0.1


@dataclass(frozen=True)
class Outer:
    name: str = "x"
    share: float = 0.5
    many: tuple[float, ...] = (1.0, 2.0)
    kinds: dict[str, float] = field(default_factory=lambda: dict(a=1.0))
    inner: Inner = Inner()


class TestSettings:
    def test_defaults_without_a_file(self, tmp_path):
        assert load_settings(tmp_path) == Settings()

    def test_the_nearest_file_counts(self, tmp_path):
        (tmp_path / "settings.ini").write_text("[course]\nseed = 1\n")
        deep = tmp_path / "a" / "b"
        deep.mkdir(parents=True)
        assert load_settings(deep) == Settings(seed=1)
        (tmp_path / "a" / "settings.ini").write_text("[course]\nseed = 7\nscale = smoke\n")
        assert load_settings(deep) == Settings(seed=7, scale="smoke")

    @pytest.mark.parametrize(
        "text, words",
        [
            ("[course]\nsacle = tiny\n", ["settings.ini", "sacle", "did you mean 'scale'"]),
            ("[course]\nseed = two\n", ["settings.ini", "seed", "whole number", "two"]),
            ("[course\nseed = 2\n", ["settings.ini"]),
        ],
    )
    def test_faults_name_file_key_and_remedy(self, tmp_path, text, words):
        (tmp_path / "settings.ini").write_text(text)
        with pytest.raises(UserError) as e:
            load_settings(tmp_path)
        assert all(w in str(e.value) for w in words) and "\n" not in str(e.value)

    @pytest.mark.parametrize("text", [b"[course]\nruns = 100%\n", b"[course]\nruns = \xff\xfe\n"])
    def test_odd_values(self, tmp_path, text):
        "A per cent sign, or bytes that are no UTF-8: a value or a UserError, never a stack trace."
        (tmp_path / "settings.ini").write_bytes(text)
        try:
            assert load_settings(tmp_path).runs == "100%"
        except UserError:
            pass


class TestLayers:
    def test_scales(self):
        assert {"lesson", "smoke", "tiny"} <= set(scales())

    @pytest.mark.parametrize("scale", scales())
    def test_every_scale_is_valid(self, scale, tmp_path):
        run = Run(tmp_path, scale)
        known = stage_names(run.layers)
        assert {*STAGES} <= {*known} and {*run.layers} <= {*SOURCES, *MEANS, *known}
        for name in known:
            assert isinstance(config_of(run, name), STAGES[kind_of(run.layers, name)].config)

    def test_overrides_beat_the_file(self):
        before = load_layers("smoke")
        after = load_layers("smoke", ["ppo.iterations=9", "new.key.deep=x"])
        assert after.pop("ppo") == before.pop("ppo") | dict(iterations=9)
        assert after.pop("new") == dict(key=dict(deep="x"))
        assert after == before

    def test_own_file(self, tmp_path):
        (tmp_path / "mine.yaml").write_text("ppo: {clip: 0.1}\n")
        layers, arms = load_layers(str(tmp_path / "mine.yaml")), arms_layer()
        assert layers.pop("ppo") == arms.pop("ppo") | dict(clip=0.1)
        assert layers == arms, "every run starts from the arms of the package"

    @pytest.mark.parametrize("bad", ["ppo.clip", "ppo=1", "=1"])
    def test_malformed_override(self, bad):
        with pytest.raises(UserError, match="section.key=value"):
            load_layers("smoke", [bad])

    def test_unknown_scale(self):
        with pytest.raises(UserError, match="did you mean 'smoke'"):
            load_layers("smok")

    @pytest.mark.parametrize("text", ["ppo: {a: [\n", "- a\n- b\n", "ppo: 3\n"])
    def test_broken_file(self, tmp_path, text):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError):
            Run(tmp_path / "out", str(tmp_path / "bad.yaml")).section("ppo", Outer)


class TestTable:
    def test_no_setting_is_hidden(self):
        "What says which stage a section is, is taken out of its settings: no setting is called so."
        for kind, stage in STAGES.items():
            assert not {*META} & {field.name for field in fields(stage.config)}, kind

    def test_the_order_of_stages_is_that_of_the_files(self):
        "Not that in which modules were imported: what a run records must not depend on it."
        arms = arms_layer()
        assert stage_names(arms) == [*arms]
        more = arms | dict(world={}, mine=dict(kind="ppo"))
        assert stage_names(more) == [*arms, "mine"]

    def test_an_arm_inherits_from_its_kind(self, tmp_path):
        (tmp_path / "mine.yaml").write_text("ppo: {clip: 0.1}\nmine: {kind: ppo, beta: 0.5}\n")
        run = Run(tmp_path, str(tmp_path / "mine.yaml"))
        cfg = config_of(run, "mine")
        assert type(cfg) is STAGES["ppo"].config
        assert (cfg.clip, cfg.beta, cfg.reward) == (0.1, 0.5, dict(rm=1.0))
        assert run.used["mine"] == recorded(cfg) | dict(kind="ppo")
        assert label_of(run, "mine") == "mine" and label_of(run, "dpo") == "DPO"
        run.layers["evaluate"] |= dict(arms=["mine"], headline="mine", curve="")
        common = ["sft", "preferences", "reward", "reward_second"]
        assert before(run, "evaluate") == [*common, "mine"]
        assert {"mine", "reward", "sft"} <= uses_of(run, "evaluate").keys()
        assert "ppo" not in uses_of(run, "evaluate")

    MINE = "mine: {kind: ppo, penalty: {ramp: 100}, lora: {r: 2}, reward: {truth: 1}}\n"

    def own(self, tmp_path, text, *overrides):
        "Settings of the arm `mine` on a section `ppo` that says something of everything."
        groups = "penalty: {weight: 2.0, coverage: 1.0}, lora: {alpha: 7}"
        mixtures = "kinds: {brief: 1}, reward: {rm: 1, penalty: 1}"
        base = f"ppo: {{{groups}, {mixtures}}}\n"
        (tmp_path / "mine.yaml").write_text(base + text)
        return config_of(Run(tmp_path, str(tmp_path / "mine.yaml"), list(overrides)), "mine")

    def test_groups_are_merged_key_by_key(self, tmp_path):
        "`penalty: {ramp: 100}` does not take the points away that the kind's section gives."
        cfg = self.own(tmp_path, self.MINE, "mine.penalty.object=-3")
        known = (cfg.penalty.weight, cfg.penalty.coverage, cfg.penalty.ramp, cfg.penalty.object)
        assert known == (2.0, 1.0, 100, -3.0)
        assert (cfg.lora.r, cfg.lora.alpha) == (2, 7)

    def test_mixtures_are_replaced_whole(self, tmp_path):
        "By the arm, by the kind's section, by --set; the last one counts."
        cfg = self.own(tmp_path, self.MINE)
        assert (cfg.reward, cfg.kinds) == (dict(truth=1.0), dict(brief=1.0))
        inherited = self.own(tmp_path, "mine: {kind: ppo}\n")
        assert inherited.reward == dict(rm=1.0, penalty=1.0), "which the kind's section says"
        replaced = self.own(tmp_path, self.MINE, "mine.reward={length: -1}", "ppo.reward={rm: 3}")
        assert replaced.reward == dict(length=-1.0)
        below = self.own(tmp_path, "mine: {kind: ppo}\n", "ppo.reward={truth: 2}")
        assert below.reward == dict(truth=2.0)
        assert config_of(Run(tmp_path, "smoke"), "oracle").reward == dict(rm=1.0, oracle=1.0)

    def test_one_weight_may_be_changed_by_its_path(self, tmp_path):
        assert self.own(tmp_path, self.MINE, "mine.reward.length=-1").reward == dict(
            truth=1.0, length=-1.0
        )
        plain = "mine: {kind: ppo}\n"
        added = dict(rm=1.0, penalty=1.0, truth=1.0)
        assert self.own(tmp_path, plain, "mine.reward.truth=1").reward == added
        assert self.own(tmp_path, plain, "ppo.reward.truth=1").reward == added
        assert self.own(tmp_path, self.MINE, "ppo.reward.rm=9").reward == dict(truth=1.0)
        assert self.own(tmp_path, "mine: {kind: ppo, reward.truth: 1}\n").reward == added
        run = Run(tmp_path, "smoke", ["grpo.reward.truth=1"])
        assert config_of(run, "grpo").reward == dict(rm=1.0, truth=1.0), "added to the default"
        again = Run(tmp_path, layers=json.loads(json.dumps(run.layers)))  # as an arm gets it
        assert config_of(again, "grpo") == config_of(run, "grpo")

    def test_every_mixture_is_known_as_one(self):
        "Whether a setting is a mixture is read off its name, before its dataclass is known."
        for kind, stage in [*STAGES.items(), ("world", SimpleNamespace(config=WorldConfig))]:
            for setting in fields(stage.config):
                mixture = get_origin(setting.type) is dict
                assert mixture == (setting.name in MIXTURES), f"{kind}.{setting.name}"

    def test_a_record_knows_the_kind_of_an_arm(self, tmp_path, monkeypatch):
        "Two algorithms with the same settings: the one's actor is not the other's."
        monkeypatch.setitem(STAGES, "twin", STAGES["rloo"])

        def uses(name, kind):
            return uses_of(Run(tmp_path, layers=dict(same=dict(kind=kind))), name)

        assert uses("same", "rloo")["same"]["kind"] == "rloo"
        assert uses("same", "rloo") != uses("same", "twin")
        assert uses("rloo", "twin") == uses("rloo", "rloo"), (
            "of another arm, which it does not need"
        )
        run = Run(tmp_path, "smoke")
        small = Run(
            tmp_path, "smoke", ["reward_small.kind=reward", "ppo.reward_model=reward_small"]
        )
        assert "kind" not in uses_of(run, "ppo")["ppo"]
        assert uses_of(small, "ppo")["reward_small"]["kind"] == "reward"

    LEASH = ("beta", "kl_emergency", "keep")

    @pytest.mark.parametrize("scale", ["lesson", "smoke", "tiny"])
    def test_the_hacked_arm_has_no_leash_and_is_else_as_another(self, tmp_path, scale):
        "Both learn from the small reward model; what differs in the end, the leash has done."
        run = Run(tmp_path, scale)
        held, free = (asdict(config_of(run, arm)) for arm in ("ppo_small", "hacked"))
        assert {key for key in held if held[key] != free[key]} == {*self.LEASH}
        assert free["beta"] == 0 < held["beta"] and free["kl_emergency"] > 1e6
        assert (free["keep"], held["keep"]) == ("last", "best")
        assert held["reward_model"] == "reward_small"
        assert label_of(run, "ppo_small") != label_of(run, "hacked")

    def test_another_kind_is_not_continued(self, tmp_path, monkeypatch):
        monkeypatch.setitem(STAGES, "twin", STAGES["rloo"])
        folder = tmp_path / "same"
        run, other = (Run(tmp_path, layers=dict(same=dict(kind=kind))) for kind in ("rloo", "twin"))
        assert not run.done("same", uses_of(run, "same"))
        with pytest.raises(UserError, match=f"{folder}: made with other settings .same.kind."):
            other.done("same", uses_of(other, "same"))


class TestConfig:
    def test_values_and_defaults(self):
        cfg = build_config(Outer, dict(share=1, inner=dict(steps=3)), "s")
        assert cfg == Outer(share=1.0, inner=Inner(steps=3))
        assert isinstance(cfg.inner, Inner)
        assert isinstance(cfg.share, float)

    def test_unknown_key_gets_a_suggestion(self):
        with pytest.raises(UserError, match=r"unknown key s\.shaer \(did you mean 'share'\?\)"):
            build_config(Outer, dict(shaer=1), "s")
        with pytest.raises(UserError, match="stesp.*steps"):
            build_config(Outer, dict(inner=dict(stesp=1)), "s")

    @pytest.mark.parametrize(
        "values",
        [
            dict(share="much"),
            dict(inner=dict(steps=2.5)),
            dict(inner=3),
            dict(many="x"),
            dict(kinds=dict(a="b")),
            dict(name=None),
        ],
    )
    def test_wrong_types(self, values):
        with pytest.raises(UserError, match="^s: ") as e:
            build_config(Outer, values, "s")
        assert "\n" not in str(e.value)

    def test_nearest(self):
        assert nearest("clpi", ["clip", "beta"]) == " (did you mean 'clip'?)"
        assert nearest("zzzz", ["clip", "beta"]) == ""

    def test_sections_inherit(self, tmp_path):
        (tmp_path / "f.yaml").write_text("base: {share: 0.1, name: b}\nchild: {name: c}\n")
        run = Run(tmp_path, str(tmp_path / "f.yaml"))
        assert run.section("child", Outer, base="base") == Outer(name="c", share=0.1)
        assert run.section("base", Outer) == Outer(name="b", share=0.1)
        assert run.section("other", Outer) == Outer()
        assert run.used["child"]["name"] == "c"
        assert run.used["child"]["inner"] == dict(steps=5, rate=0.1)


class TestStages:
    def test_done_only_with_the_same_settings(self, tmp_path):
        run = Run(tmp_path, "smoke")
        uses = dict(seed=0, s=dict(a=1, t=(1, 2)))
        assert not run.done("stage", uses)
        run.finish("stage", uses, note=3)
        assert run.done("stage", uses) and run.info("stage")["note"] == 3
        # the order of keys, and tuple or list, do not matter
        assert run.done("stage", dict(s=dict(t=[1, 2], a=1), seed=0))
        with pytest.raises(UserError, match=r"stage: made with other settings \(s\.a\)"):
            run.done("stage", dict(seed=0, s=dict(a=2, t=(1, 2))))
        with pytest.raises(UserError, match="seed"):
            run.done("stage", dict(seed=1, s=dict(a=1, t=(1, 2))))
        with pytest.raises(UserError):
            run.done("stage", dict(seed=0))
        assert not run.done("another", uses)

    def test_a_stage_in_progress_remembers_its_settings(self, tmp_path):
        run = Run(tmp_path, "smoke")
        assert not run.done("stage", dict(seed=0, s=dict(a=1)))
        with pytest.raises(UserError, match=r"other settings \(s\.a\)"):
            Run(tmp_path, "smoke").done("stage", dict(seed=0, s=dict(a=2)))
        with pytest.raises(UserError, match=r"other settings \(s\.b\)"):
            Run(tmp_path, "smoke").done("stage", dict(seed=0, s=dict(a=1, b=3)))
        assert not run.done("stage", dict(seed=0, s=dict(a=1)))
        assert not (tmp_path / "stage" / "done.json").exists()

    def test_finish_sweeps_what_is_its_own(self, tmp_path):
        "Its checkpoints, and what a crash left half-written; not what only has such a name."
        run, uses, stage = Run(tmp_path, "smoke"), dict(seed=0), tmp_path / "stage"
        run.done("stage", uses)
        for folder in ("checkpoints/step-1", "fit-a/checkpoints/step-7"):
            (stage / folder).mkdir(parents=True)
            (stage / folder / "model.bin").write_text("x")
            files.seal(stage / folder)
        for folder in (".part-language-abc", "fit-a/checkpoints/.part-step-8-abc"):
            (stage / folder).mkdir()
            (stage / folder / files.MARK).touch()
        foreign = [
            "checkpoints/step-2/model.bin",
            "fit-a/checkpoints/step-7/notes.txt",
            "fit-b/checkpoints/.part-2/x",
            ".metrics.jsonl.4711",
            "result.json",
            ".mine",
        ]
        for name in foreign:
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            (stage / name).write_text("x")
        run.finish("stage", uses)
        assert sorted(tree(stage)) == sorted(["done.json", *foreign])

    def test_two_processes_take_turns(self, tmp_path, capfd):
        "The second one waits for the first, says so, and finds its work done."
        uses, (read, write) = dict(seed=0), os.pipe()
        run = Run(tmp_path, "smoke")
        assert not run.done("stage", uses)
        child = os.fork()
        if not child:
            try:
                unlock()  # a process that has just started holds nothing
                answer = Run(tmp_path, "smoke").done("stage", uses)
                os.write(write, b"found" if answer else b"makes it again")
            finally:
                os._exit(0)
        said = ""
        while "waiting for it" not in said:
            time.sleep(0.01)
            said = capfd.readouterr().err
        assert f"{tmp_path / 'stage'}: another process is at work there" in said
        run.finish("stage", uses)
        os.waitpid(child, 0)
        assert os.read(read, 100) == b"found"

    def test_a_lock_goes_with_its_process(self, tmp_path):
        child = os.fork()
        if not child:
            lock(tmp_path / "stage")
            (tmp_path / "locked").touch()
            time.sleep(100)
        while not (tmp_path / "locked").exists():
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        lock(tmp_path / "stage")
        unlock()

    def test_course_run_has_a_folder_for_each_configuration(self, tmp_path, monkeypatch):
        monkeypatch.setenv("VLMRLHF_CACHE", str(tmp_path / "cache"))
        runs = [
            course_run("smoke"),
            course_run("smoke", seed=1),
            course_run("smoke", overrides=["ppo.clip=0.1"]),
            course_run("lesson"),
        ]
        assert len({r.folder for r in runs}) == 4
        assert all(r.folder.parent == tmp_path / "cache" for r in runs)
        assert course_run("smoke").folder == runs[0].folder


def test_other_defaults_of_the_stages_are_another_folder(tmp_path, monkeypatch):
    "Else the chapters' cached run would be refused after every change of a default."
    monkeypatch.setenv("VLMRLHF_CACHE", str(tmp_path))
    some = [None, dict(ppo=dict(clip=0.2)), dict(ppo=dict(clip=0.3))]
    assert len({cached_run("smoke", defaults).folder for defaults in some}) == 3
    assert cached_run("smoke", some[1]).folder == cached_run("smoke", dict(some[1])).folder
