"Settings, overrides, stages, records, metrics and checkpoints."
import json
import os
import resource
import shutil
import signal
import time
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

import vlmrlhf_course.base.runs as runs_module
from vlmrlhf_course.base import files
from vlmrlhf_course.base.runs import (Checkpoints, MetricLog, Run, Settings, StepGuard, UserError, build_config, course_run, load_layers,
                                 load_settings, make_accelerator, nearest, read_jsonl, scales, write_jsonl, write_text)
from vlmrlhf_course.train.sft import FitConfig, fit


@dataclass(frozen=True)
class Inner:
    steps: int = 5
    rate: float = .1


@dataclass(frozen=True)
class Outer:
    name: str = "x"
    share: float = .5
    many: tuple[float, ...] = (1., 2.)
    kinds: dict[str, float] = field(default_factory=lambda: dict(a=1.))
    inner: Inner = Inner()


class TestSettings:
    def test_defaults_without_a_file(self, tmp_path): assert load_settings(tmp_path) == Settings()

    def test_the_nearest_file_counts(self, tmp_path):
        (tmp_path / "settings.ini").write_text("[course]\nseed = 1\n")
        deep = tmp_path / "a" / "b"
        deep.mkdir(parents=True)
        assert load_settings(deep) == Settings(seed=1)
        (tmp_path / "a" / "settings.ini").write_text("[course]\nseed = 7\nscale = smoke\n")
        assert load_settings(deep) == Settings(seed=7, scale="smoke")

    @pytest.mark.parametrize("text, words", [
        ("[course]\nsacle = tiny\n", ["settings.ini", "sacle", "did you mean 'scale'"]),
        ("[course]\nseed = two\n", ["settings.ini", "seed", "whole number", "two"]),
        ("[course\nseed = 2\n", ["settings.ini"])])
    def test_faults_name_file_key_and_remedy(self, tmp_path, text, words):
        (tmp_path / "settings.ini").write_text(text)
        with pytest.raises(UserError) as e: load_settings(tmp_path)
        assert all(w in str(e.value) for w in words) and "\n" not in str(e.value)

    @pytest.mark.parametrize("text", [b"[course]\nruns = 100%\n", b"[course]\nruns = \xff\xfe\n"])
    def test_odd_values(self, tmp_path, text):
        "A per cent sign, or bytes that are no UTF-8: a value or a UserError, never a stack trace."
        (tmp_path / "settings.ini").write_bytes(text)
        try: assert load_settings(tmp_path).runs == "100%"
        except UserError: pass


class TestLayers:
    def test_scales(self): assert {"lesson", "smoke", "tiny"} <= set(scales())

    @pytest.mark.parametrize("scale", scales())
    def test_every_scale_is_valid(self, scale, tmp_path):
        from vlmrlhf_course.cli import sections
        run = Run(tmp_path, scale)
        assert set(run.layers) <= set(sections())
        for name, (cls, base) in sections().items(): assert isinstance(run.section(name, cls, base), cls)

    def test_overrides_beat_the_file(self):
        before, after = load_layers("smoke"), load_layers("smoke", ["ppo.iterations=9", "new.key.deep=x"])
        assert after["ppo"] == {**before["ppo"], "iterations": 9} and after["new"] == {"key": {"deep": "x"}}
        assert {k: v for k, v in after.items() if k not in ("ppo", "new")} == {k: v for k, v in before.items() if k != "ppo"}

    def test_own_file(self, tmp_path):
        (tmp_path / "mine.yaml").write_text("ppo: {clip: 0.1}\n")
        assert load_layers(str(tmp_path / "mine.yaml")) == {"ppo": {"clip": .1}}

    @pytest.mark.parametrize("bad", ["ppo.clip", "ppo=1", "=1"])
    def test_malformed_override(self, bad):
        with pytest.raises(UserError, match="section.key=value"): load_layers("smoke", [bad])

    def test_unknown_scale(self):
        with pytest.raises(UserError, match="did you mean 'smoke'"): load_layers("smok")

    @pytest.mark.parametrize("text", ["ppo: {a: [\n", "- a\n- b\n", "ppo: 3\n"])
    def test_broken_file(self, tmp_path, text):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError): Run(tmp_path / "out", str(tmp_path / "bad.yaml")).section("ppo", Outer)


class TestConfig:
    def test_values_and_defaults(self):
        cfg = build_config(Outer, dict(share=1, inner=dict(steps=3)), "s")
        assert cfg == Outer(share=1., inner=Inner(steps=3)) and isinstance(cfg.inner, Inner) and isinstance(cfg.share, float)

    def test_unknown_key_gets_a_suggestion(self):
        with pytest.raises(UserError, match=r"unknown key s\.shaer \(did you mean 'share'\?\)"): build_config(Outer, dict(shaer=1), "s")
        with pytest.raises(UserError, match="stesp.*steps"): build_config(Outer, dict(inner=dict(stesp=1)), "s")

    @pytest.mark.parametrize("values", [dict(share="much"), dict(inner=dict(steps=2.5)), dict(inner=3), dict(many="x"), dict(kinds=dict(a="b")), dict(name=None)])
    def test_wrong_types(self, values):
        with pytest.raises(UserError, match="^s: ") as e: build_config(Outer, values, "s")
        assert "\n" not in str(e.value)

    def test_nearest(self):
        assert nearest("clpi", ["clip", "beta"]) == " (did you mean 'clip'?)" and nearest("zzzz", ["clip", "beta"]) == ""

    def test_sections_inherit(self, tmp_path):
        (tmp_path / "f.yaml").write_text("base: {share: 0.1, name: b}\nchild: {name: c}\n")
        run = Run(tmp_path, str(tmp_path / "f.yaml"))
        assert run.section("child", Outer, base="base") == Outer(name="c", share=.1)
        assert run.section("base", Outer) == Outer(name="b", share=.1) and run.section("other", Outer) == Outer()
        assert run.used["child"]["name"] == "c" and run.used["child"]["inner"] == dict(steps=5, rate=.1)


class TestStages:
    def test_done_only_with_the_same_settings(self, tmp_path):
        run = Run(tmp_path, "smoke")
        uses = dict(seed=0, s=dict(a=1, t=(1, 2)))
        assert not run.done("stage", uses)
        run.finish("stage", uses, note=3)
        assert run.done("stage", uses) and run.info("stage")["note"] == 3
        assert run.done("stage", dict(s=dict(t=[1, 2], a=1), seed=0)), "order of keys, and tuple or list, do not matter"
        with pytest.raises(UserError, match=r"stage: made with other settings \(s\.a\)"): run.done("stage", dict(seed=0, s=dict(a=2, t=(1, 2))))
        with pytest.raises(UserError, match="seed"): run.done("stage", dict(seed=1, s=dict(a=1, t=(1, 2))))
        with pytest.raises(UserError): run.done("stage", dict(seed=0))
        assert not run.done("another", uses)

    def test_a_stage_in_progress_remembers_its_settings(self, tmp_path):
        run = Run(tmp_path, "smoke")
        assert not run.done("stage", dict(seed=0, s=dict(a=1)))
        with pytest.raises(UserError, match=r"other settings \(s\.a\)"): Run(tmp_path, "smoke").done("stage", dict(seed=0, s=dict(a=2)))
        with pytest.raises(UserError, match=r"other settings \(s\.b\)"): Run(tmp_path, "smoke").done("stage", dict(seed=0, s=dict(a=1, b=3)))
        assert not run.done("stage", dict(seed=0, s=dict(a=1)))
        assert not (tmp_path / "stage" / "done.json").exists()

    def test_finish_sweeps_what_is_its_own(self, tmp_path):
        "Its checkpoints, and what a crash left half-written; not what only has such a name."
        run, uses = Run(tmp_path, "smoke"), dict(seed=0)
        run.done("stage", uses)
        for folder in ("checkpoints/step-1", "fit-a/checkpoints/step-7"):
            (tmp_path / "stage" / folder).mkdir(parents=True)
            (tmp_path / "stage" / folder / "model.bin").write_text("x")
            files.seal(tmp_path / "stage" / folder)
        for folder in (".part-language-abc", "fit-a/checkpoints/.part-step-8-abc"):
            (tmp_path / "stage" / folder).mkdir()
            (tmp_path / "stage" / folder / files.MARK).touch()
        foreign = ["checkpoints/step-2/model.bin", "fit-a/checkpoints/step-7/notes.txt", "fit-b/checkpoints/.part-2/x", ".metrics.jsonl.4711", "result.json", ".mine"]
        for name in foreign:
            (tmp_path / "stage" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "stage" / name).write_text("x")
        run.finish("stage", uses)
        left = sorted(str(f.relative_to(tmp_path / "stage")) for f in (tmp_path / "stage").rglob("*") if f.is_file())
        assert left == sorted(["done.json", *foreign])

    def test_two_processes_take_turns(self, tmp_path, capfd):
        "The second one waits for the first, says so, and finds its work done."
        uses, (read, write) = dict(seed=0), os.pipe()
        run = Run(tmp_path, "smoke")
        assert not run.done("stage", uses)
        if not (child := os.fork()):
            try:
                runs_module.unlock()   # a process that has just started holds nothing
                answer = Run(tmp_path, "smoke").done("stage", uses)
                os.write(write, b"found" if answer else b"makes it again")
            finally: os._exit(0)
        while "waiting for it" not in (said := capfd.readouterr().err): time.sleep(.01)
        assert f"{tmp_path / 'stage'}: another process is at work there" in said
        run.finish("stage", uses)
        os.waitpid(child, 0)
        assert os.read(read, 100) == b"found"

    def test_a_lock_goes_with_its_process(self, tmp_path):
        if not (child := os.fork()):
            runs_module.lock(tmp_path / "stage")
            (tmp_path / "locked").touch()
            time.sleep(100)
        while not (tmp_path / "locked").exists(): time.sleep(.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        runs_module.lock(tmp_path / "stage")
        runs_module.unlock()

    def test_course_run_has_a_folder_for_each_configuration(self, tmp_path, monkeypatch):
        monkeypatch.setenv("VLMRLHF_CACHE", str(tmp_path / "cache"))
        runs = [course_run("smoke"), course_run("smoke", seed=1), course_run("smoke", overrides=["ppo.clip=0.1"]), course_run("lesson")]
        assert len({r.folder for r in runs}) == 4 and all(r.folder.parent == tmp_path / "cache" for r in runs)
        assert course_run("smoke").folder == runs[0].folder


class TestFiles:
    def test_write_text_replaces_in_one_step(self, tmp_path, monkeypatch):
        file = tmp_path / "deep" / "f.txt"
        write_text(file, "old")
        monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError): write_text(file, "new, but cut")
        assert file.read_text() == "old"
        monkeypatch.undo()
        write_text(file, "new")
        assert file.read_text() == "new"
        write_text(tmp_path / "other" / "f.txt", "x")
        assert [f.name for f in (tmp_path / "other").iterdir()] == ["f.txt"], "nothing is left beside it"

    def test_jsonl_round_trip(self, tmp_path):
        rows = [dict(a=1, text="é\u2028 \"quoted\""), dict(a=[1, None], text="line\nbreak")]
        write_jsonl(tmp_path / "r.jsonl", rows)
        assert read_jsonl(tmp_path / "r.jsonl", ("a", "text")) == rows

    @pytest.mark.parametrize("text, line, word", [('{"a": 1}\n{"a": \n', 2, "JSON"), ('{"a": 1}\n{"a": 2}\n{"b": 2}\n', 3, "'a'"), ('[1]\n', 1, "'a'")])
    def test_faults_name_file_and_line(self, tmp_path, text, line, word):
        file = tmp_path / "r.jsonl"
        file.write_text(text)
        with pytest.raises(UserError) as e: read_jsonl(file, ("a",))
        assert str(file) in str(e.value) and f"line {line}" in str(e.value) and word in str(e.value)

    def test_missing_file(self, tmp_path):
        with pytest.raises(UserError, match="nothing.jsonl"): read_jsonl(tmp_path / "nothing.jsonl")

    def test_not_utf8(self, tmp_path):
        (tmp_path / "r.jsonl").write_bytes(b'{"a": "\xff"}\n')
        with pytest.raises(UserError, match="r.jsonl"): read_jsonl(tmp_path / "r.jsonl")


class TestMetricLog:
    def test_resume_drops_steps_that_are_done_again(self, tmp_path):
        log = MetricLog(tmp_path)
        for step in range(5): log(step, loss=float(step), phase="main")
        log.close()
        log = MetricLog(tmp_path, start=3)
        assert [r["step"] for r in read_jsonl(log.path)] == [0, 1, 2]
        log(3, loss=30.)
        log.close()
        assert read_jsonl(log.path) == [dict(step=i, loss=float(i), phase="main") for i in range(3)] + [dict(step=3, loss=30.)]
        assert any((tmp_path / "tensorboard").iterdir())

    def test_only_the_main_process_writes(self, tmp_path):
        log = MetricLog(tmp_path, main=False)
        log(0, loss=1.); log.close()
        assert not any(tmp_path.iterdir())

    def test_a_line_cut_by_a_crash_does_not_stop_the_resume(self, tmp_path):
        (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "lo')
        MetricLog(tmp_path, start=1).close()
        assert read_jsonl(tmp_path / "metrics.jsonl") == [dict(step=0, loss=1.)]


class Counter:
    def __init__(self): self.n = 0
    def state_dict(self): return dict(n=self.n)
    def load_state_dict(self, state): self.n = state["n"]


class TestCheckpoints:
    def make(self, folder, keep=2):
        torch.manual_seed(0)
        accelerator, net, counter = make_accelerator(), nn.Linear(2, 2), Counter()
        net, opt = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=.1))
        return Checkpoints(folder, accelerator, keep, (counter,)), net, opt, counter

    def step(self, net, opt, counter):
        net(torch.ones(1, 2)).pow(2).sum().backward(); opt.step(); opt.zero_grad()
        counter.n += 1

    def test_continues_exactly(self, tmp_path):
        saved, net, opt, counter = self.make(tmp_path / "c")
        assert saved.load() == 0
        for i in range(1, 6):
            self.step(net, opt, counter)
            if i in (1, 2, 3): saved.save(i)
        want = net.weight.detach().clone()
        assert saved.steps() == [2, 3] and not list((tmp_path / "c").glob(".part*"))
        again, net, opt, counter = self.make(tmp_path / "c")
        assert again.load() == 3 and counter.n == 3
        for _ in range(2): self.step(net, opt, counter)
        assert torch.equal(net.weight, want), "weights, and the optimiser's moments, were restored"
        assert again.load(2) == 2 and counter.n == 2
        again.clear()
        assert again.steps() == [] and again.load() == 0

    def test_a_crash_while_saving_leaves_the_last_good_one(self, tmp_path, monkeypatch):
        saved, net, opt, counter = self.make(tmp_path / "c")
        self.step(net, opt, counter); saved.save(1)
        self.step(net, opt, counter)
        monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt): saved.save(2)
        monkeypatch.undo()
        again, _, _, counter = self.make(tmp_path / "c")
        assert again.load() == 1 and counter.n == 1
        again.save(2)
        assert again.steps() == [1, 2]

    @pytest.mark.parametrize("how", ["half", "one byte less", "one bit", "empty", "gone"])
    def test_a_damaged_checkpoint_never_counts(self, tmp_path, capsys, how):
        "Whichever of its files is hit, however: the one before it is taken, and that is said."
        saved, net, opt, counter = self.make(tmp_path / "c")
        for i in (1, 2):
            self.step(net, opt, counter); saved.save(i)
        every = sorted(f.relative_to(tmp_path) for f in (tmp_path / "c" / "step-2").rglob("*") if f.is_file())
        assert len(every) >= 5 and any("manifest" in str(f) for f in every)
        for k, name in enumerate(every):
            shutil.copytree(tmp_path / "c", folder := tmp_path / f"damaged-{k}")
            file = folder / name.relative_to("c")
            data = bytearray(file.read_bytes())
            if how == "half": data = data[:len(data) // 2]
            if how == "one byte less": data = data[:-1]
            if how == "one bit": data[len(data) // 2] ^= 1
            if how == "empty": data = b""
            file.unlink() if how == "gone" else file.write_bytes(data)
            again, _, _, counter = self.make(folder)
            capsys.readouterr()
            assert again.load() == 1 and counter.n == 1, name
            said = capsys.readouterr().err.splitlines()
            assert len(said) == 1 and str(folder / "step-2") in said[0] and "does not count" in said[0] and "going back" in said[0], said

    def test_all_are_damaged(self, tmp_path):
        saved, net, opt, counter = self.make(tmp_path / "c")
        for i in (1, 2): self.step(net, opt, counter); saved.save(i)
        for manifest in (tmp_path / "c").rglob("manifest.json"): manifest.unlink()
        again, _, _, counter = self.make(tmp_path / "c")
        assert again.load() == 0 and counter.n == 0

    def test_a_write_that_fails(self, tmp_path):
        "The kernel refuses to write more than 1,000 bytes to a file: a UserError, what was there before stays, and nothing half is left."
        saved, net, opt, counter = self.make(tmp_path / "c")
        self.step(net, opt, counter); saved.save(1)
        self.step(net, opt, counter)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            with pytest.raises(UserError, match="checkpoint after step 2 cannot be written .* the one after step 1 is whole: make room"): saved.save(2)
        finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert [f.name for f in (tmp_path / "c").iterdir()] == ["step-1"]
        saved.save(2)
        again, _, _, counter = self.make(tmp_path / "c")
        assert again.load() == 2 and counter.n == 2

    def test_steps_are_sorted_as_numbers(self, tmp_path):
        for n in (9, 10, 100): (tmp_path / f"step-{n}").mkdir()
        assert Checkpoints(tmp_path, None).steps() == [9, 10, 100]


class Wobbly(nn.Module):
    "A task for `fit` whose loss is not finite on some items."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(2, 1)

    def collate(self, items): return torch.tensor(items)
    def count(self, batch): return len(batch)
    def forward(self, batch): return (self.net(torch.ones(len(batch), 2)).squeeze(1) ** 2 * batch).sum(), {}


class TestStepGuard:
    def run(self, folder, weights, **settings):
        task = Wobbly()
        fit(task, lambda step: [weights[step], 1.], FitConfig(steps=len(weights), lr=.1, batch=2, **settings), folder, "demo")
        return task.net.weight.detach(), read_jsonl(folder / "metrics.jsonl")

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_a_bad_step_changes_nothing(self, tmp_path, bad):
        "The step is left out: weights and Adam's moments as if its gradient had not been there, and it is counted."
        weights, rows = self.run(tmp_path / "a", [1., 1., bad, 1.])
        assert weights.isfinite().all() and [r["skipped"] for r in rows] == [0, 0, 1, 1]
        task, lr = Wobbly(), [r["lr"] for r in rows]
        optimizer = torch.optim.AdamW(task.parameters(), weight_decay=.01, betas=(.9, .98), fused=True)
        for step in (0, 1, 3):
            optimizer.param_groups[0]["lr"] = lr[step]
            (task(task.collate([1., 1.]))[0] / 2).backward()
            nn.utils.clip_grad_norm_(task.parameters(), 1.)
            optimizer.step(); optimizer.zero_grad()
        assert torch.equal(weights, task.net.weight.detach())

    def test_two_in_a_row_are_forgiven_and_three_are_not(self, tmp_path):
        nan = float("nan")
        _, rows = self.run(tmp_path / "a", [1., nan, nan, 1., nan, nan])
        assert rows[-1]["skipped"] == 4
        with pytest.raises(UserError, match="demo, step 3: loss nan, gradient norm nan") as e: self.run(tmp_path / "b", [1., nan, nan, nan, 1.])
        assert "metrics.jsonl" in str(e.value) and "learning rate" in str(e.value)
        assert [r["step"] for r in read_jsonl(tmp_path / "b" / "metrics.jsonl")] == [0, 1, 2], "what led to it is on record"

    def test_the_count_survives_a_resume(self, tmp_path):
        weights = [1., float("nan"), 1., 1.]
        def stop(step):
            if step == 3: raise KeyboardInterrupt
            return [weights[step], 1.]
        with pytest.raises(KeyboardInterrupt): fit(Wobbly(), stop, FitConfig(steps=4, lr=.1, batch=2, save_every=2), tmp_path / "a", "demo")
        _, rows = self.run(tmp_path / "a", weights, save_every=2)
        assert [r["skipped"] for r in rows] == [0, 1, 1, 1]
        assert rows == self.run(tmp_path / "b", weights)[1]


def test_one_process_sweeps(tmp_path, monkeypatch):
    "Two that remove the same tree trip over each other."
    (tmp_path / "fit" / ".part-3").mkdir(parents=True)
    (tmp_path / "fit" / ".part-3" / files.MARK).touch()
    monkeypatch.setattr(files, "is_main", lambda: False)
    files.sweep(tmp_path)
    assert (tmp_path / "fit" / ".part-3").is_dir()
    monkeypatch.setattr(files, "is_main", lambda: True)
    files.sweep(tmp_path)
    assert not list((tmp_path / "fit").iterdir())
