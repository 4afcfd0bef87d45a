"Careless annotators, the words of theirs that are false, and the grey square."

import random
from dataclasses import replace

import pytest
from conftest import SCENE

from vlmrlhf_course.data.prompts import open_image
from vlmrlhf_course.world.scenes import (
    NUMBERS,
    WorldConfig,
    careless,
    imagine,
    make_prompt,
    parse_scene,
    sample_scenes,
)
from vlmrlhf_course.world.source import false_words

FAULTS = ("omit", "signature", "invent", "wrong_colour", "wrong_size", "wrong_relation")
FAULTLESS = WorldConfig(**dict.fromkeys(FAULTS, 0.0))


@pytest.mark.parametrize("kind", ["detail", "brief", "exists", "count", "colour", "relation"])
def test_who_makes_no_mistakes_answers_as_it_is(kind):
    rng = random.Random(0)
    for scene in sample_scenes(20, "train"):
        prompt = make_prompt(scene, kind, rng)
        assert careless(prompt, rng, FAULTLESS) == prompt


def test_an_answer_is_about_what_was_imagined():
    "Each kind of question is answered from one and the same imagined scene."
    cfg = replace(FAULTLESS, omit=0.4, wrong_colour=0.5)
    changed = set()
    for i, scene in enumerate(sample_scenes(60, "train")):
        believed = imagine(scene, random.Random(i), cfg)
        for kind in ("exists", "count", "colour"):
            prompt = make_prompt(scene, kind, random.Random(i))
            said = careless(prompt, random.Random(i), cfg).answer
            noun = prompt.text.split()[-2]
            thing = believed.find(noun)
            if kind == "count":
                want = f"{NUMBERS[len(believed.things)]} ."
            elif kind == "exists":
                want = "yes ." if thing else "no ."
            else:
                want = f"{thing.colour} ." if thing else prompt.answer
            assert said == want
            changed |= {kind} if said != prompt.answer else set()
    assert changed == {"exists", "count", "colour"}


@pytest.mark.parametrize(
    "settings, fits",
    [
        (dict(max_invented=2), True),
        (dict(max_invented=3), False),
        (dict(max_invented=3, signature=0.0), True),
        (dict(max_invented=9, invent=0.0), True),
        (dict(max_groups=4), False),
        (dict(max_groups=4, pair=0.0), True),
    ],
)
def test_nobody_has_to_count_beyond_nine(settings, fits):
    if fits:
        WorldConfig(**settings)
    else:
        with pytest.raises(ValueError, match="nine"):
            WorldConfig(**settings)


MARKED = {
    "a small red cat on a large blue boat .": "",
    "a small red cat on a large blue boat and a small white fish .": "fish",
    "a small red cat beside a large blue boat .": "cat beside boat",
    "a fish and a fish .": "fish fish",
    "a green cat .": "green cat",
    "a large red cat and a large white fish on a large yellow kite .": "large cat fish",
    "there are three things .": "",
    "there are four things .": "four",
}


@pytest.mark.parametrize("text", MARKED)
def test_words_of_false_claims(text):
    "A claim's words are the last ones of that name before it was complete."
    scene = parse_scene("beach: small red cat on large blue boat @4; large yellow kite @7")
    marks = false_words(text, scene)
    assert len(marks) == len(text.split())
    assert " ".join(w for w, false in zip(text.split(), marks) if false) == MARKED[text]


def test_the_grey_square_is_grey():
    assert open_image("blank", 8).getcolors() == [(64, (128, 128, 128))]
    assert open_image(f"scene:{SCENE}", 8).size == (8, 8)
