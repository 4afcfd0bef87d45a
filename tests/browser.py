"""JupyterLab in a browser, driven as a learner drives it: a server of its own, keys, the menu.

Whoever imports this is skipped, with a reason, where playwright or JupyterLab is not installed."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

import vlmrlhf_course

pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: pip install -e '.[test]'")
sync_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install -e '.[test]'"
)

INSTALLED = ("chromium", "chromium-browser", "google-chrome")
FLAGS = "disable-gpu disable-quic no-first-run disable-background-networking".split()
FLAGS = [f"--{flag}" for flag in (*FLAGS, "disable-component-update", "disable-sync")]
# A first start asks whether one wants news from the network.
NO_NEWS = "lab/user-settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
SECONDS = 60  # for one thing to appear in the page
RAN = re.compile(r"\[\d+\]")  # the prompt of a cell that has run
TRACEBACK = "Traceback (most recent call last)"
expect = sync_api.expect
expect.set_options(timeout=1000 * SECONDS)


# --- server and browser ---------------------------------------------------------------------------


@contextmanager
def jupyterlab(root: Path, own: Path):
    "A server on a free port that shows `root`, and keeps what is its own in `own`; its address."
    write_settings(own / "config" / NO_NEWS)
    options = ["--no-browser", "--ServerApp.port=0", f"--ServerApp.root_dir={root}"]
    options += ["--allow-root"] * is_root()
    with open(own / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            cwd=own,
            env=surroundings(own),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield address(server, own)
    finally:
        server.terminate()  # it ends its kernels, which a SIGKILL would leave behind
        server.wait(SECONDS)


def write_settings(file: Path):
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))


def is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


def surroundings(own: Path) -> dict[str, str]:
    "The environment of server and kernels: nothing of the user's is read or written."
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "VLMRLHF"))}
    names = dict(
        config="JUPYTER_CONFIG_DIR", data="JUPYTER_DATA_DIR", runtime="JUPYTER_RUNTIME_DIR"
    )
    folders = {name: str(own / folder) for folder, name in names.items()}
    mine = dict(IPYTHONDIR=str(own / "ipython"), VLMRLHF_PROGRESS=str(own / "progress.json"))
    package = str(Path(vlmrlhf_course.__file__).parents[1])
    return {**kept, **folders, **mine, "PYTHONPATH": package}


def address(server: subprocess.Popen, own: Path) -> dict:
    "What the server writes down once it listens: `url` and `token`."
    file, deadline = own / "runtime" / f"jpserver-{server.pid}.json", time.monotonic() + SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            return json.loads(file.read_text("utf-8"))
        except (OSError, ValueError):  # not yet, or not yet whole
            time.sleep(0.1)
    raise AssertionError(f"JupyterLab does not start:\n{(own / 'log').read_text()[-2000:]}")


@contextmanager
def chromium(home: Path):
    "A headless browser; skips where there is none."
    with sync_api.sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, INSTALLED)), playwright.chromium.executable_path)
        if not Path(path).is_file():
            pytest.skip("no browser: install Chromium (Debian: apt install chromium)")
        browser = playwright.chromium.launch(
            executable_path=path,
            args=[*FLAGS, *["--no-sandbox"] * is_root()],
            env={**os.environ, "HOME": str(home)},
        )
        yield browser
        browser.close()


@contextmanager
def no_process_left():
    """What was started inside, and looked up by calling what this gives, has ended afterwards. What
    has not is killed, and said."""
    before, started = set(children()), set()
    try:
        yield lambda: started.update(children())
    finally:
        _, left = psutil.wait_procs(started - before, timeout=10)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    assert started - before and not left, f"left behind: {left}"


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


# --- a notebook in the page -----------------------------------------------------------------------


class Notebook:
    "The notebook that the page shows: its cells by their ids, and a learner's hands."

    def __init__(self, page, file: Path):
        cells = json.loads(file.read_text("utf-8"))["cells"]
        self.page, self.file, self.ids = page, file, [cell["id"] for cell in cells]
        self.code = sum(cell["cell_type"] == "code" for cell in cells)
        self.panel = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")
        self.cells = self.panel.locator(".jp-Notebook-cell")
        expect(self.cells).to_have_count(len(cells))
        self.panel.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for()
        self.wait_for_kernel()

    def wait_for_kernel(self):
        "The page says idle before its kernel is connected, and drops what is run until then."
        deadline = time.monotonic() + SECONDS
        while not self.connected():
            assert time.monotonic() < deadline, f"{self.file.name}: its kernel is not connected"
            self.page.wait_for_timeout(200)
        self.page.wait_for_timeout(1000)

    def connected(self) -> bool:
        "By the server's account of its sessions."
        origin = "/".join(self.page.url.split("/")[:3])
        sessions = self.page.request.get(f"{origin}/api/sessions").json()
        kernels = [s["kernel"] for s in sessions if s["path"].endswith(self.file.name)]
        return any(k["connections"] and k["execution_state"] == "idle" for k in kernels)

    def cell(self, name: str):
        return self.cells.nth(self.ids.index(name))

    def output(self, name: str):
        return self.cell(name).locator(".jp-OutputArea-output")

    def select(self, name: str):
        self.cell(name).locator(".jp-InputPrompt").click()

    def run(self, *names: str):
        "Shift+Enter in each of these cells, which follow one another; the first is active."
        for name in names:
            following = self.cells.nth(self.ids.index(name) + 1)
            self.page.keyboard.press("Shift+Enter")
            # a key that comes before the next cell is active is lost
            expect(following).to_have_class(re.compile("jp-mod-active"))

    def before(self, name: str) -> list[str]:
        return self.ids[: self.ids.index(name)]

    def write(self, name: str, old: str, new: str):
        "Type over the line of a cell that holds `old`; the editor indents what follows."
        self.cell(name).locator(".cm-line", has_text=old).click()
        self.page.keyboard.press("End")
        self.page.keyboard.press("Shift+Home")
        self.page.keyboard.type(new)

    def choose(self, menu: str, item: str):
        self.page.locator(".lm-MenuBar-itemLabel").get_by_text(menu, exact=True).click()
        self.page.locator(".lm-Menu-itemLabel").get_by_text(item, exact=True).click()

    def save(self) -> list[dict]:
        "Save it; its cells, from the file."
        before = self.file.stat().st_mtime_ns
        self.page.keyboard.press("Control+s")
        deadline = time.monotonic() + SECONDS
        while self.file.stat().st_mtime_ns == before and time.monotonic() < deadline:
            self.page.wait_for_timeout(100)
        return json.loads(self.file.read_text("utf-8"))["cells"]


@contextmanager
def photographed(page, folder: Path):
    "What fails leaves a picture of the page, and says where."
    try:
        yield
    except (AssertionError, sync_api.Error) as e:
        page.screenshot(path=folder / "page.png")
        raise AssertionError(f"{e}\nThe page as it was: {folder / 'page.png'}") from e
