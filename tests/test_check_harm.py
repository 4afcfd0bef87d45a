"What only hard cases show, and right code that does harm: side effects, calls of reduce."

import copy

import pytest
import torch
from conftest import REPO
from test_check import own_progress, refused  # noqa: F401  (a fixture)

from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.classroom.check import case, hint, note, overview, statements
from vlmrlhf_course.classroom.compare import difference
from vlmrlhf_course.classroom.items import CASES, exercise_of, mistakes_of, with_mistake
from vlmrlhf_course.rl.advantages import whiten
from vlmrlhf_course.train.parts import consistency
from vlmrlhf_course.train.reward import swap_pictures
from vlmrlhf_course.world.rubric import annotate


def unstable_logprobs(logits, tokens, temperature=1.0):
    half = logits.dtype in (torch.float16, torch.bfloat16)
    chances = ((logits.float() if half else logits) / temperature).softmax(-1)
    return chances.log().gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def test_what_only_a_hard_case_shows_is_refused_with_its_words():
    said = refused("token_logprobs", unstable_logprobs)
    item = exercise_of("token_logprobs")
    number = next(n for n in range(CASES, item.cases) if "float32" in item.what(n))
    assert f"case {number + 1} of {item.cases} ({item.what(number)}): " in said
    assert "comes out if the logarithm is taken of a softmax that has become 0." in said
    assert f'case("token_logprobs", {number + 1}) gives them' in said


def test_a_case_can_be_had_by_its_number():
    "The very one that the check used; by the exercise's number, too."
    function = mistakes_of("gae")[0]
    said = refused("gae", with_mistake(exercise_of("gae"), function))
    number = int(said.split("case ")[1].split()[0])
    given = case("gae", number)
    assert difference(given, exercise_of("gae").case(0, number - 1)) is None
    assert difference(case("7.1", number), given) is None
    assert difference(case("gae", 1, seed=3), given) is not None
    for wrong in (0, exercise_of("gae").cases + 1):
        with pytest.raises(UserError, match="its cases are 1 to"):
            case("gae", wrong)


def test_long_rows_are_drawn():
    cases = [case("gae", n + 1) for n in range(exercise_of("gae").cases)]
    assert max(given["mask"].sum(1).max() for given in cases) > 256


def switches_off(**given):
    torch.set_grad_enabled(False)
    return whiten(**given)


def seeds(**given):
    torch.manual_seed(0)
    return whiten(**given)


def hands_back(rows):
    return [new if row["image"] else row for row, new in zip(rows, swap_pictures(rows))]


def draws_from_a_copy(scores, noise, rng):
    return annotate(scores, noise, copy.deepcopy(rng))


HARM = {
    "gradients": ("whiten", switches_off, "the switch of gradients is left otherwise"),
    "chance": ("whiten", seeds, "PyTorch's source of chance is left otherwise than it was"),
    "a dict": (
        "swap_pictures",
        hands_back,
        "a new dict is asked for, the result holds one of rows",
    ),
    "a copy": ("annotate", draws_from_a_copy, "rng ends elsewhere: draw from it itself"),
}


@pytest.mark.parametrize("name, function, words", HARM.values(), ids=HARM)
def test_right_code_that_does_harm_is_refused(name, function, words):
    "And the harm is undone."
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert words in refused(name, function)
    assert torch.is_grad_enabled() and torch.equal(torch.get_rng_state(), before)


def test_a_caller_s_set_is_not_changed():
    def shrinking(image, text, mentioned, detected):
        found = consistency(image, text, mentioned, detected)
        mentioned &= detected
        return found

    assert "mentioned is changed in place" in refused("consistency", shrinking)


@pytest.mark.parametrize("name", ["whiten", "mean_and_deviation"])
def test_who_waits_for_nobody_lets_all_others_wait(name):
    "Skipped by a process that holds nothing, or asked for once more: both are said."
    wrong = [m for m in mistakes_of(name) if "asks nobody" in m.what or "too often" in m.what]
    said = [refused(name, with_mistake(exercise_of(name), m)) for m in wrong]
    assert len(said) == 2
    for text, mistake in zip(said, wrong):
        assert mistake.what in text and ("reduce is called" in text or name != "whiten")


def test_a_hint_by_number_and_for_one_of_two_functions(capsys):
    hint("7.5")
    hint(8.1)
    hint("most_diverse")
    said = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in said] == ["token_rewards", "full_kl", "most_diverse"]
    stated = statements()
    for one, other in (("dedupe", "most_diverse"), ("prompt_lengths", "length_groups")):
        assert stated[one]["number"] == stated[other]["number"]
        assert not {*stated[one]["hints"]} & {*stated[other]["hints"]}


def test_what_comes_next_is_easy():
    "First what the README names; then the earliest of the easiest."
    assert "Next: 7.5 `token_rewards`" in overview()
    assert "first 7.5 in `07_advantages.ipynb`" in (REPO / "README.md").read_text("utf-8")
    note("token_rewards", done=True)
    name = overview().split("Next: ")[1].split("`")[1]
    assert statements()[name]["stars"] == 1
