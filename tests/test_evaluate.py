"Evaluation: intervals against theory and simulation, greedy answers, and what the report of the smoke run holds."
import json

import pytest
import torch
from conftest import SCENE, SMALL
from hypothesis import given
from hypothesis import strategies as st

from vlmrlhf_course.report.evaluate import COLUMNS, NAMES, bootstrap_interval, detail_prompts, figures, report_html, speak_greedily, text_table
from vlmrlhf_course.train.reward import RewardConfig, RewardModel
from vlmrlhf_course.model.vlm import VLM, LoRAConfig, answer, build_model, build_processor, token_logprobs
from vlmrlhf_course.world.scenes import describe, sample_scenes


class TestBootstrap:
    def test_of_a_mean_is_that_of_the_normal_theory(self):
        x = torch.randn(2000, generator=torch.Generator().manual_seed(0)).double()
        for level, z in ((.95, 1.96), (.5, .674)):
            low, high = bootstrap_interval(x, torch.ones(2000), draws=4000, level=level)
            assert high - low == pytest.approx(2 * z * float(x.std()) / 2000 ** .5, rel=.07) and low < float(x.mean()) < high

    def test_of_a_ratio_is_that_of_the_delta_method(self):
        g = torch.Generator().manual_seed(1)
        b = torch.randint(1, 7, (1500,), generator=g).double()
        a = torch.binomial(b, torch.rand(1500, generator=g).double(), generator=g)
        r = float(a.sum() / b.sum())
        std = float((a - r * b).std()) / (float(b.mean()) * 1500 ** .5)
        low, high = bootstrap_interval(a, b, draws=4000)
        assert low < r < high and high - low == pytest.approx(2 * 1.96 * std, rel=.07)

    @given(st.integers(0, 10 ** 6))
    def test_pictures_are_drawn_whole(self, seed):
        "With the same rate in every picture nothing is left to chance, however unequal the pictures are."
        b = torch.randint(1, 9, (12,), generator=torch.Generator().manual_seed(seed))
        assert bootstrap_interval(.25 * b, b, draws=50, seed=seed) == pytest.approx((.25, .25))

    def test_nothing_was_mentioned(self): assert bootstrap_interval(torch.zeros(4), torch.zeros(4)) == (0., 0.)

    def test_repeats_with_its_seed(self):
        x = torch.arange(30.)
        assert bootstrap_interval(x, torch.ones(30), seed=3) == bootstrap_interval(x, torch.ones(30), seed=3) != bootstrap_interval(x, torch.ones(30), seed=4)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    vlm = VLM(build_model(SMALL).requires_grad_(False), build_processor(SMALL))
    with torch.no_grad(): vlm.model.lm_head.weight.mul_(4)   # random weights with an opinion
    return vlm, RewardModel(vlm, RewardConfig(lora=LoRAConfig(r=4, alpha=8))).requires_grad_(False)


def test_greedy_answers_and_their_kl(small):
    vlm, _ = small
    scenes = sample_scenes(5, seed="greedy")
    said, kl = speak_greedily(vlm, scenes)
    assert said == answer(vlm, detail_prompts(scenes), 0.) == speak_greedily(vlm, scenes)[0]
    alone = []
    for p, a in zip(detail_prompts(scenes), said):   # one answer after the other: the chance that the reference says exactly this
        b = vlm.batch([p], [a])
        alone.append(-float(token_logprobs(vlm.rule_out(vlm.answer_logits(b)), b.answers).sum()))
    assert kl == pytest.approx(sum(alone) / 5, rel=1e-4) and kl > 0


def test_figures(small):
    scenes = [SCENE] * 6
    f = figures(scenes, ["a cat and a fish .", describe(SCENE)] * 3, small[1], 1.5)
    assert f["chair_i"] == pytest.approx(1 / 5) and 0 <= f["chair_i_low"] < 1 / 5 < f["chair_i_high"] < .5 and f["kl"] == 1.5
    assert f["overall"] == pytest.approx(.5 * f["chair_i"])


def test_tables_show_greedy_rows_and_the_interval():
    row = dict.fromkeys(COLUMNS, .25) | dict(chair_i=.125, chair_i_low=.1, chair_i_high=.16, length=28.)
    result = {k: row for k in NAMES} | dict(reward_model=dict(pair_accuracy=.75), pope={k: dict(accuracy=.5, yes_rate=.03) for k in ("sft", "ppo")})
    lines = text_table(result).splitlines()
    assert len(lines) == 1 + len(NAMES) and all("0.125 ± 0.030" in line and "28.00" in line for line in lines[1:])
    assert any(line.startswith("SFT, greedy") for line in lines) and any(line.startswith("PPO + penalty, greedy") for line in lines)
    page = report_html(result, {k: ["a cat and a fish ."] for k in ("sft", "ppo")}, [SCENE], {}, 1)
    assert page.count("0.125 ± 0.030") == len(NAMES) and "<mark>fish</mark>" in page and "yes-rate 0.030" in page and "SFT, greedy" in page


def test_report_of_a_run(smoke_run):
    report, page = json.loads((smoke_run / "report.json").read_text()), (smoke_run / "report.html").read_text()
    for policy in NAMES:
        f = report[policy]
        assert f["chair_i_low"] <= f["chair_i"] <= f["chair_i_high"] and all(isinstance(f[c], (int, float)) and f[c] == f[c] for c in COLUMNS), policy
        assert NAMES[policy] in page
    assert report["sft_greedy"]["kl"] > 0 < report["ppo_greedy"]["kl"], "one answer is never as wide as the reference"
    assert {"accuracy", "yes_rate"} <= report["pope"]["sft"].keys() and "±" in page and "POPE" in page
    assert {"kl", "reward", "true_score"} == report["over_optimisation"].keys()
