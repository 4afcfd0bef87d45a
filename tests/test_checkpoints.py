"""Files, records, metrics, checkpoints, and steps that are no numbers."""

import resource
import shutil
from dataclasses import dataclass

import pytest
import torch
from commands import tree
from small_models import SMALL, small_ppo
from torch import nn

from vlmrlhf_course.base import files
from vlmrlhf_course.base.checkpoints import Checkpoints
from vlmrlhf_course.base.files import write_jsonl, write_text
from vlmrlhf_course.base.launch import make_accelerator
from vlmrlhf_course.base.metrics import MetricLog
from vlmrlhf_course.base.records import digest_of, read_jsonl
from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.model.vlm import VLM
from vlmrlhf_course.rl import loop
from vlmrlhf_course.rl.ppo import PPO, PPOConfig
from vlmrlhf_course.train.fit import FitConfig, fit
from vlmrlhf_course.world.llava import build_model, build_processor


def raising(error):
    "A function that only raises `error`."

    def fail(*args):
        raise error

    return fail


class TestFiles:
    def test_write_text_replaces_in_one_step(self, tmp_path, monkeypatch):
        file = tmp_path / "deep" / "f.txt"
        write_text(file, "old")
        monkeypatch.setattr("os.fsync", raising(OSError("disk full")))
        with pytest.raises(OSError):
            write_text(file, "new, but cut")
        assert file.read_text() == "old"
        monkeypatch.undo()
        write_text(file, "new")
        assert file.read_text() == "new"
        write_text(tmp_path / "other" / "f.txt", "x")
        beside = [f.name for f in (tmp_path / "other").iterdir()]
        assert beside == ["f.txt"], "nothing is left beside it"

    def test_jsonl_round_trip(self, tmp_path):
        rows = [dict(a=1, text='é\u2028 "quoted"'), dict(a=[1, None], text="line\nbreak")]
        write_jsonl(tmp_path / "r.jsonl", rows)
        assert read_jsonl(tmp_path / "r.jsonl", ("a", "text")) == rows

    @pytest.mark.parametrize(
        "text, line, word",
        [
            ('{"a": 1}\n{"a": \n', 2, "JSON"),
            ('{"a": 1}\n{"a": 2}\n{"b": 2}\n', 3, "'a'"),
            ("[1]\n", 1, "'a'"),
        ],
    )
    def test_faults_name_file_and_line(self, tmp_path, text, line, word):
        file = tmp_path / "r.jsonl"
        file.write_text(text)
        with pytest.raises(UserError) as e:
            read_jsonl(file, ("a",))
        for said in (str(file), f"line {line}", word):
            assert said in str(e.value)

    def test_missing_file(self, tmp_path):
        with pytest.raises(UserError, match="nothing.jsonl"):
            read_jsonl(tmp_path / "nothing.jsonl")

    def test_not_utf8(self, tmp_path):
        (tmp_path / "r.jsonl").write_bytes(b'{"a": "\xff"}\n')
        with pytest.raises(UserError, match="r.jsonl"):
            read_jsonl(tmp_path / "r.jsonl")


class TestMetricLog:
    def test_resume_drops_steps_that_are_done_again(self, tmp_path):
        log = MetricLog(tmp_path)
        for step in range(5):
            log(step, loss=float(step), phase="main")
        log.close()
        log = MetricLog(tmp_path, start=3)
        assert [r["step"] for r in read_jsonl(log.path)] == [0, 1, 2]
        log(3, loss=30.0)
        log.close()
        old = [dict(step=i, loss=float(i), phase="main") for i in range(3)]
        assert read_jsonl(log.path) == [*old, dict(step=3, loss=30.0)]
        assert any((tmp_path / "tensorboard").iterdir())

    def test_only_the_main_process_writes(self, tmp_path):
        log = MetricLog(tmp_path, main=False)
        log(0, loss=1.0)
        log.close()
        assert not any(tmp_path.iterdir())

    def test_a_line_cut_by_a_crash_does_not_stop_the_resume(self, tmp_path):
        (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "lo')
        MetricLog(tmp_path, start=1).close()
        assert read_jsonl(tmp_path / "metrics.jsonl") == [dict(step=0, loss=1.0)]


class Counter:
    def __init__(self):
        self.n = 0

    def state_dict(self):
        return dict(n=self.n)

    def load_state_dict(self, state):
        self.n = state["n"]


class TestCheckpoints:
    def make(self, folder, keep=2):
        torch.manual_seed(0)
        accelerator, net, counter = make_accelerator(), nn.Linear(2, 2), Counter()
        net, opt = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=0.1))
        return Checkpoints(folder, accelerator, keep, (counter,)), net, opt, counter

    def step(self, net, opt, counter):
        net(torch.ones(1, 2)).pow(2).sum().backward()
        opt.step()
        opt.zero_grad()
        counter.n += 1

    def test_continues_exactly(self, tmp_path):
        saved, net, opt, counter = self.make(tmp_path / "c")
        assert saved.load() == 0
        for i in range(1, 6):
            self.step(net, opt, counter)
            if i in (1, 2, 3):
                saved.save(i)
        want = net.weight.detach().clone()
        assert saved.steps() == [2, 3] and not list((tmp_path / "c").glob(".part*"))
        again, net, opt, counter = self.make(tmp_path / "c")
        assert again.load() == 3 and counter.n == 3
        for _ in range(2):
            self.step(net, opt, counter)
        assert torch.equal(net.weight, want), "weights, and the optimiser's moments, were restored"
        assert again.load(2) == 2 and counter.n == 2
        again.clear()
        assert again.steps() == [] and again.load() == 0

    def test_a_crash_while_saving_leaves_the_last_good_one(self, tmp_path, monkeypatch):
        saved, net, opt, counter = self.make(tmp_path / "c")
        self.step(net, opt, counter)
        saved.save(1)
        self.step(net, opt, counter)
        monkeypatch.setattr("os.replace", raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            saved.save(2)
        monkeypatch.undo()
        again, _, _, counter = self.make(tmp_path / "c")
        assert again.load() == 1 and counter.n == 1
        again.save(2)
        assert again.steps() == [1, 2]

    def damage(self, file, how):
        data = bytearray(file.read_bytes())
        if how == "half":
            data = data[: len(data) // 2]
        if how == "one byte less":
            data = data[:-1]
        if how == "one bit":
            data[len(data) // 2] ^= 1
        if how == "empty":
            data = b""
        if how == "gone":
            file.unlink()
        else:
            file.write_bytes(data)

    @pytest.mark.parametrize("how", ["half", "one byte less", "one bit", "empty", "gone"])
    def test_a_damaged_checkpoint_never_counts(self, tmp_path, capsys, how):
        "Whichever of its files is hit, however: the one before it is taken, and that is said."
        saved, net, opt, counter = self.make(tmp_path / "c")
        for i in (1, 2):
            self.step(net, opt, counter)
            saved.save(i)
        every = sorted(tree(tmp_path / "c" / "step-2"))
        assert len(every) >= 5 and any("manifest" in name for name in every)
        for k, name in enumerate(every):
            folder = tmp_path / f"damaged-{k}"
            shutil.copytree(tmp_path / "c", folder)
            self.damage(folder / "step-2" / name, how)
            again, _, _, counter = self.make(folder)
            capsys.readouterr()
            assert again.load() == 1 and counter.n == 1, name
            said = capsys.readouterr().err.splitlines()
            assert len(said) == 1, said
            assert str(folder / "step-2") in said[0], said
            assert "does not count" in said[0], said
            assert "going back" in said[0], said

    def test_all_are_damaged(self, tmp_path):
        saved, net, opt, counter = self.make(tmp_path / "c")
        for i in (1, 2):
            self.step(net, opt, counter)
            saved.save(i)
        for manifest in (tmp_path / "c").rglob("manifest.json"):
            manifest.unlink()
        again, _, _, counter = self.make(tmp_path / "c")
        assert again.load() == 0 and counter.n == 0

    def test_a_write_that_fails(self, tmp_path):
        """The kernel refuses to write more than 1,000 bytes to a file: a UserError, what was there
        before stays, and nothing half is left."""
        saved, net, opt, counter = self.make(tmp_path / "c")
        self.step(net, opt, counter)
        saved.save(1)
        self.step(net, opt, counter)
        said = (
            "checkpoint after step 2 cannot be written .* the one after step 1 is whole: make room"
        )
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            with pytest.raises(UserError, match=said):
                saved.save(2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert [f.name for f in (tmp_path / "c").iterdir()] == ["step-1"]
        saved.save(2)
        again, _, _, counter = self.make(tmp_path / "c")
        assert again.load() == 2 and counter.n == 2

    def test_steps_are_sorted_as_numbers(self, tmp_path):
        for n in (9, 10, 100):
            (tmp_path / f"step-{n}").mkdir()
        assert Checkpoints(tmp_path, None).steps() == [9, 10, 100]


class Wobbly(nn.Module):
    "A task for `fit` whose loss is not finite on some items."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(2, 1)

    def collate(self, items):
        return torch.tensor(items)

    def count(self, batch):
        return len(batch)

    def forward(self, batch):
        return (self.net(torch.ones(len(batch), 2)).squeeze(1) ** 2 * batch).sum(), {}


class TestStepGuard:
    def run(self, folder, weights, **settings):
        task = Wobbly()
        cfg = FitConfig(steps=len(weights), lr=0.1, batch=2, **settings)
        fit(task, lambda step: [weights[step], 1.0], cfg, folder, "demo")
        return task.net.weight.detach(), read_jsonl(folder / "metrics.jsonl")

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_a_bad_step_changes_nothing(self, tmp_path, bad):
        """The step is left out: weights and Adam's moments as if its gradient had not been there,
        and it is counted."""
        weights, rows = self.run(tmp_path / "a", [1.0, 1.0, bad, 1.0])
        assert weights.isfinite().all() and [r["skipped"] for r in rows] == [0, 0, 1, 1]
        task, lr = Wobbly(), [r["lr"] for r in rows]
        usual = dict(weight_decay=0.01, betas=(0.9, 0.98), fused=True)
        optimizer = torch.optim.AdamW(task.parameters(), **usual)
        for step in (0, 1, 3):
            optimizer.param_groups[0]["lr"] = lr[step]
            (task(task.collate([1.0, 1.0]))[0] / 2).backward()
            nn.utils.clip_grad_norm_(task.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(weights, task.net.weight.detach())

    def test_two_in_a_row_are_forgiven_and_three_are_not(self, tmp_path):
        nan = float("nan")
        _, rows = self.run(tmp_path / "a", [1.0, nan, nan, 1.0, nan, nan])
        assert rows[-1]["skipped"] == 4
        with pytest.raises(UserError, match="demo, step 3: loss nan, gradient norm nan") as e:
            self.run(tmp_path / "b", [1.0, nan, nan, nan, 1.0])
        assert "metrics.jsonl" in str(e.value) and "learning rate" in str(e.value)
        rows = read_jsonl(tmp_path / "b" / "metrics.jsonl")
        assert [r["step"] for r in rows] == [0, 1, 2], "what led to it is on record"

    def test_the_count_survives_a_resume(self, tmp_path):
        weights = [1.0, float("nan"), 1.0, 1.0]

        def stop(step):
            if step == 3:
                raise KeyboardInterrupt
            return [weights[step], 1.0]

        cfg = FitConfig(steps=4, lr=0.1, batch=2, save_every=2)
        with pytest.raises(KeyboardInterrupt):
            fit(Wobbly(), stop, cfg, tmp_path / "a", "demo")
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


def test_checkpoints_of_another_algorithm_are_not_taken(tmp_path, monkeypatch):
    """With the same values of settings, prompts and folder: whose settings they are decides.

    A class that only adds to an algorithm goes on from its checkpoints. Two kinds of arms are told
    apart by the run's record, too."""

    @dataclass(frozen=True)
    class TwinConfig(PPOConfig):
        "PPO's settings, of another algorithm."

    class Watched(PPO):
        "The same algorithm."

    of = []
    policy, scores, pool = small_ppo(VLM(build_model(SMALL), build_processor(SMALL)), iterations=1)
    same, twin = policy.cfg, TwinConfig(**vars(policy.cfg))
    monkeypatch.setattr(loop, "digest_of", lambda what: of.append(digest_of(what)) or of[-1])
    for kind, cfg in ((PPO, same), (Watched, same), (PPO, twin)):
        policy.__class__, policy.cfg = kind, cfg
        loop.train(policy, scores, pool, pool[:2], tmp_path / str(len(of)) / "arm")
    assert of[0] == of[1] != of[2]


def tied(views: bool):
    "Two layers that share a weight; or all weights are views of one flat tensor."
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    flat = torch.arange(15.0)
    if not views:
        return model
    for p, piece in zip(model.parameters(), flat.split([9, 3, 3])):
        p.data = piece.view(p.shape)
    return model


@pytest.mark.parametrize("views", [False, True])
def test_tied_weights_and_views_of_one_tensor_come_back(tmp_path, views):
    "As DeepSpeed lays them out: each weight is saved, a tied one once."
    model, accelerator = tied(views), make_accelerator()
    accelerator._models.append(model)
    saved = Checkpoints(tmp_path, accelerator, of="a run")
    saved.save(1, [])
    before = {name: p.clone() for name, p in model.state_dict().items()}
    for p in model.parameters():
        p.data.zero_()
    assert saved.load() == 1
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
