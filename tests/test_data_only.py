"""Data is data: nothing in a run, a checkpoint, a model folder or a picture can run when read."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from commands import copy_stages, refused, smoke, stop_at
from picture_files import png
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor

from vlmrlhf_course import cli
from vlmrlhf_course.base import files
from vlmrlhf_course.base.checkpoints import load_tensors
from vlmrlhf_course.base.records import read_jsonl, sum_of
from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.cli import main
from vlmrlhf_course.data.prompts import open_image
from vlmrlhf_course.model import vlm as vlm_module
from vlmrlhf_course.model.vlm import load_vlm, save_vlm
from vlmrlhf_course.rl import loop
from vlmrlhf_course.train import fit as fit_module


class Evil:
    "Makes a folder when it is unpickled."

    def __init__(self, flag):
        self.flag = str(flag)

    def __reduce__(self):
        return os.mkdir, (self.flag,)


# --- what a run writes ------------------------------------------------------------------------


def read_as_data(file: Path):
    "Load a file by its kind, without unpickling anything but tensors and plain containers."
    kinds = {
        ".json": lambda: json.loads(file.read_text()),
        ".jsonl": lambda: read_jsonl(file),
        ".yaml": lambda: yaml.safe_load(file.read_text()),
        ".safetensors": lambda: load_file(file),
        ".png": lambda: Image.open(file, formats=["PNG"]).load(),
        ".html": file.read_text,
        ".log": file.read_text,
        ".jinja": file.read_text,
    }
    if file.name.startswith("events.out.tfevents"):
        return file.read_bytes()
    return kinds.get(file.suffix, lambda: torch.load(file, weights_only=True))()


def test_every_file_of_a_run(smoke_run):
    every = [f for f in smoke_run.rglob("*") if f.is_file()]
    assert len(every) > 50
    kinds = {file.suffix for file in every}
    assert kinds >= {".json", ".jsonl", ".safetensors", ".html", ".png", ".yaml"}
    for file in every:
        read_as_data(file)


# A stage: where and at which call it is stopped, the checkpoint that it leaves, its settings.
SFT_STEP, PPO_STEP = "sft/fit-language/checkpoints/step-2", "ppo/checkpoints/step-2"
STOPPED = {
    "sft": (fit_module, "backward_through", 6, SFT_STEP, "sft.language.save_every=2"),
    "ppo": (loop, "collect", 3, PPO_STEP, "ppo.save_every=2"),
}


@pytest.fixture(scope="module", params=STOPPED)
def stopped(request, smoke_run, tmp_path_factory):
    "A run that was stopped behind a checkpoint: its folder, the checkpoint's, the command."
    module, name, call, step, change = STOPPED[request.param]
    folder = tmp_path_factory.mktemp("stopped") / "run"
    if request.param == "ppo":
        copy_stages(smoke_run, folder, "sft", "preferences", "reward")
    argv = smoke(request.param, folder, "--set", change)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, module, name, call)
        assert main(argv) == 130
    assert (folder / step).is_dir()
    return folder, step, argv


PARTS = ["model.safetensors", "optimizer.bin", "objects.pt", "metrics.json"]


def test_every_file_of_a_checkpoint(stopped):
    folder, step, _ = stopped
    every = sorted((folder / step).iterdir())
    assert {f.name for f in every} == {*PARTS, "manifest.json"}
    for file in every:
        read_as_data(file)


EXTRA = [
    "random_states_0.pkl",
    "custom_checkpoint_0.pkl",
    "scheduler.bin",
    "pytorch_model.bin",
    "sampler.bin",
    "scaler.pt",
]


@pytest.mark.parametrize("name", [*PARTS, *EXTRA])
def test_a_pickle_in_a_checkpoint(capsys, tmp_path, stopped, name):
    """In the place of each of its files, or beside them, and the manifest renewed: it is refused or
    ignored, never executed."""
    source, step, argv = stopped
    shutil.copytree(source, tmp_path / "run")
    place = tmp_path / "run" / step
    torch.save(Evil(tmp_path / "executed"), place / name)
    if name == "pytorch_model.bin":
        (place / "model.safetensors").unlink()  # which would be read first
    of = json.loads((place / "manifest.json").read_text())["of"]
    (place / "manifest.json").unlink()
    files.seal(place, of)
    again = [str(tmp_path / "run") if word == str(source) else word for word in argv]
    status = main(again)
    assert not (tmp_path / "executed").exists()
    said = capsys.readouterr().err.splitlines()
    if status != 0:
        assert status == 2 and str(place) in said[-1] and "move" in said[-1], said
    if name in PARTS:
        assert status == 2
        shutil.move(place, tmp_path / "elsewhere")
        assert main(again) == 0, "the advice works"


RESULTS = ["sft/language/model.safetensors", "reward/reward.safetensors"]
RESULTS += ["detector/detector.safetensors", "ppo_rm/actor.safetensors"]


@pytest.mark.parametrize("file", RESULTS)
@pytest.mark.parametrize("sealed", [False, True])
def test_a_pickle_in_a_result(capsys, smoke_run, tmp_path, file, sealed):
    "Also where somebody has renewed every seal."
    shutil.copytree(smoke_run, tmp_path / "run")
    at = tmp_path / "run" / file
    torch.save(Evil(tmp_path / "executed"), at)
    done = tmp_path / "run" / file.split("/")[0] / "done.json"
    if sealed:
        record = json.loads(done.read_text())
        for name in record["files"]:
            inner = done.parent / name
            if inner.name == files.MANIFEST:
                of = json.loads(inner.read_text())["of"]
                inner.unlink()
                files.seal(inner.parent, of)
            record["files"][name] = files.digest(inner)
        done.write_text(json.dumps(record | dict(sum=sum_of(record))))
    line = refused(capsys, *smoke("evaluate", tmp_path / "run"))
    assert not (tmp_path / "executed").exists()
    assert str(tmp_path / "run" / file.split("/")[0]) in line


LOADER = """
import torch
from vlmrlhf_course.cli import main
main(["rum"])
try:
    torch.load({file!r}, weights_only=False)
except Exception as e:
    print(type(e).__name__)
"""


def test_torch_load_of_others(tmp_path):
    "After `main` has begun, also libraries that ask for unpickling get data only."
    torch.save(Evil(tmp_path / "executed"), tmp_path / "x.pt")
    code = LOADER.format(file=str(tmp_path / "x.pt"))
    env = {
        **os.environ,
        "PYTHONPATH": str(Path(cli.__file__).parent.parent),
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["UnpicklingError"], done.stderr[-500:]
    assert not (tmp_path / "executed").exists(), done.stderr[-500:]


# --- model folders ----------------------------------------------------------------------------

CODE = "import pathlib\npathlib.Path({flag!r}).touch()\nfrom transformers import {names}\n"


@pytest.mark.parametrize("where", ["config.json", "processor_config.json", "both"])
def test_code_in_a_model_folder(vlm, tmp_path, monkeypatch, where):
    "It does not run, and nobody is asked."
    save_vlm(vlm, tmp_path / "model")
    names = "LlavaConfig as C, LlavaForConditionalGeneration as M, LlavaProcessor as P"
    code = CODE.format(flag=str(tmp_path / "executed"), names=names)
    (tmp_path / "model" / "evil.py").write_text(code)
    classes = dict(AutoConfig="evil.C", AutoModelForImageTextToText="evil.M")
    maps = {
        "config.json": dict(model_type="evil", auto_map=classes),
        "processor_config.json": dict(auto_map=dict(AutoProcessor="evil.P")),
    }
    for name, more in maps.items():
        if where in (name, "both"):
            file = tmp_path / "model" / name
            file.write_text(json.dumps(json.loads(file.read_text()) | more))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("somebody is asked"))
    try:
        load_vlm(tmp_path / "model")
    except UserError as e:
        assert str(tmp_path / "model") in str(e)
    assert not (tmp_path / "executed").exists()


def test_remote_code_on_request(monkeypatch, vlm, tmp_path):
    "Only the caller can allow it, and then for model and processor alike."
    save_vlm(vlm, tmp_path / "model")
    seen = []

    def watch(cls):
        original = cls.from_pretrained

        def watched(path, **settings):
            seen.append(settings["trust_remote_code"])
            return original(path, **settings)

        monkeypatch.setattr(cls, "from_pretrained", watched)

    watch(AutoProcessor)
    watch(vlm_module.AutoModelForImageTextToText)
    load_vlm(tmp_path / "model")
    load_vlm(tmp_path / "model", trust_remote_code=True)
    assert seen == [False, False, True, True]


# --- pictures ---------------------------------------------------------------------------------

EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 10 10
%%EndComments
(executed) (w) file closefile showpage
%%EOF
"""


def test_pictures_that_are_programs(tmp_path, monkeypatch):
    """PostScript goes to an interpreter in Pillow; here it is no picture, whatever the file is
    called."""
    for name in ("Popen", "run", "call", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, name, lambda *a, **k: pytest.fail("a program is started"))
    for name in ("a.eps", "a.png", "a.ps"):
        (tmp_path / name).write_bytes(EPS)
        with pytest.raises(UserError, match="not a picture"):
            open_image(str(tmp_path / name))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_formats_that_are_read(tmp_path, kind):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a", kind)
    assert open_image(str(tmp_path / "a")).size == (4, 4)


@pytest.mark.parametrize("kind", ["ICO", "PDF", "TGA", "JPEG2000", "ICNS", "PCX", "SGI"])
def test_formats_that_are_not(tmp_path, kind):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a", kind)
    with pytest.raises(UserError, match="not a picture"):
        open_image(str(tmp_path / "a"))


def not_files(folder):
    "Things that have a name and are no files."
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to(folder / "pipe")
    (folder / "loop").symlink_to(folder / "loop")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(folder / "socket"))
    here = [folder / name for name in ("pipe", "link", "loop", "socket")]
    return [*here, Path("/dev/zero"), Path("/dev/stdin"), folder]


def test_pictures_that_are_no_files(tmp_path):
    "A pipe that nobody writes to, a device without an end: refused, not waited for."
    for path in not_files(tmp_path):
        with pytest.raises(UserError, match="not a picture"):
            open_image(str(path))


def test_pixels_have_a_limit(tmp_path, monkeypatch):
    """By the size in the header, before anything is decoded; without a warning of Pillow's beside
    the line."""
    for side, good in ((8000, True), (9000, False), (12_000, False), (60_000, False)):
        (tmp_path / "a.png").write_bytes(png(side, side))
        with pytest.raises(UserError) as e:
            open_image(str(tmp_path / "a.png"))
        assert ("pixels" in str(e.value).split(": ", 1)[1]) != good


def test_weights_that_are_no_files(tmp_path):
    for path in not_files(tmp_path)[:3]:
        with pytest.raises((UserError, OSError)):
            files.digest(path)
    with pytest.raises(UserError):
        load_tensors(tmp_path / "loop")
