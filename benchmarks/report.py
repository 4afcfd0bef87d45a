"""Write the tables of README.md from results/*.json: `python -m benchmarks.report`."""
import json
import re
from pathlib import Path

from benchmarks import breakdown, gpu, naive, scaling, trl_peer
from benchmarks.common import RESULTS

README = Path(__file__).parent / "README.md"
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
    return f"{SCRIPTS[name].rows(result)}\n\n{result['machine']}, {threads}, load of the machine {result['load']}; {with_}; {result['date']}."


def render(text: str, found: dict[str, dict]) -> str:
    "README.md with every block made anew. Raises KeyError where a benchmark has no block."
    for name in SCRIPTS:
        new = f"<!-- {name} -->\n{block(name, found.get(name))}\n<!-- /{name} -->"
        text, n = re.subn(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda m, new=new: new, text, flags=re.S)
        if n != 1: raise KeyError(f"README.md has {n} blocks for {name}")
    return text


if __name__ == "__main__": README.write_text(render(README.read_text("utf-8"), results()), encoding="utf-8")
