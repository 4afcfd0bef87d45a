"Data is data: nothing in a run, a checkpoint, a model folder or a picture can run when it is read."
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
from conftest import REPO
from PIL import Image
from safetensors.torch import load_file
from test_bad_inputs import refused
from test_cli import interrupted, stop_at

from vlmrlhf_course import cli
from vlmrlhf_course.base import files
from vlmrlhf_course.rl import ppo
from vlmrlhf_course.train import sft
from vlmrlhf_course.cli import main
from vlmrlhf_course.base.runs import UserError, load_tensors, read_jsonl
from vlmrlhf_course.model.vlm import load_vlm, save_vlm
from vlmrlhf_course.world.scenes import open_image


class Evil:
    "Makes a folder when it is unpickled."
    def __init__(self, flag): self.flag = str(flag)
    def __reduce__(self): return os.mkdir, (self.flag,)


# --- what a run writes ----------------------------------------------------------------------------------------------

def read_as_data(file: Path):
    "Load a file by its kind, without unpickling anything but tensors and plain containers."
    kinds = {".json": lambda: json.loads(file.read_text()), ".jsonl": lambda: read_jsonl(file),
             ".yaml": lambda: yaml.safe_load(file.read_text()), ".safetensors": lambda: load_file(file),
             ".png": lambda: Image.open(file, formats=["PNG"]).load(), ".html": file.read_text, ".log": file.read_text,
             ".jinja": file.read_text}
    if file.name.startswith("events.out.tfevents"):
        return file.read_bytes()
    return kinds.get(file.suffix, lambda: torch.load(file, weights_only=True))()


def test_every_file_of_a_run(smoke_run):
    every = [f for f in smoke_run.rglob("*") if f.is_file()]
    assert len(every) > 50 and {f.suffix for f in every} >= {".json", ".jsonl", ".safetensors", ".html", ".png", ".yaml"}
    for file in every:
        read_as_data(file)


STOPPED = {"sft": (sft, "backward_through", 6, "sft/fit-language/checkpoints/step-2", ["sft.language.save_every=2"]),
           "ppo": (ppo, "make_experience", 3, "ppo/checkpoints/step-2", ["ppo.save_every=2"])}


@pytest.fixture(scope="module", params=STOPPED)
def stopped(request, smoke_run, tmp_path_factory):
    "A run that was stopped behind a checkpoint: its folder, the checkpoint's, the command."
    module, name, call, step, change = STOPPED[request.param]
    folder = tmp_path_factory.mktemp("stopped") / "run"
    for stage in ("sft", "preferences", "reward") if request.param == "ppo" else ():
        shutil.copytree(smoke_run / stage, folder / stage)
    argv = [request.param, "--scale", "smoke", "--out", folder, "--set", *change]
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, module, name, call)
        assert main(list(map(str, argv))) == 130
    assert (folder / step).is_dir()
    return folder, step, argv


def test_every_file_of_a_checkpoint(stopped):
    folder, step, _ = stopped
    every = sorted((folder / step).iterdir())
    assert {"model.safetensors", "optimizer.bin", "objects.pt", "metrics.json", "manifest.json"} == {f.name for f in every}
    for file in every:
        read_as_data(file)


EXTRA = ["random_states_0.pkl", "custom_checkpoint_0.pkl", "scheduler.bin", "pytorch_model.bin", "sampler.bin", "scaler.pt"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "objects.pt", "metrics.json", *EXTRA])
def test_a_pickle_in_a_checkpoint(capsys, tmp_path, stopped, name):
    "In the place of each of its files, or beside them, and the manifest renewed: it is refused or ignored, never executed."
    source, step, argv = stopped
    shutil.copytree(source, tmp_path / "run")
    place = tmp_path / "run" / step
    torch.save(Evil(tmp_path / "executed"), place / name)
    if name == "pytorch_model.bin":
        (place / "model.safetensors").unlink()   # which would be read first
    of = json.loads((place / "manifest.json").read_text())["of"]
    (place / "manifest.json").unlink()
    files.seal(place, of)
    again = [tmp_path / "run" if a == source else a for a in argv]
    status = main(list(map(str, again)))
    assert not (tmp_path / "executed").exists()
    said = capsys.readouterr().err.splitlines()
    assert status == 0 or status == 2 and str(place) in said[-1] and "move" in said[-1], said
    if name in ("optimizer.bin", "objects.pt", "metrics.json", "model.safetensors"):
        assert status == 2
        shutil.move(place, tmp_path / "elsewhere")
        assert main(list(map(str, again))) == 0, "the advice works"


@pytest.mark.parametrize("file", ["sft/language/model.safetensors", "reward/reward.safetensors", "ppo/actor.safetensors"])
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
        done.write_text(json.dumps(record | dict(sum=files.sum_of(record))))
    line = refused(capsys, "evaluate", "--scale", "smoke", "--out", tmp_path / "run")
    assert not (tmp_path / "executed").exists() and str(tmp_path / "run" / file.split("/")[0]) in line


def test_torch_load_of_others(tmp_path):
    "After `main` has begun, also libraries that ask for unpickling get data only."
    torch.save(Evil(tmp_path / "executed"), tmp_path / "x.pt")
    code = (f"import sys, torch; from vlmrlhf_course.cli import main; main(['rum'])\n"
            f"try: torch.load({str(tmp_path / 'x.pt')!r}, weights_only=False)\nexcept Exception as e: print(type(e).__name__)")
    env = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent), "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["UnpicklingError"] and not (tmp_path / "executed").exists(), done.stderr[-500:]


# --- model folders --------------------------------------------------------------------------------------------------

CODE = "import pathlib\npathlib.Path({flag!r}).touch()\nfrom transformers import {names}\n"


@pytest.mark.parametrize("where", ["config.json", "processor_config.json", "both"])
def test_code_in_a_model_folder(vlm, tmp_path, monkeypatch, where):
    "It does not run, and nobody is asked."
    save_vlm(vlm, tmp_path / "model")
    names = "LlavaConfig as C, LlavaForConditionalGeneration as M, LlavaProcessor as P"
    (tmp_path / "model" / "evil.py").write_text(CODE.format(flag=str(tmp_path / "executed"), names=names))
    maps = {"config.json": dict(model_type="evil", auto_map=dict(AutoConfig="evil.C", AutoModelForImageTextToText="evil.M")),
            "processor_config.json": dict(auto_map=dict(AutoProcessor="evil.P"))}
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
    from vlmrlhf_course.model import vlm as module
    save_vlm(vlm, tmp_path / "model")
    seen = []
    original = module.AutoProcessor.from_pretrained
    def watched(path, **settings):
        seen.append(settings["trust_remote_code"])
        return original(path, **settings)
    monkeypatch.setattr(module.AutoProcessor, "from_pretrained", watched)
    load = module.AutoModelForImageTextToText.from_pretrained
    def watched_model(path, **settings):
        seen.append(settings["trust_remote_code"])
        return load(path, **settings)
    monkeypatch.setattr(module.AutoModelForImageTextToText, "from_pretrained", watched_model)
    load_vlm(tmp_path / "model")
    load_vlm(tmp_path / "model", trust_remote_code=True)
    assert seen == [False, False, True, True]


# --- pictures -------------------------------------------------------------------------------------------------------

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(executed) (w) file closefile showpage\n%%EOF\n"


def test_pictures_that_are_programs(tmp_path, monkeypatch):
    "PostScript goes to an interpreter in Pillow; here it is no picture, whatever the file is called."
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
    return [folder / "pipe", folder / "link", folder / "loop", folder / "socket", Path("/dev/zero"), Path("/dev/stdin"), folder]


def test_pictures_that_are_no_files(tmp_path):
    "A pipe that nobody writes to, a device without an end: refused, not waited for."
    for path in not_files(tmp_path):
        with pytest.raises(UserError, match="not a picture"):
            open_image(str(path))


def test_pixels_have_a_limit(tmp_path, monkeypatch):
    "By the size in the header, before anything is decoded; without a warning of Pillow's beside the line."
    from test_bad_inputs import png
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
