"The judge against the scenes themselves, and what augmentation may do to a true sentence."

import random

import pytest
from conftest import FAULTY, SCENE
from hypothesis import given
from hypothesis import strategies as st
from small_models import seeds

from vlmrlhf_course.data.prompts import KINDS
from vlmrlhf_course.world.hallucination import hallucinations
from vlmrlhf_course.world.judge import judge, summarise
from vlmrlhf_course.world.rubric import true_score, unsafe_claims
from vlmrlhf_course.world.scenes import (
    RESERVED,
    careless,
    describe,
    imagine,
    make_prompt,
    parse_scene,
    sample_scene,
    sample_scenes,
    split_of,
)


class TestUnsafeClaims:
    # a box, and the cells that lie in it as a whole
    crops = [
        ((0, 0, 1, 1), range(9)),
        ((0, 0, 1, 2 / 3), range(6)),
        ((1 / 3, 1 / 3, 1, 1), (4, 5, 7, 8)),
        ((0.05, 0.05, 0.95, 0.95), (4,)),
        ((0.5, 0.5, 0.6, 0.6), ()),
    ]

    @given(seeds, st.sampled_from(crops))
    def test_crops_against_the_judge(self, seed, crop):
        """Whatever the judge calls false in the cropped scene,
        or true there and false before, has been named."""
        box, cells = crop
        scene = sample_scene(random.Random(seed))
        left = type(scene)(scene.place, tuple(g for g in scene.groups if g.cell in cells))
        text = describe(imagine(scene, random.Random(seed + 1)))
        before = judge(text, scene)
        after = judge(text, left)
        named = unsafe_claims(text, scene, "crop", box)
        changed = [n for n in after.false_objects if n not in before.false_objects]
        assert set(changed) <= set(named)
        assert "count" in named or before.count_right == after.count_right
        for noun, _, value in set(before.true_attributes) - set(after.true_attributes):
            assert f"{value} {noun}" in named

    @pytest.mark.parametrize(
        "text, how, want",
        [
            ("a cat on a boat .", "vflip", ["cat on boat"]),
            ("a cat behind a boat .", "vflip", []),
            ("a kite above a cat .", "vflip", ["above"]),
            ("a cat on a boat .", "hflip", []),
            ("a cat left of a kite .", "hflip", ["left"]),
            ("a kite at the top right .", "crop", ["top", "right"]),
        ],
    )
    def test_words_and_relations(self, text, how, want):
        assert unsafe_claims(text, SCENE, how, (0.0, 1 / 3, 1.0, 1.0)) == want

    def test_a_crop_zooms(self):
        "Nothing is lost, and yet sizes may change; the whole picture changes nothing."
        found = unsafe_claims("a small red cat .", SCENE, "crop", (0.0, 0.2, 1.0, 1.0))
        assert found == ["small cat"]
        assert unsafe_claims(describe(SCENE), SCENE, "crop") == []
        with pytest.raises(ValueError, match="hflip"):
            unsafe_claims("", SCENE, "rotate")


@given(seeds)
def test_the_truth_is_judged_true(seed):
    scene = sample_scene(random.Random(seed))
    assert parse_scene(str(scene)) == scene
    v = judge(describe(scene), scene)
    assert not hallucinations(v)
    assert v.recall == 1
    assert v.count_right
    assert v.place_right
    assert not v.missed
    assert len(v.true_attributes) == 2 * len(scene.things)
    assert len(v.true_relations) == sum(g.other is not None for g in scene.groups)


@given(seeds)
def test_what_is_imagined_is_judged_by_comparison_of_scenes(seed):
    "The errors found in the text are the differences between the two scenes."
    rng = random.Random(seed)
    scene = sample_scene(rng)
    believed = imagine(scene, rng)
    v = judge(describe(believed), scene)
    true = {t.noun: t for t in scene.things}
    said = {t.noun: t for t in believed.things}
    assert set(v.false_objects) == said.keys() - true.keys()
    assert set(v.missed) == true.keys() - said.keys()
    both = said.keys() & true.keys()
    wrong_colours = sum(said[n].colour != true[n].colour for n in both)
    wrong_sizes = sum(said[n].size != true[n].size for n in both)
    assert len(v.false_attributes) == wrong_colours + wrong_sizes
    assert v.count_right is (len(said) == len(true))


@given(seeds, st.sampled_from(KINDS))
def test_careful_and_careless_answers(seed, kind):
    """A careful answer gets the full score; a careless one answers
    the same question, and text-only prompts stay as they are."""
    rng = random.Random(seed)
    p = make_prompt(sample_scene(rng), kind, rng)
    assert true_score(p, p.answer) == pytest.approx(10)
    c = careless(p, rng)
    assert (c.text, c.kind, c.image) == (p.text, p.kind, p.image) and c.answer.endswith(" .")
    assert (p.image is None) == (p.kind == "text") and (p.image is not None or c == p)


@given(st.text(max_size=60))
def test_any_text_can_be_judged(text):
    v = judge(text, SCENE)
    assert 0 <= v.recall <= 1 and v.length == len(text.split())


@pytest.mark.parametrize(
    "text, field, want",
    [
        ("a boat on a cat .", "false_relations", (("boat", "on", "cat"),)),
        ("a cat on a boat .", "true_relations", (("cat", "on", "boat"),)),
        ("a cat and a kite and a cat .", "false_objects", ()),
        ("a cat and a kite and a cat .", "repeats", ("cat",)),
        ("a fish and a fish .", "false_objects", ("fish", "fish")),
        ("a fish and a fish .", "repeats", ()),
        ("a blue boat . the boat is large .", "true_objects", ("boat",)),
        ("a blue boat . the boat is large .", "repeats", ()),
        ("the boat is small .", "false_attributes", (("boat", "size", "small"),)),
        ("a boat . the cat is on the boat .", "true_relations", (("cat", "on", "boat"),)),
        ("a boat is red and a cat .", "false_attributes", (("boat", "colour", "red"),)),
        ("there are three things . there are four things .", "count_right", False),
        ("there are three things . there are three things .", "count_right", True),
        ("a red fish on a boat .", "false_attributes", ()),
        ("a red fish on a boat .", "false_relations", ()),
        ("a large green boat .", "false_attributes", (("boat", "colour", "green"),)),
        ("there are four things .", "count_right", False),
        ("in this room scene", "place_right", False),
        ("a cat .", "count_right", None),
    ],
)
def test_judge(text, field, want):
    """`on` has a direction, a thing that is there may be named again, what is said about absent
    things is not judged again, and who hedges is wrong."""
    assert getattr(judge(text, SCENE), field) == want


def test_beside_has_no_direction():
    scene = parse_scene("room: small red cat beside large blue cup @0; small red ball @4")
    for text in ("a cat beside a cup .", "a cup beside a cat ."):
        assert not judge(text, scene).false_relations and judge(text, scene).true_relations
    assert judge("a cat beside a ball .", scene).false_relations


def test_summary_of_the_example():
    s = summarise([judge(FAULTY, SCENE), judge(describe(SCENE), SCENE)])
    assert s["chair_i"] == pytest.approx(1 / 6)
    assert s["chair_s"] == 0.5
    assert s["recall"] == pytest.approx(5 / 6)
    assert s["attribute_error"] == pytest.approx(1 / 10)
    assert s["relation_error"] == 0
    assert summarise([])["recall"] == 0


def test_repeats_are_true_mentions():
    "As in Rohrbach et al. 2018: they stand in the denominator; and have a figure of their own."
    s = summarise([judge("a cat , a cat , a cat and a fish .", SCENE)])
    assert (s["chair_i"], s["repeats"], s["recall"]) == (1 / 4, 2 / 4, 1 / 3)


def test_splits():
    for split in ("train", "validation", "test", "novel"):
        scenes = sample_scenes(25, split, 4)
        assert len({str(s) for s in scenes}) == 25
        assert {split_of(s) for s in scenes} == {split}
        assert scenes == sample_scenes(25, split, 4)
        things = [t for s in scenes for t in s.things]
        assert any(RESERVED[t.noun] == t.colour for t in things) == (split == "novel")
