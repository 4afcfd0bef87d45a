"""Write the tables of README.md, and those that chapters quote, from results/*.json: `python -m benchmarks.report`."""
import json
import re
from pathlib import Path

from benchmarks import breakdown, gpu, naive, scaling, trl_peer
from benchmarks.common import RESULTS

README = Path(__file__).parent / "README.md"
CHAPTERS = sorted((Path(__file__).parents[1] / "nbs").glob("*.ipynb"))
SCRIPTS = dict(naive=naive, trl_peer=trl_peer, breakdown=breakdown, scaling=scaling, gpu=gpu)


def results() -> dict[str, dict]:
    "What was measured."
    files = {name: RESULTS / f"{name}.json" for name in SCRIPTS}
    return {name: json.loads(file.read_text("utf-8")) for name, file in files.items() if file.is_file()}


def block(name: str, result: dict | None) -> str:
    "What stands between a benchmark's markers."
    if result is None: return "Not measured yet."
    with_ = ", ".join(f"{k} {result[k]}" for k in ("python", "torch", "transformers", "peft", "trl") if k in result)
    threads = f"{result['threads']} thread{'s' * (result['threads'] > 1)}"
    name, _, part = name.partition(".")
    tables = SCRIPTS[name].rows(result) if not part else getattr(SCRIPTS[name], f"{part}_table")(result)
    return f"{tables}\n\n{result['machine']}, {threads}, load of the machine {result['load']}; {with_}; {result['date']}."


def fill(text: str, found: dict[str, dict]) -> str:
    "`text` with every block in it made anew; `<!-- name.part -->` holds one table of a benchmark."
    def new(match): return f"<!-- {match[1]} -->\n{block(match[1], found.get(match[1].split('.')[0]))}\n<!-- /{match[1]} -->"
    return re.sub(rf"<!-- ((?:{'|'.join(SCRIPTS)})(?:\.\w+)?) -->.*?<!-- /\1 -->", new, text, flags=re.S)


def render(text: str, found: dict[str, dict]) -> str:
    "README.md with every block made anew. Raises KeyError where a benchmark has no block."
    for name in SCRIPTS:
        if (n := text.count(f"<!-- {name} -->")) != 1: raise KeyError(f"README.md has {n} blocks for {name}")
    return fill(text, found)


def quoting(chapter: Path, found: dict[str, dict]) -> str:
    "A chapter's text with the tables in its markdown cells made anew."
    notebook = json.loads(chapter.read_text("utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown": cell["source"] = fill("".join(cell["source"]), found).splitlines(True)
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


if __name__ == "__main__":
    README.write_text(render(README.read_text("utf-8"), results()), encoding="utf-8")
    for chapter in CHAPTERS:
        if (text := quoting(chapter, results())) != chapter.read_text("utf-8"): chapter.write_text(text, encoding="utf-8")
