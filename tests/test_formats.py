"""Records of public sets as rows: real columns, invented content, and every kind of damage.

Where the columns were looked up stands in Appendix U."""

import copy
import json
import math
import random

import pytest
from datasets import Dataset, load_dataset

from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.data.conversations import conversation
from vlmrlhf_course.data.formats import FORMATS, recognise, renamed, unused

PNG = dict(bytes=b"\x89PNG", path=None)
ROW = dict(image="a.jpg", prompt="What is on the mat?", chosen="A red cat.", rejected="A dog.")
ASKED = {"from": "human", "value": "<image>\nWhat is on the mat?"}
SAID = {"from": "gpt", "value": "A red cat."}
INNER = dict(question=ROW["prompt"], chosen=ROW["chosen"], rejected=ROW["rejected"])
META = dict(ds_name="d", origin_dataset="o", origin_split="s", image_path="a.jpg")


def parts(text, *before):
    return [*before, dict(type="text", text=text)]


def message(role, *content):
    return dict(role=role, content=content[0] if len(content) == 1 else [*content])


PICTURE = dict(type="image")
USER = message("user", *parts(ROW["prompt"], PICTURE))
GOOD = message("assistant", parts("A red cat."))
BAD = message("assistant", parts("A dog."))


def rated(response, *ratings):
    aspects = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")
    notes = {aspect: dict(Rating=r, Rationale="…") for aspect, r in zip(aspects, ratings)}
    return dict(annotations=notes, model="m", response=response)


COMPLETIONS = [rated("A red cat.", "5", "5", "5"), rated("A dog.", "1", "5", "1")]
COMPLETIONS += [rated("A cat.", "5", "5", "5")]
VLFEEDBACK = dict(id="v1", prompt=ROW["prompt"], models=["m"] * 3, img_path="a.jpg")
JUDGED = dict(id="l1", image="a.jpg", hallucination=True, preference=1)
JUDGED |= dict(conversations=[ASKED, {"from": "gpt", "value": ""}])
JUDGED |= dict(output_1={"from": "llava", "value": "A red cat."})
JUDGED |= dict(output_2={"from": "llava", "value": "A dog."})
DEMO = dict(image="a.jpg", prompt=ROW["prompt"], answer="A red cat.")
LATER = [{"from": "human", "value": "Which colour?"}, {"from": "gpt", "value": "Red."}]
PLAIN_USER = message("user", ROW["prompt"])

EXAMPLES = {  # name, or name/variant → record, rows
    "rlhf-v": (
        META | dict(image=PNG, idx=3, text=json.dumps(INNER)),
        [ROW | dict(image=PNG, id=3)],
    ),
    "rlhf-v/2023": (
        dict(dataset_name="d", image="train2014", text=INNER, image_path="a.jpg")
        | dict(origin_dataset="o", origin_split="b64", origin_split_inner_idx="3"),
        [ROW | dict(id="3")],
    ),
    "rlaif-v": (META | INNER | dict(image=PNG, idx="3"), [ROW | dict(image=PNG, id="3")]),
    "vlfeedback": (
        VLFEEDBACK | dict(completions=COMPLETIONS),
        [
            ROW | dict(weight=2.6667, id="v1"),
            ROW | dict(weight=2.6667, id="v1", chosen="A cat."),
        ],
    ),
    "llava-preference": (JUDGED, [ROW | dict(id="l1")]),
    "trl-preference": (dict(images=[PNG], prompt=[USER], chosen=[GOOD], rejected=[BAD]), None),
    "trl-implicit": (dict(images=["a.jpg"], chosen=[USER, GOOD], rejected=[USER, BAD]), [ROW]),
    "sharegpt-preference": (
        dict(conversations=[ASKED], images=["a.jpg"], chosen=SAID)
        | dict(rejected={"from": "gpt", "value": "A dog."}),
        [ROW],
    ),
    "pairs": (ROW | dict(weight=0.5, margin=0.1, id=7), [ROW | dict(weight=0.5, margin=0.1, id=7)]),
    "pairs/messages": (
        dict(images=["a.jpg"], messages=[PLAIN_USER], chosen="A red cat.", rejected=[BAD]),
        [ROW],
    ),
    "trl-completion": (dict(prompt=[USER], completion=[GOOD], images=["a.jpg"]), [DEMO]),
    "trl-messages": (dict(messages=[USER, GOOD], images=["a.jpg"]), [DEMO]),
    "llava-instruct": (dict(id="i1", image="a.jpg", conversations=[ASKED, SAID, *LATER]), None),
    "sharegpt": (
        dict(
            conversations=[{"from": "user", "value": "Hi."}, {"from": "assistant", "value": "Yes?"}]
        )
        | dict(system="Be brief."),
        None,
    ),
    "demonstrations": (DEMO, [DEMO]),
    "prompts": (
        dict(image="a.jpg", prompt=ROW["prompt"]),
        [dict(image="a.jpg", prompt=ROW["prompt"])],
    ),
}


def example(name):
    "Format, record and rows of an example."
    record, rows = EXAMPLES[name]
    return FORMATS[name.split("/")[0]], copy.deepcopy(record), rows


def test_every_format_has_an_example():
    assert {name.split("/")[0] for name in EXAMPLES} == set(FORMATS)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_recognised_and_read(name):
    format, record, rows = example(name)
    assert recognise(record) is format
    assert recognise(record, format.gives) is format
    found = format.rows(record)
    assert rows is None or found == rows
    assert found and all(fault_of(row, format.gives) is None for row in found)
    assert record == EXAMPLES[name][0], "a record is not changed"
    assert not set(unused(format, record)) & {*format.needs, *format.knows}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_table_in_between_changes_nothing(name, tmp_path):
    "Parquet knows no missing keys: they come back as null."
    format, record, _ = example(name)
    Dataset.from_list([record, record | dict(note="x")]).to_parquet(tmp_path / "a.parquet")
    table = load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), cache_dir=str(tmp_path))
    [back, _] = table["train"]
    assert recognise(back) is format
    assert format.rows(back) == format.rows(record)


def test_each_answer_is_shown_what_came_before():
    first, second = FORMATS["llava-instruct"].rows(EXAMPLES["llava-instruct"][0])
    assert first == DEMO | dict(id="i1")
    assert second["answer"] == "Red." and second["image"] == "a.jpg"
    assert second["prompt"] == [USER, GOOD, message("user", parts("Which colour?"))]


def test_a_system_text_of_its_own_column():
    [row] = FORMATS["sharegpt"].rows(EXAMPLES["sharegpt"][0])
    assert row["prompt"][0] == message("system", parts("Be brief.")) and row["answer"] == "Yes?"


def test_names_of_parquet_in_lists():
    "A sequence of records may come as a record of lists."
    record = copy.deepcopy(EXAMPLES["vlfeedback"][0])
    answers = record["completions"]
    record["completions"] = {key: [answer[key] for answer in answers] for key in answers[0]}
    assert recognise(record).name == "vlfeedback"
    assert FORMATS["vlfeedback"].rows(record) == EXAMPLES["vlfeedback"][1]


def test_ties_give_no_pair():
    record = EXAMPLES["vlfeedback"][0] | dict(completions=[COMPLETIONS[0], COMPLETIONS[2]])
    assert FORMATS["vlfeedback"].rows(record) == []


@pytest.mark.parametrize(
    "name, change, fault",
    [
        ("rlhf-v", dict(text="{'question': 1}"), "text is no JSON"),
        ("rlhf-v", dict(text='{"question": "?", "chosen": "A.", "rejected": null}'), "rejected is"),
        ("rlhf-v", dict(text='{"question": "\\ud83d", "chosen": "", "rejected": ""}'), "surrogate"),
        ("rlaif-v", dict(question=3), "question is a number, and text is wanted"),
        ("rlaif-v", dict(question="<image> and <image>?"), "2 places for pictures"),
        ("rlaif-v", dict(image=None, image_path=""), "image_path is empty"),
        ("vlfeedback", dict(completions=[rated("A cat.", "N/A")]), "is rated 'N/A'"),
        ("vlfeedback", dict(completions=[rated("A cat.")]), "has no annotations"),
        ("llava-preference", dict(preference=0), "preference is 0, and 1 or 2 says"),
        ("llava-preference", dict(preference=3), "preference is 3, and 1 or 2 says"),
        ("llava-preference", dict(conversations=[SAID]), "conversations"),
        ("trl-preference", dict(chosen=[USER, GOOD]), "chosen is a talk of user, assistant"),
        ("trl-preference", dict(prompt=[GOOD]), "the user first"),
        ("trl-preference", dict(prompt=[USER, USER]), "wanted is a system text if any"),
        ("trl-preference", dict(prompt=[message("tool", "4")]), "has the role 'tool'"),
        ("trl-implicit", dict(chosen=[message("user", "?"), GOOD]), "share no beginning"),
        ("trl-implicit", dict(chosen=[USER, GOOD, USER, GOOD]), "differ in more than"),
        ("pairs", dict(weight=math.nan), "weight is nan and no finite number"),
        ("pairs", dict(chosen=["A cat."]), "chosen is text, and a message is wanted"),
        ("pairs", dict(images=["a.jpg"]), "in image and in images"),
        ("trl-messages", dict(messages=[]), "messages is empty"),
        ("trl-messages", dict(messages=[USER]), "nobody answers"),
        ("llava-instruct", dict(image=None), "1 places for pictures in the text"),
        ("prompts", dict(prompt=None), "prompt is missing or null"),
    ],
)
def test_a_fault_is_a_sentence(name, change, fault):
    format, record, _ = example(name)
    with pytest.raises(ValueError, match="^" + ".*" + fault.replace("(", r"\(")):
        format.rows(record | change)


# --- recognising ----------------------------------------------------------------------------------


def test_a_judged_completion_is_no_demonstration():
    "TRL's unpaired preferences and LLaMA-Factory's `kto_tag`: the answer may be the bad one."
    unpaired = dict(prompt=ROW["prompt"], completion="A dog.", label=False)
    with pytest.raises(UserError, match="nearest are trl-completion .has its columns"):
        recognise(unpaired, "demonstrations")
    with pytest.raises(UserError):
        recognise(EXAMPLES["sharegpt"][0] | dict(kto_tag=False))


@pytest.mark.parametrize(
    "columns", [{}, dict(a=1), dict(question="?", answer="Yes."), dict(text="{")]
)
def test_what_is_unknown_is_said_with_remedies(columns):
    with pytest.raises(UserError) as e:
        recognise(columns)
    said = str(e.value)
    assert all(name in said for name in columns) and "nearest are" in said
    assert "--format" in said and "data.columns" in said


def test_own_names_of_columns():
    record = dict(question="What is on the mat?", picture="a.jpg", solution="A red cat.")
    mapped = renamed(record, dict(prompt="question", image="picture", answer="solution"))
    assert recognise(mapped, "prompts").rows(mapped) == [DEMO]
    with pytest.raises(ValueError, match="no column 'query', wanted as prompt; the columns are q"):
        renamed(record, dict(prompt="query"))


# --- damage ---------------------------------------------------------------------------------------

JUNK = (
    *(None, 0, 3, -1.5, math.nan, math.inf, 10**400, True, "", " ", "text", "{", "N/A"),
    *("<image>", "<image>\n<image> x", "\ud83d", [], {}, [None], ["a"], [[]], ("a",)),
    *({"role": "user"}, {"from": ["x"], "value": ["y"]}, {"role": ["user"], "content": 3}),
    *(b"", b"x", object(), {"type": "image"}, {"type": "text", "text": None}),
)


def places(value):
    "Every place in a record: (container, key)."
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(entries):
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from places(inner)


def damage(record, rng):
    "The record with one to three things wrong in it."
    for _ in range(rng.randint(1, 3)):
        container, key = rng.choice(list(places(record)) or [(record, "prompt")])
        kind = rng.choice(("replace", "delete", "double", "reverse"))
        if kind == "delete" and key in (container if isinstance(container, dict) else ()):
            del container[key]
        elif kind == "double" and isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        elif kind == "reverse" and isinstance(container, list):
            container.reverse()
        else:
            container[key] = copy.deepcopy(rng.choice(JUNK))
    return record


def fault_of(row, gives):
    "What is wrong with a row's shape, or None."
    answers = dict(pairs=("chosen", "rejected"), demonstrations=("answer",), prompts=())[gives]
    optional = {"weight", "margin", "id", "answer"}
    if not {"image", "prompt", *answers} <= set(row) <= {"image", "prompt", *answers} | optional:
        return "keys"
    pictures = row["image"] if isinstance(row["image"], list) else [row["image"]]
    pictures = [] if row["image"] is None else pictures
    if isinstance(row["image"], list) and len(pictures) < 2:
        return "one picture in a list"
    if any(p is None or isinstance(p, (bool, int, float, list, tuple)) for p in pictures):
        return "picture"
    texts = [row[key] for key in answers]
    if isinstance(row["prompt"], list):
        if conversation(row["prompt"]) != row["prompt"] or row["prompt"][-1]["role"] != "user":
            return "messages"
        shown = [part for turn in row["prompt"] for part in turn["content"]]
        if sum(part == PICTURE for part in shown) != len(pictures):
            return "as many places as pictures"
    else:
        texts.append(row["prompt"])
    if not all(isinstance(text, str) and text.strip() and text.encode() for text in texts):
        return "text"
    numbers = [row.get("weight", 1), row.get("margin", 1)]
    return None if all(math.isfinite(n) for n in numbers) else "numbers"


@pytest.mark.parametrize("name", EXAMPLES)
def test_damage_gives_rows_or_a_sentence(name):
    rng, refused = random.Random(name), 0
    for _ in range(400):
        format, record, _ = example(name)
        damaged = damage(record, rng)
        try:
            rows = format.rows(damaged)
        except ValueError as e:
            refused += 1
            assert 10 < len(str(e)) < 300, e
        else:
            assert all(fault_of(row, format.gives) is None for row in rows), damaged
        try:
            recognise(damaged)
        except UserError:
            pass
    assert 50 < refused < 400
