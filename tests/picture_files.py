"""Picture files, bad and unusual ones, of our own making."""

import io
import struct
import zlib

from PIL import Image


def png(width, height, data=b""):
    "A PNG file of our own making, which may lie."

    def chunk(name, body):
        length, checksum = len(body), zlib.crc32(name + body)
        return struct.pack(">I", length) + name + body + struct.pack(">I", checksum)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


def encoded(image, kind, **settings):
    "A picture as the bytes of a file."
    out = io.BytesIO()
    image.save(out, kind, **settings)
    return out.getvalue()


NOISE = Image.effect_noise((64, 64), 50).convert("RGB")

BAD_PICTURES = {
    "empty.png": b"",
    "text.png": b"hello",
    "zero.png": png(0, 0),
    "zero-wide.png": png(0, 5),
    "bomb.png": png(60_000, 60_000, b"0" * 100),
    "cut.png": encoded(NOISE, "PNG")[:600],
    "cut.jpg": encoded(NOISE, "JPEG")[:600],
    "header-only.png": encoded(NOISE, "PNG")[:40],
    "damaged.png": encoded(NOISE, "PNG")[:200] + b"x" * 60 + encoded(NOISE, "PNG")[260:],
    "cut.gif": encoded(NOISE, "GIF")[:100],
}


def plain(mode, colour):
    "A picture of one colour."
    return Image.new(mode, (8, 8), colour)


RED, BLUE = plain("RGB", "red"), plain("RGB", "blue")
ANIMATED = dict(save_all=True, append_images=[BLUE])
GOOD_PICTURES = {  # bytes, and the colour that must come out
    "cmyk.jpg": (encoded(plain("CMYK", (0, 255, 255, 0)), "JPEG", quality=100), (255, 0, 0)),
    "animated.gif": (encoded(RED, "GIF", **ANIMATED), (255, 0, 0)),
    "grey.png": (encoded(plain("L", 99), "PNG"), (99, 99, 99)),
    "black-and-white.png": (encoded(plain("1", 1), "PNG"), (255, 255, 255)),
    "palette.png": (encoded(RED.convert("P"), "PNG"), (255, 0, 0)),
    "transparent.png": (encoded(plain("RGBA", (255, 0, 0, 128)), "PNG"), (255, 127, 127)),
    "16-bit-0.png": (encoded(plain("I;16", 0), "PNG"), (0, 0, 0)),
    "16-bit-50.png": (encoded(plain("I;16", 257 * 50), "PNG"), (50, 50, 50)),
    "16-bit-200.png": (encoded(plain("I;16", 257 * 200), "PNG"), (200, 200, 200)),
    "16-bit-255.png": (encoded(plain("I;16", 257 * 255), "PNG"), (255, 255, 255)),
    "16-bit.tiff": (encoded(plain("I;16B", 257 * 99), "TIFF"), (99, 99, 99)),
    "16-bit.pgm": (encoded(plain("I", 257 * 99), "PPM"), (99, 99, 99)),
}
