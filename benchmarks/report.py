"""Write the tables of README.md, and those that chapters quote, from results/*.json:
`python -m benchmarks.report`."""

import json
import re
from pathlib import Path

from benchmarks import (
    breakdown,
    detector,
    gpu,
    naive,
    own_pairs,
    scaling,
    trl_peer,
    two_stages,
    vision,
)
from benchmarks.common import RESULTS

README = Path(__file__).parent / "README.md"
CHAPTERS = sorted((Path(__file__).parents[1] / "nbs").glob("*.ipynb"))
SCRIPTS = dict(naive=naive, trl_peer=trl_peer, breakdown=breakdown, scaling=scaling)
SCRIPTS |= dict(two_stages=two_stages, detector=detector, own_pairs=own_pairs, gpu=gpu)
SCRIPTS |= dict(vision=vision)


def results() -> dict[str, dict]:
    "What was measured."
    found = {}
    for name in SCRIPTS:
        file = RESULTS / f"{name}.json"
        if file.is_file():
            found[name] = json.loads(file.read_text("utf-8"))
    return found


def block(name: str, result: dict | None) -> str:
    "What stands between a benchmark's markers."
    if result is None:
        return "Not measured yet."
    name, _, part = name.partition(".")
    script = SCRIPTS[name]
    tables = getattr(script, f"{part}_table")(result) if part else script.rows(result)
    libraries = ("python", "torch", "transformers", "peft", "trl")
    versions = ", ".join(f"{k} {result[k]}" for k in libraries if k in result)
    threads = f"{result['threads']} thread{'s' * (result['threads'] > 1)}"
    machine = f"{result['machine']}, {threads}, load of the machine {result['load']}"
    return f"{tables}\n\n{machine}; {versions}; {result['date']}."


def fill(text: str, found: dict[str, dict]) -> str:
    "`text` with every block in it made anew; `<!-- name.part -->` holds one table of a benchmark."

    def new(match):
        name = match[1]
        content = block(name, found.get(name.split(".")[0]))
        return f"<!-- {name} -->\n{content}\n<!-- /{name} -->"

    names = "|".join(SCRIPTS)
    return re.sub(rf"<!-- ((?:{names})(?:\.\w+)?) -->.*?<!-- /\1 -->", new, text, flags=re.S)


def render(text: str, found: dict[str, dict]) -> str:
    "README.md with every block made anew. Raises KeyError where a benchmark has no block."
    for name in SCRIPTS:
        n = text.count(f"<!-- {name} -->")
        if n != 1:
            raise KeyError(f"README.md has {n} blocks for {name}")
    return fill(text, found)


def quoting(chapter: Path, found: dict[str, dict]) -> str:
    "A chapter's text with the tables in its markdown cells made anew."
    notebook = json.loads(chapter.read_text("utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = fill("".join(cell["source"]), found).splitlines(True)
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


if __name__ == "__main__":
    README.write_text(render(README.read_text("utf-8"), results()), encoding="utf-8")
    for chapter in CHAPTERS:
        text = quoting(chapter, results())
        if text != chapter.read_text("utf-8"):
            chapter.write_text(text, encoding="utf-8")
