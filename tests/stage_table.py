"""What kill.py and fuzz.py know of the stages: read from the library's one table, and from the arms
of a scale, so that a new one is hit, too."""

from vlmrlhf_course import pipeline  # noqa: F401  (its import fills the table)
from vlmrlhf_course.base.runs import Run
from vlmrlhf_course.base.stages import STAGES, before, config_of, kind_of, stage_names
from vlmrlhf_course.rl.algorithm import RLConfig

LAST = "evaluate"  # the one after which a run is done


def short_training(iterations: int, prompts: int, minibatch: int, epochs: int) -> list[str]:
    "Overrides: every kind of stage that trains does so in few steps, with a checkpoint after each."
    sets = []
    for kind, stage in STAGES.items():
        cfg = stage.config()
        if isinstance(cfg, RLConfig):
            k = min(2, cfg.answers_per_prompt)  # two where there must be a group
            sizes = dict(iterations=iterations, answers_per_prompt=k, answers=prompts * k)
            sizes |= dict(minibatch=minibatch * k, pool=20, save_every=1, eval_every=3)
            sets += [f"{kind}.{key}={value}" for key, value in sizes.items()]
        elif hasattr(cfg, "fit"):
            much = f"epochs={epochs}" if hasattr(cfg, "epochs") else f"fit.steps={iterations}"
            sets += [f"{kind}.{much}", f"{kind}.fit.batch=4", f"{kind}.fit.save_every=1"]
    return sets


def run_of(scale: str, sets: list[str]) -> Run:
    "A run to be asked only: it has no folder."
    return Run("nowhere", scale, sets)


def needed_by(run: Run, name: str) -> list[str]:
    "The stages that need a stage, but for the last one, which needs all."
    return [n for n in stage_names(run.layers) if n != LAST and name in before(run, n)]


def arms_of(run: Run) -> dict[str, str]:
    "Every arm, compared in the end or not, and its kind."
    names = [n for n in stage_names(run.layers) if n != LAST and not needed_by(run, n)]
    return {name: kind_of(run.layers, name) for name in names}


def groups_of(run: Run) -> dict[str, list[str]]:
    """A whole run's stages in the order in which they are made: what arms have in common first,
    then the arms, made at once, as one group. Neighbours of one kind are one group, too."""
    stages, arms, groups = before(run, LAST), arms_of(run), {}
    for name in [name for name in stages if name not in arms]:
        kind = kind_of(run.layers, name)
        at_its_end = not groups or kind == [*groups][-1] or kind not in groups
        groups.setdefault(kind if at_its_end else name, []).append(name)
    groups["arms"] = [name for name in stages if name in arms]
    return groups | {LAST: [LAST]}


def with_every_arm(scale: str, sets: list[str]) -> list[str]:
    "Overrides, and one more: that all arms are compared in the end."
    return [*sets, f"{LAST}.arms=[{','.join(arms_of(run_of(scale, sets)))}]"]


def drawn_arms(run: Run) -> list[str]:
    "The arms of which the last stage reads the metrics."
    cfg = config_of(run, LAST)
    return list(dict.fromkeys([*cfg.arms, cfg.curve]))
