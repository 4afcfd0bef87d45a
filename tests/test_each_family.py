"""Some families on some public formats, each by one command; `each_family.py` tries all of them."""

import pytest
from each_family import table


@pytest.mark.parametrize("part", ["qwen2_5_vl/rlhf-v", "internvl/llava-preference"])
def test_from_a_public_format_to_a_policy_that_others_load(part, tmp_path):
    [found] = table(tmp_path, (part,), n=120)
    assert found["accuracy"] > 0.6, "chance is one half"
    assert part.split("/")[1] in (tmp_path / "table.md").read_text("utf-8")
