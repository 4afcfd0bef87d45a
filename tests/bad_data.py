"""Files of other people that are wrong: what stands in them, and what must be said (`|`: or).

A table of records, each among good ones of its format. `bad_files` has whole files."""

import copy
import io
import json
import math
import os
import zlib
from pathlib import Path

from PIL import Image as Pillow
from test_formats import BAD, EXAMPLES, GOOD, PICTURE, SAID, USER, message, rated

N = 6  # records of a file
NAMES = "rlhf-v rlaif-v vlfeedback llava-preference trl-preference trl-implicit llava-instruct"
NAMES += " prompts pairs demonstrations"


def png(size=(32, 32), colour="red") -> bytes:
    file = io.BytesIO()
    Pillow.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def good(name: str, i: int) -> dict:
    "The example of a format, with a picture that is there; `i` tells records apart."
    record = copy.deepcopy(EXAMPLES[name][0])
    if name in ("trl-preference", "trl-implicit", "trl-messages"):
        record["images"] = ["a.png"]
    else:
        record |= dict(image="a.png")
    key = {"rlhf-v": "idx", "rlaif-v": "idx", "trl-preference": "note"}.get(name, "id")
    return record | {key: f"r{i}"}


def folder_of_pictures(folder: Path):
    "Good ones, and what else a name may lead to."
    (folder / "a.png").write_bytes(png())
    (folder / "cut.png").write_bytes(png((300, 300))[:200])
    (folder / "text.png").write_text("a cat")
    (folder / "empty.png").write_bytes(b"")
    (folder / "page.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (folder / "folder.png").mkdir()
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "away.png").symlink_to("nowhere.png")
    (folder / "bomb.png").write_bytes(bomb())
    os.mkfifo(folder / "pipe.png")


def bomb() -> bytes:
    "A few kilobytes that say they are four thousand million pixels."
    data = bytearray(png())
    data[16:24] = (2**16).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


def inner(**change) -> dict:
    "RLHF-V's column `text`, changed."
    return dict(text=json.dumps(json.loads(EXAMPLES["rlhf-v"][0]["text"]) | change))


def talk(*roles: str) -> list[dict]:
    return [{"from": role, "value": f"text {i}"} for i, role in enumerate(roles)]


def rating(value) -> dict:
    return dict(completions=[rated("A red cat.", "5"), rated("A dog.", value)])


def asked(*content) -> dict:
    return dict(prompt=[dict(role="user", content=[*content])])


TEXT = dict(type="text", text="What is this?")
DEEP = json.loads("[" * 300 + "]" * 300)
# format, what is changed in a record, words of the fault
RECORDS = [
    ("rlhf-v", dict(text="{'question': 'what?'}"), "text is no JSON"),
    ("rlhf-v", dict(text="[1, 2]"), "text is a list, and question"),
    ("rlhf-v", dict(text=""), "text is no JSON"),
    ("rlhf-v", dict(text=None), "text is missing or null"),
    ("rlhf-v", dict(text=7), "text is a number"),
    ("rlhf-v", inner(chosen=None), "chosen is missing or null"),
    ("rlhf-v", inner(rejected=""), "rejected is empty"),
    ("rlhf-v", inner(question=["What?"]), "question"),
    ("rlhf-v", inner(chosen="A dog."), "chosen equals rejected"),
    ("rlhf-v", inner(chosen="<image> a cat."), "<image>"),
    ("rlhf-v", dict(idx=[1]), "id is a list"),
    ("rlaif-v", dict(chosen=3), "chosen is a number"),
    ("rlaif-v", dict(chosen=None), "chosen is missing or null"),
    ("rlaif-v", dict(question=" \n"), "question is empty"),
    ("rlaif-v", dict(rejected="A  red cat."), "chosen equals rejected"),
    ("rlaif-v", dict(question="<image> or <image>?"), "2 places for pictures"),
    ("rlaif-v", dict(question="\ud83d what?"), "surrogate"),
    ("rlhf-v", dict(video="cat.mp4"), "video: films and sounds are not read"),
    ("rlaif-v", dict(audio=dict(path="cat.wav", bytes=None)), "audio: films and sounds"),
    ("vlfeedback", dict(videos=["cat.mp4"]), "videos: films"),
    ("llava-preference", dict(video="cat.mp4"), "video: films"),
    ("trl-preference", dict(videos=["cat.mp4"]), "videos: films"),
    ("trl-implicit", dict(videos=["cat.mp4"]), "videos: films"),
    ("llava-instruct", dict(video="cat.mp4"), "video: films"),
    ("pairs", dict(audios=["cat.wav"]), "audios: films"),
    ("demonstrations", dict(video="cat.mp4"), "video: films"),
    ("prompts", dict(video="cat.mp4"), "video: films"),
    ("rlaif-v", dict(image="http://a.org/a.png"), "nothing is fetched"),
    ("rlaif-v", dict(image="s3://bucket/a.png"), "nothing is fetched"),
    ("rlaif-v", dict(image="nowhere.png"), "nowhere.png"),
    ("rlaif-v", dict(image="folder.png"), "directory"),
    ("rlaif-v", dict(image="cut.png"), "cut.png"),
    ("rlaif-v", dict(image="text.png"), "text.png: not a picture"),
    ("rlaif-v", dict(image="empty.png"), "empty.png: not a picture"),
    ("rlaif-v", dict(image="page.svg"), "page.svg: not a picture"),
    ("rlaif-v", dict(image="bomb.png"), "pixels"),
    ("rlaif-v", dict(image="pipe.png"), "not a regular file"),
    ("rlaif-v", dict(image="circle.png"), "circle.png"),
    ("rlaif-v", dict(image="away.png"), "away.png"),
    ("rlaif-v", dict(image="/dev/zero"), "not a regular file"),
    ("rlaif-v", dict(image="~nobody-is-here/a.png"), "nobody-is-here"),
    ("rlaif-v", dict(image="a\0.png"), "picture"),
    ("rlaif-v", dict(image="x" * 5000), "too long"),
    ("rlaif-v", dict(image="data:image/png;base64,AAAA"), "not a picture"),
    ("rlaif-v", dict(image="data:image/png"), "no comma"),
    ("rlaif-v", dict(image="file://elsewhere/a.png"), "another machine"),
    ("rlaif-v", dict(image=7), "image is a number"),
    ("rlaif-v", dict(image=""), "image is empty"),
    ("rlaif-v", dict(image=[["a.png"]]), "image is a list"),
    ("rlaif-v", dict(image=dict(bytes="!!", path=None)), "not a picture"),
    ("rlaif-v", dict(image=dict(width=4, height=4)), "a picture is a dict|neither"),
    ("rlaif-v", dict(image=dict(bytes=None, path=None)), "without a path or bytes"),
    ("vlfeedback", dict(completions=[]), "completions is empty"),
    ("vlfeedback", dict(completions=None), "completions is missing or null"),
    ("vlfeedback", dict(completions="A cat."), "completions is text"),
    ("vlfeedback", dict(completions=[None, None]), "completions[0] is missing or null"),
    ("vlfeedback", dict(completions=[rated("A red cat.", "5")]), "one answer"),
    ("vlfeedback", rating("N/A"), "is rated 'N/A'"),
    ("vlfeedback", rating(6), "is rated 6"),
    ("vlfeedback", rating(math.nan), "is rated nan"),
    ("vlfeedback", rating(None), "is rated None"),
    ("vlfeedback", dict(completions=[rated("A dog.", 5), rated("A dog.", 1)]), "chosen equals"),
    ("vlfeedback", dict(completions=[rated(None, 5), rated("A dog.", 1)]), "response, is missing"),
    ("vlfeedback", dict(prompt=None), "prompt is missing or null"),
    ("llava-preference", dict(preference=0), "preference is 0"),
    ("llava-preference", dict(preference=3), "preference is 3"),
    ("llava-preference", dict(preference="both"), "preference is 'both'"),
    ("llava-preference", dict(preference=None), "preference is None"),
    ("llava-preference", dict(preference=math.nan), "preference is nan"),
    ("llava-preference", dict(output_1=None), "chosen is missing or null"),
    ("llava-preference", dict(output_2={"from": "llava"}), "rejected is missing or null"),
    ("llava-preference", dict(output_2={"value": "A red cat."}), "chosen equals rejected"),
    ("llava-preference", dict(conversations=[]), "conversations is empty"),
    ("llava-preference", dict(conversations=talk("human", "human")), "the roles user, user"),
    ("llava-preference", dict(image=None), "1 places for pictures"),
    ("trl-preference", dict(prompt=[USER, USER]), "the user first"),
    ("trl-preference", dict(prompt=[GOOD, USER]), "the user first"),
    ("trl-preference", dict(prompt=[message("tool", "4"), USER]), "the role 'tool'"),
    ("trl-preference", dict(prompt=[message("system", "Be brief.")]), "system"),
    ("trl-preference", dict(prompt=[dict(role="user", content=None)]), "prompt[0]"),
    ("trl-preference", dict(prompt=[dict(role="user", content=7)]), "prompt[0] is a number"),
    ("trl-preference", asked(), "prompt[0]"),
    ("trl-preference", asked(None), "neither text nor a picture"),
    ("trl-preference", asked(dict(type="video"), TEXT), "nor a picture ('video')"),
    ("trl-preference", asked(dict(type="text", text=None)), "its text, is missing"),
    ("trl-preference", asked(PICTURE), "pictures and no text"),
    ("trl-preference", asked(PICTURE, PICTURE, TEXT), "2 places for pictures"),
    ("trl-preference", dict(images=["a.png"] * 3), "1 places for pictures in the text"),
    ("trl-preference", dict(images=["a.png", None]), "images is missing or null"),
    ("trl-preference", dict(images={}), "images"),
    ("trl-preference", dict(chosen=[USER, GOOD]), "a talk of user, assistant"),
    ("trl-preference", dict(chosen=[]), "chosen is empty"),
    ("trl-preference", dict(chosen=[message("user", "A cat.")]), "one answer is wanted"),
    ("trl-preference", dict(rejected=[GOOD]), "chosen equals rejected"),
    (
        "trl-preference",
        dict(rejected=[message("assistant", PICTURE)]),
        "only users can|is a record",
    ),
    ("trl-implicit", dict(chosen=[message("user", "Why?"), GOOD]), "share no beginning"),
    ("trl-implicit", dict(chosen=[USER, GOOD], rejected=[USER, GOOD]), "chosen equals rejected"),
    ("trl-implicit", dict(chosen=[USER, GOOD, USER], rejected=[USER, BAD, USER]), "differ in more"),
    ("trl-implicit", dict(rejected=[USER, message("assistant", "")]), "is empty"),
    ("trl-implicit", dict(rejected=None), "rejected is missing or null"),
    ("llava-instruct", dict(conversations=talk("gpt", "human")), "the user first"),
    ("llava-instruct", dict(conversations=talk("human", "gpt", "human")), "nobody answers"),
    ("llava-instruct", dict(conversations=talk("human", "robot")), "the role 'robot'"),
    ("llava-instruct", dict(conversations=[]), "conversations is empty"),
    ("llava-instruct", dict(conversations="Hello."), "conversations is text"),
    ("llava-instruct", dict(conversations=[{"from": "human"}, SAID]), "missing or null"),
    ("llava-instruct", dict(conversations=[{"value": "Hi."}, SAID]), "the role None"),
    ("llava-instruct", dict(image="nowhere.png"), "nowhere.png"),
    ("prompts", dict(prompt=None), "prompt is missing or null"),
    ("prompts", dict(prompt=""), "prompt is empty"),
    ("prompts", dict(prompt=1.5), "prompt is a number"),
    ("prompts", dict(prompt="<image> what?", image=None), "1 places for pictures"),
    ("pairs", dict(weight=math.nan), "weight is nan"),
    ("pairs", dict(weight=0), "weight is not positive"),
    ("pairs", dict(weight=-1.0), "weight is not positive"),
    ("pairs", dict(weight=1e300), "weight is 1e+300"),
    ("pairs", dict(weight="high"), "weight is 'high'"),
    ("pairs", dict(weight=True), "weight is true or false"),
    ("pairs", dict(margin=math.inf), "margin is inf"),
    ("pairs", dict(id=dict(a=1)), "id is a record"),
    ("pairs", dict(images=["a.png"]), "in image and in images"),
    ("pairs", dict(chosen=DEEP), "chosen"),
    ("demonstrations", dict(answer=None), "answer is missing or null"),
    ("demonstrations", dict(answer=["Yes."]), "answer"),
]
