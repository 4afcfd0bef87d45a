"""Grade the hostile corpus and write what came of it into `hostile/README.md`:

python tests/hostile_table.py"""

import sys
import tempfile
from pathlib import Path

from hostile_corpus import FOLDER, Graded, Kind, faults, graded, item_in, kinds, lay_out

FILE = FOLDER / "README.md"
TITLES = dict(
    too_much="Time, memory, processes, output",
    out_of_it="Out of the sandbox",
    library="Ways to what is right",
    forged="Forged messages, and a grader's code changed",
    values="What a function returns or raises",
    source="What a cell or a notebook is",
    folders="Files, folders, names",
    honest="Honest, and unusual: full marks",
)
HEAD = """# The hostile corpus

{count} submissions that try to cheat the grader or to break it, and {honest} that are right in \
an unusual way. `tests/test_hostile.py` sends all of them through `vlmrlhf grade` in one folder \
and asks of each: no undeserved point, no process left, nothing written elsewhere, the next one \
graded. Below: what came of them here, in a sandbox of {sandbox}, with {limit} s for an exercise. \
`python tests/hostile_table.py` writes this table.

**What is not kept in.** {limits} Without a container, with Landlock alone, names and sizes of \
the machine's files can be asked for, though not their contents. A kit holds what a reference \
calls, and that may be another exercise's reference, so that who does `dedupe` can read \
`similarity`: both stand in the installed package, too. Python's parser runs on a stranger's text \
only in the sandbox, and for likeness, where texts of more than 20,000 characters are left out.
"""


def plain(text: str) -> str:
    "A text as a cell of a Markdown table."
    one_line = " ".join(text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").split())
    return one_line.replace("`", "'")


def outcome(kind: Kind, done: Graded, root: Path) -> str:
    "What came of a kind, in a few words."
    if kind.absent:
        return "left out"
    (result,), item = done.results[kind.who], item_in(kind, done.results)
    said = "; ".join([item["why"], *result["troubles"]]) if not kind.full else ""
    said = said.replace(str(root), "…").replace(str(FOLDER.parents[1]), "…").strip("; ")
    short = said if len(said) <= 100 else said[:100] + "…"
    words = f"{item['status']}, {item['points']:g} of {item['most']:g}" + (
        f": {short}" if short else ""
    )
    return f"{words}. **Known limit**: {kind.limit}" if kind.limit else words


def text_of(done: Graded, root: Path, sandbox: str) -> str:
    "The page."
    every = kinds()
    honest = sum(kind.file == "honest" for kind in every)
    limits = " ".join(f"{k.limit[0].upper()}{k.limit[1:]}." for k in every if k.limit)
    parts = dict(count=len(every) - honest, honest=honest, limits=limits, sandbox=sandbox, limit=2)
    lines = [HEAD.format(**parts)]
    for file, title in TITLES.items():
        lines += [f"\n## {title}\n", "| kind | what it tries | what comes of it |", "|---|---|---|"]
        for kind in (k for k in every if k.file == file):
            words = [kind.name, kind.tries, outcome(kind, done, root)]
            lines.append(f"| {' | '.join(map(plain, words))} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    with tempfile.TemporaryDirectory() as temp:
        post = lay_out(Path(temp), kinds())
        done = graded(post)
        found = [fault for kind in kinds() for fault in faults(kind, done.results)]
        if done.status or found:
            print(done.said[-2000:], *found, sep="\n")
            return 1
        backend = next(iter(done.results.values()))[0]["backend"]
        FILE.write_text(text_of(done, post.root, backend), "utf-8")
    print(f"{FILE}: {len(kinds())} kinds, {done.seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
