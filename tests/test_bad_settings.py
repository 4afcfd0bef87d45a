"""Command lines, settings and scale files that are refused: status 2 and one line, before anything
is computed.

The tables say what goes in and which words must come out."""

import pytest
from commands import no_stage, refused

from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.base.stages import STAGES
from vlmrlhf_course.world.scenes import WorldConfig, sample_scenes


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], ["required", "verb", "--help"]),
        (["rum"], ["'rum'", "choose from", "run"]),
        (["ppo", "--arm", "orcale"], ["'orcale'", "oracle"]),
        (["run", "--seed", "x"], ["--seed", "'x'", "whole number"]),
        (["run", "--seed", "-1"], ["--seed", "'-1'"]),
        (["run", "--seed", "99999999999999999999"], ["--seed", "2147483647"]),
        (["run", "--threads", "0"], ["--threads", "'0'", "from 1"]),
        (["run", "--threads", "two"], ["--threads", "'two'"]),
        (["run", "--seeds", "0"], ["--seeds", "'0'"]),
        (["run", "--seeds", "2.5"], ["--seeds", "'2.5'"]),
        (["run", "--fast"], ["--fast"]),
        (["sft", "--resume"], ["--resume"]),
        (["run", "--scale", "smok"], ["'smok'", "did you mean 'smoke'"]),
        (["run", "--scale", "no/such.yaml"], ["no/such.yaml"]),
        (["run", "--scale", "smoke", "--set"], ["--set"]),
        (["run", "--scale", "smoke", "--out", ""], ["--out"]),
        (["sft", "--scale", "smoke", "--out", "odd\udcffname"], ["--out", "no UTF-8"]),
        (
            ["run", "--resume", "--scale", "smoke", "--out", "nowhere"],
            ["nowhere", "no run to resume", "leave out --resume"],
        ),
        (
            ["run", "--resume", "--scale", "smoke", "--seeds", "2", "--out", "nowhere"],
            ["nowhere", "no run to resume"],
        ),
    ],
)
def test_command_line(capsys, tmp_path, argv, words):
    line = refused(capsys, *argv)
    assert all(w in line for w in words), line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change, words",
    [
        ("ppo.clip=1", ["ppo", "clip=1", "(0, 1)"]),
        ("ppo.clip=0", ["clip=0", "(0, 1)"]),
        ("ppo.clip=nan", ["clip=nan", "(0, 1)"]),
        ("ppo.value_clip=-1", ["value_clip=-1"]),
        ("ppo.temperature=0", ["temperature=0", "(0, inf)"]),
        ("ppo.temperature=-0.5", ["temperature=-0.5"]),
        ("ppo.gamma=1.5", ["gamma=1.5", "(0, 1]"]),
        ("ppo.lam=1.01", ["lam=1.01", "[0, 1]"]),
        ("ppo.lam=-0.1", ["lam=-0.1"]),
        ("ppo.iterations=0", ["iterations=0", "[1, inf)"]),
        ("ppo.iterations=-5", ["iterations=-5"]),
        ("ppo.answers=0", ["answers=0"]),
        ("ppo.minibatch=0", ["minibatch=0"]),
        ("ppo.micro_batch=-1", ["micro_batch=-1"]),
        ("ppo.epochs=0", ["epochs=0"]),
        ("ppo.max_new_tokens=0", ["max_new_tokens=0"]),
        ("ppo.warmup=1.1", ["warmup=1.1", "[0, 1]"]),
        ("ppo.finish=-0.1", ["finish=-0.1"]),
        ("ppo.kl_target=0", ["kl_target=0", "(0, inf)"]),
        ("ppo.kl_target=-1", ["kl_target=-1"]),
        ("ppo.kl_emergency=0", ["kl_emergency=0"]),
        ("ppo.beta=-0.1", ["beta=-0.1"]),
        ("ppo.actor_lr=-1e-3", ["actor_lr=-0.001"]),
        ("ppo.actor_lr=inf", ["actor_lr=inf"]),
        ("ppo.grad_clip=0", ["grad_clip=0"]),
        ("ppo.no_eos=nan", ["no_eos=nan"]),
        ("ppo.save_every=0", ["save_every=0"]),
        ("oracle.eval_every=0", ["oracle", "eval_every=0"]),
        ("ppo.answers=5000", ["5000", "pool"]),
        ("ppo.kinds={}", ["ppo.kinds is empty"]),
        ("ppo.kinds.poem=1", ["kinds.poem", "give some of detail"]),
        ("ppo.kinds.breif=1", ["did you mean 'brief'"]),
        ("ppo.kinds.text=1", ["kinds.text"]),
        ("ppo.kinds.detail=-1", ["kinds.detail=-1"]),
        ("ppo.kinds=[detail]", ["ppo"]),
        ("ppo.penalty.weight=-1", ["weight=-1"]),
        ("ppo.penalty.object=2", ["object=2", "(-inf, 0]"]),
        ("ppo.lora.r=-1", ["r=-1"]),
        ("ppo.lora.dropout=1", ["dropout=1", "[0, 1)"]),
        ("ppo.reward={rn: 1}", ["ppo: reward.rn", "did you mean 'rm'"]),
        ("ppo.reward.pealty=1", ["reward.pealty", "did you mean 'penalty'"]),
        ("ppo.reward=rm", ["ppo", "Cannot assign str to Dict[str, float]"]),
        ("ppo.reward=[rm]", ["ppo"]),
        ("grpo.reward={}", ["grpo.reward is empty"]),
        ("ppo.reward.rm=nan", ["ppo: reward.rm=nan"]),
        ("ppo.reward.rm=.inf", ["reward.rm=inf"]),
        ("ppo.reward.rm=much", ["ppo", "much"]),
        ("ppo.reward={rm: 0, penalty: 0}", ["ppo: reward: every weight is 0"]),
        ("ppo_rm.reward.rm=0", ["ppo_rm: reward: every weight is 0"]),
        ("dpo.reward={rm: 1}", ["unknown key dpo.reward"]),
        ("dpo.beta=0", ["dpo: beta=0", "(0, inf)"]),
        ("dpo.epochs=0", ["dpo: epochs=0"]),
        ("dpo.fit.batch=0", ["dpo", "batch=0"]),
        ("grpo.length=tokns", ["grpo: length='tokns'", "did you mean 'tokens'"]),
        ("grpo.kl=los", ["grpo: kl='los'", "did you mean 'loss'"]),
        ("grpo.answers_per_prompt=1", ["grpo: answers_per_prompt=1", "two or more"]),
        ("rloo.answers_per_prompt=1", ["rloo: answers_per_prompt=1", "two or more"]),
        ("rloo.answers_per_prompt=3", ["rloo: answers (8)", "multiples of answers_per_prompt"]),
        ("rloo.critic=head", ["unknown key rloo.critic"]),
        ("ppo.reward_model=preferences", ["ppo", "'preferences'"]),
        ("ppo_detector.detector=reward", ["ppo_detector", "'reward'"]),
        ("ppo_detector.detector=detectro", ["ppo_detector", "detectro"]),
        ("ppo.anchor=-1", ["anchor=-1", "[0, inf)"]),
        ("ppo.anchor_kinds={}", ["ppo.anchor_kinds is empty"]),
        ("ppo.anchor_kinds.poem=1", ["anchor_kinds.poem", "give some of detail"]),
        ("ppo.anchor_kinds={exists: 0}", ["anchor_kinds: no weight is above 0"]),
        ("detector.pictures=0", ["detector: pictures=0", "[1, inf)"]),
        ("detector.width=0", ["detector: width=0", "[1, inf)"]),
        ("detector.fit.steps=0", ["detector", "steps=0"]),
        ("ppo.reward_model=ppo", ["ppo"]),
        ("evaluate.arms=[]", ["evaluate: ", "arms"]),
        ("evaluate.arms=[ppo_rm,orcale]", ["evaluate", "'orcale'", "oracle"]),
        ("evaluate.arms=[ppo,sft]", ["evaluate", "'sft'"]),
        ("evaluate.arms=[ppo_rm,evaluate]", ["evaluate", "'evaluate'"]),
        ("evaluate.arms=ppo", ["evaluate"]),
        ("evaluate.headline=oracle_", ["headline='oracle_'", "ppo_rm"]),
        ("evaluate.curve=hakced", ["evaluate", "'hakced'", "hacked"]),
        ("evaluate.curve=reward", ["evaluate", "'reward'"]),
        ("world.kind=ppo", ["world.kind"]),
        ("mine.kind=pppo", ["mine.kind='pppo'", "did you mean 'ppo'"]),
        ("oracle.kind=pppo", ["oracle.kind='pppo'", "did you mean 'ppo'"]),
        ("ppo.kind=3", ["ppo.kind=3"]),
        ("ppo.kind=[ppo]", ["ppo.kind=['ppo']"]),
        ("mine.clip=.1", ["unknown section 'mine'"]),
        ("ppo.reward_model=rewrad", ["rewrad"]),
        ("sft.pictures=0", ["pictures=0"]),
        ("sft.language.steps=-1", ["sft", "steps=-1", "[1, inf)"]),
        ("sft.language.batch=0", ["batch=0"]),
        ("sft.projector.warmup=2", ["warmup=2"]),
        ("sft.projector.clip=0", ["clip=0"]),
        ("sft.projector.lr=nan", ["lr=nan"]),
        ("sft.language.weight_decay=-1", ["weight_decay=-1"]),
        ("sft.language.save_every=0", ["save_every=0"]),
        ("sft.kinds.detail=inf", ["kinds.detail=inf"]),
        ("preferences.prompts=0", ["prompts=0"]),
        ("preferences.temperatures=[]", ["temperatures"]),
        ("preferences.temperatures=[1.0]", ["a pair needs two"]),
        ("preferences.temperatures=[1.0,-1.0]", ["temperatures=-1"]),
        ("preferences.annotators=1", ["annotators=1", "[2, inf)"]),
        ("preferences.noise=-1", ["noise=-1"]),
        ("preferences.max_similarity=2", ["max_similarity=2"]),
        ("reward.epochs=0", ["epochs=0"]),
        ("reward.margin=-1", ["margin=-1"]),
        ("reward.prompts=-3", ["prompts=-3"]),
        ("reward.pooling=lst", ["did you mean 'last'"]),
        ("evaluate.scenes=1", ["scenes=1", "[2, inf)"]),
        ("evaluate.best_of=0", ["best_of=0"]),
        ("world.pair=1.5", ["pair=1.5", "[0, 1]"]),
        ("world.min_groups=4", ["min_groups=4"]),
        ("world.max_groups=8", ["max_groups=8", "count to nine"]),
        ("world.omit=nan", ["omit=nan"]),
        ("ppo=3", ["--set ppo=3", "section.key=value"]),
        ("ppo.clip", ["section.key=value"]),
        ("ppo.clip=", ["ppo"]),
        ("ppo.clip=wide", ["ppo", "wide"]),
        ("ppo.clpi=.1", ["ppo.clpi", "did you mean 'clip'"]),
        ("pppo.clip=.1", ["'pppo'", "did you mean 'ppo'"]),
        ("ppo.lora=3", ["ppo"]),
        ("sft.projector=[]", ["--set", "sft.projector"]),
        ("sft.language=[1,[2,3]]", ["--set", "sft.language"]),
        ("ppo.penalty.count_power=1e4", ["count_power=10000"]),
        ("ppo.penalty.count=5", ["ppo: count=5", "(-inf, 0]"]),
        ("ppo.penalty.place=0.1", ["place=0.1", "(-inf, 0]"]),
        ("ppo.iterations=2.5", ["ppo", "2.5"]),
    ],
)
def test_settings(capsys, tmp_path, change, words):
    line = refused(capsys, "sft", "--scale", "smoke", "--out", tmp_path / "out", "--set", change)
    assert all(w in line for w in words), line
    assert not (tmp_path / "out").exists(), "something was written before the settings were checked"


@pytest.mark.parametrize(
    "text, words",
    [
        (b"ppo: {clip: [\n", ["mine.yaml"]),
        (b"- ppo\n", ["mine.yaml"]),
        (b"ppo: 3\n", ["mine.yaml", "ppo"]),
        (b"\xff\xfe", ["mine.yaml"]),
        (b"3\n", ["mine.yaml"]),
        (b"ppo: {clip: 7}\n", ["clip=7"]),
        (b"mine: {kind: ppo, clip: 7}\n", ["mine: clip=7"]),
        (b"mine: {kind: ppo, clpi: .1}\n", ["mine.clpi", "did you mean 'clip'"]),
        (b"mine: {kind: pop}\n", ["mine.kind='pop'", "ppo"]),
        (b"mine: {kind: oracle}\n", ["mine.kind='oracle'", "give one of"]),
        (b"mine: {label: my own}\n", ["unknown section 'mine'"]),
        (b"../mine: {kind: ppo}\n", ["'../mine'", "name a stage with letters"]),
        (b"a: {kind: ppo, reward_model: b}\nb: {kind: ppo}\n", ["'b'", "reward"]),
        (b"mine: {kind: ppo, reward: {praise: 1}}\n", ["mine: reward.praise", "rm"]),
    ],
)
def test_scale_file(capsys, tmp_path, text, words):
    (tmp_path / "mine.yaml").write_bytes(text)
    line = refused(capsys, "run", "--scale", tmp_path / "mine.yaml", "--out", tmp_path / "out")
    assert all(w in line for w in words) and not (tmp_path / "out").exists(), line


@pytest.mark.parametrize("kind", [kind for kind in STAGES if kind != "preferences"])
def test_a_stage_that_others_need_stays_of_its_kind(capsys, tmp_path, monkeypatch, kind):
    "Pairs are read where a section is called `preferences`: a model in their place is no use."
    no_stage(monkeypatch)
    (tmp_path / "mine.yaml").write_text(f"preferences: {{kind: {kind}}}\n")
    line = refused(capsys, "reward", "--scale", tmp_path / "mine.yaml", "--out", tmp_path / "out")
    assert "preferences" in line and not (tmp_path / "out").exists(), line


@pytest.mark.parametrize(
    "name", ["best_of_n", "sft_blank", "ppo_greedy", "sft_greedy", "reward_model"]
)
def test_an_arm_is_not_called_as_another_row(capsys, tmp_path, monkeypatch, name):
    "It would stand in the report in the place of what is called so."
    no_stage(monkeypatch)
    compared = f"evaluate: {{arms: [ppo, {name}]}}"
    (tmp_path / "mine.yaml").write_text(f"{name}: {{kind: ppo}}\n{compared}\n")
    line = refused(capsys, "sft", "--scale", tmp_path / "mine.yaml", "--out", tmp_path / "out")
    assert repr(name) in line and "report" in line, line


@pytest.mark.parametrize(
    "text, words",
    [
        (b"[course\n", ["settings.ini"]),
        (b"[course]\nsacle = tiny\n", ["did you mean 'scale'"]),
        (b"[course]\nseed = x\n", ["seed", "whole number"]),
        (b"[course]\nseed = -4\n", ["seed=-4"]),
        (b"[corse]\nseed = 1\n", ["corse"]),
        (b"[course]\nscale = smok\n", ["did you mean 'smoke'"]),
        (b"[course]\nseed = 1\nseed = 2\n", ["settings.ini", "seed"]),
        (b"\xff\xfe[course]", ["settings.ini"]),
    ],
)
def test_settings_file(capsys, tmp_path, text, words):
    (tmp_path / "settings.ini").write_bytes(text)
    line = refused(capsys, "run", "--out", "out")
    assert all(w in line for w in words) and not (tmp_path / "out").exists(), line


def test_more_scenes_than_there_are():
    "A wish that cannot be fulfilled is refused, not searched for ever."
    few = WorldConfig(min_groups=1, max_groups=1, pair=0.0)
    with pytest.raises(UserError, match="scenes of split 'test' wanted"):
        sample_scenes(2000, "test", 0, few)
    with pytest.raises(UserError, match="'tset'"):
        sample_scenes(1, "tset")


@pytest.mark.parametrize(
    "text, words",
    [
        ("half: {kind: ppo}", ["'half'", "PyTorch's modules", "another name"]),
        ("train: {kind: dpo}", ["'train'", "another name"]),
        ("type: {kind: grpo}", ["'type'", "another name"]),
        ("seed: {kind: ppo}", ["'seed'", "every record", "another name"]),
        ("environment: {kind: ppo}", ["'environment'", "every record"]),
        ("x: {kind: ppo, critic: adapter}\nx_critic: {kind: rloo}", ["x_critic", "critic=adapter"]),
        ("second: {kind: evaluate, arms: [ppo_rm]}", ["second.kind='evaluate'", "only one"]),
    ],
)
def test_names_and_kinds_that_no_arm_can_have(capsys, tmp_path, monkeypatch, text, words):
    no_stage(monkeypatch)
    (tmp_path / "mine.yaml").write_text(text + "\n")
    line = refused(capsys, "sft", "--scale", tmp_path / "mine.yaml", "--out", tmp_path / "out")
    assert all(w in line for w in words) and not (tmp_path / "out").exists(), line


def test_an_arm_whose_kind_is_no_verb(capsys, tmp_path, monkeypatch):
    "`vlmrlhf run` starts arms by their verb; hours later it would find that there is none."
    no_stage(monkeypatch)
    monkeypatch.setitem(STAGES, "mine", STAGES["ppo"])
    own = tmp_path / "mine.yaml"
    for text in ("my: {kind: mine}", "evaluate: {arms: [mine], headline: mine, curve: }"):
        own.write_text(text + "\n")
        line = refused(capsys, "run", "--scale", own, "--out", tmp_path / "out")
        assert "kind='mine'" in line and "`help` in recipes/arms.yaml" in line, line
