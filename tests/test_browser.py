"""A learner at work: JupyterLab in a real browser, keys and clicks in, text on the page out.

Skipped where no browser is installed: `apt install chromium` on Debian, or .ci/run."""

import json
import shutil
from types import SimpleNamespace

import pytest
from browser import (
    RAN,
    SECONDS,
    TRACEBACK,
    Notebook,
    chromium,
    expect,
    jupyterlab,
    no_process_left,
    photographed,
)
from conftest import REPO

EXERCISE, CHAPTER = "07_advantages.ipynb", "01b_judge.ipynb"
STUB, CHECK = "exercise-token-rewards", "check-token-rewards"  # ids of cells
WRONG = "rewards = -kl_cost * mask\nrewards[:, -1] += score\nreturn rewards"
MISTAKE = "the score stands in the last column, which may be padding"
MENDED = """\
last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
rewards += torch.where(last, score.unsqueeze(1), 0.0)"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "JupyterLab on a copy of what a learner opens, and a browser; both gone afterwards."
    root, own = tmp_path_factory.mktemp("course"), tmp_path_factory.mktemp("jupyter")
    shutil.copytree(REPO / "exercises", root / "exercises")
    (root / "nbs").mkdir()
    (root / "nbs" / CHAPTER).write_text(without_outputs(REPO / "nbs" / CHAPTER))
    with no_process_left() as watch:
        with chromium(own) as browser, jupyterlab(root, own) as server:
            yield SimpleNamespace(root=root, server=server, browser=browser)
            watch()


def without_outputs(file) -> str:
    "A notebook as if it had never run."
    book = json.loads(file.read_text("utf-8"))
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            cell.update(outputs=[], execution_count=None)
    return json.dumps(book)


@pytest.fixture
def page(lab):
    "A window without anything open."
    page = lab.browser.new_page(viewport=dict(width=1200, height=900))
    page.set_default_timeout(1000 * SECONDS)
    yield page
    page.close()


def opened(lab, page, path: str) -> Notebook:
    page.goto(f"{lab.server['url']}lab/tree/{path}?reset&token={lab.server['token']}")
    return Notebook(page, lab.root / path)


def test_a_mistake_is_named_a_right_answer_ticked_and_remembered(lab, page, tmp_path):
    with photographed(page, tmp_path):
        book = opened(lab, page, f"exercises/{EXERCISE}")
        book.select(book.ids[0])
        book.run(*book.before(STUB))
        book.write(STUB, "raise NotImplementedError", WRONG)
        book.run(STUB, CHECK)
        said = book.output(CHECK)
        expect(said).to_contain_text(f"This is exactly what comes out if {MISTAKE}.")
        expect(said).to_be_visible()
        assert TRACEBACK not in said.inner_text(), "the message is hidden below library code"
        book.write(STUB, "rewards[:, -1] += score", MENDED)
        book.run(STUB, CHECK)
        expect(said).to_contain_text("✓ token_rewards: 21 cases")
        page.locator(".jp-DirListing-item", has_text="00_index.ipynb").dblclick()
        index = Notebook(page, lab.root / "exercises" / "00_index.ipynb")
        index.select("title")
        index.run(*index.ids)
        expect(index.output("overview")).to_have_count(1)  # the table, and no warning above it
        expect(index.output("overview")).to_contain_text("1 of ")
        row = index.output("overview").locator("tr", has_text="token_rewards")
        expect(row.locator("td").last).to_have_text("✓")


def test_a_chapter_runs_without_an_error(lab, page, tmp_path):
    with photographed(page, tmp_path):
        book = opened(lab, page, f"nbs/{CHAPTER}")
        prompts = book.panel.locator(".jp-CodeCell .jp-InputPrompt")
        expect(prompts.filter(has_text=RAN)).to_have_count(0)
        book.choose("Run", "Run All Cells")
        errors = book.panel.locator(".jp-OutputArea-output", has_text=TRACEBACK)
        # an error stops what follows: without looking for it we would wait in vain
        expect(prompts.filter(has_text=RAN).nth(book.code - 1).or_(errors).first).to_be_attached()
        assert not errors.all_inner_texts()
        expect(prompts.filter(has_text=RAN)).to_have_count(book.code)
        saved = [output for cell in book.save() for output in cell.get("outputs", [])]
        assert saved and not [out for out in saved if out["output_type"] == "error"]
