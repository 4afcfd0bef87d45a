"""Files that are no picture are refused in one line; unusual pictures are simply read."""

import pytest
from picture_files import BAD_PICTURES, GOOD_PICTURES
from PIL import Image

from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.data.prompts import open_image


@pytest.mark.parametrize(
    "name",
    [
        *BAD_PICTURES,
        "missing.png",
        "folder",
        "nul\0.png",
        "http://example.org/cat.png",
        "scene:moon: small red cat @4",
        "scene:beach: small red cat @9",
        "scene:beach: small red dragon @4",
    ],
)
def test_bad_picture(tmp_path, name):
    (tmp_path / "folder").mkdir()
    ref = name if ":" in name else str(tmp_path / name)
    if name in BAD_PICTURES:
        (tmp_path / name).write_bytes(BAD_PICTURES[name])
    with pytest.raises(UserError) as e:
        open_image(ref)
    fault = "no such file" if name == "missing.png" or name.startswith("http") else "not a picture"
    assert str(e.value).startswith(f"{ref}: {fault}")
    assert "give a picture file" in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", GOOD_PICTURES)
def test_unusual_picture_is_simply_read(tmp_path, name):
    data, colour = GOOD_PICTURES[name]
    (tmp_path / name).write_bytes(data)
    image = open_image(str(tmp_path / name))
    assert image.mode == "RGB"
    assert image.size == (8, 8)
    assert all(abs(a - b) < 4 for a, b in zip(image.getpixel((3, 3)), colour))


@pytest.mark.parametrize(
    "orientation, corner", [*enumerate([(0, 0), (1, 0), (1, 1), (0, 1)] * 2, 1)]
)
def test_pictures_stand_upright(tmp_path, orientation, corner):
    """Cameras write pictures as the sensor lay. Where the first stored pixel belongs, and whether
    rows are columns: EXIF 2.3, tag 274."""
    stored, exif = Image.new("RGB", (6, 4), "blue"), Image.Exif()
    stored.putpixel((0, 0), (255, 0, 0))
    exif[274] = orientation
    stored.save(tmp_path / "camera.png", exif=exif)
    image = open_image(str(tmp_path / "camera.png"))
    assert image.size == ((6, 4) if orientation < 5 else (4, 6))
    place = corner[0] * (image.width - 1), corner[1] * (image.height - 1)
    assert image.getpixel(place) == (255, 0, 0)
