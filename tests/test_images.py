"""Opening every kind of file as upright RGB, and crops of the original's own pixels."""

import io
import random
import warnings

import pytest
from PIL import Image, ImageOps

from mgpo_trl import images
from mgpo_trl.boxes import format_box, parse_box
from mgpo_trl.geometry import view_to_original
from mgpo_trl.images import ImageError, crop_original, open_image

LARGE = (4032, 3024)
INK, PAPER = (250, 20, 60), (40, 90, 160)
ORIENTATION = 0x0112


def encode(image, image_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def with_orientation(image, orientation, image_format="PNG", **options):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encode(image, image_format, exif=exif, **options)


def marked(size, seed, mode="RGB", paper=PAPER, ink=INK, palette=None):
    """A large picture of one colour with one pixel of another at a place drawn by seed, and that place."""
    place = tuple(random.Random(seed).randrange(side) for side in size)
    image = Image.new(mode, size, paper)
    if palette:
        image.putpalette(palette)
    image.putpixel(place, ink)
    return image, place


def turned(place, size, orientation):
    """Where a pixel of the stored file lies in the upright picture, from the definition of the EXIF tag."""
    (x, y), (w, h) = place, size
    upright = {1: (x, y), 2: (w - 1 - x, y), 3: (w - 1 - x, h - 1 - y), 4: (x, h - 1 - y)}
    turned_sides = {5: (y, x), 6: (h - 1 - y, x), 7: (h - 1 - y, w - 1 - x), 8: (y, w - 1 - x)}
    return (upright | turned_sides)[orientation]


def check_mark(data, place, size, seed, ink=INK, paper=PAPER):
    """Text -> view -> original -> crop: the mark is in the crop at the place that the mapping says, and only there."""
    image = open_image(data, "case")
    assert (image.mode, image.size) == ("RGB", size)
    rng = random.Random(seed + 1)
    view_size = (rng.randrange(300, 1200), rng.randrange(300, 1200))
    in_view = [int(p * v / o) for p, v, o in zip(place, view_size, size, strict=True)]
    low = [max(0, p - rng.randrange(30, 90)) for p in in_view]
    high = [min(side, p + rng.randrange(31, 90)) for p, side in zip(in_view, view_size, strict=True)]
    box = parse_box(format_box((*low, *high), view_size, "absolute"), view_size, "absolute")
    x1, y1, x2, y2 = view_to_original(box.box_view_px, view_size, size)
    crop = crop_original(image, (x1, y1, x2, y2))
    assert crop.size == (x2 - x1, y2 - y1)
    found = (place[0] - x1, place[1] - y1)
    assert crop.getpixel(found) == ink
    crop.putpixel(found, paper)
    assert crop.getextrema() == tuple((value, value) for value in paper)


@pytest.mark.parametrize("size", [LARGE, LARGE[::-1], (2500, 2500), (6000, 700)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_mark_is_in_the_crop(size, seed):
    image, place = marked(size, seed)
    check_mark(encode(image, compress_level=1), place, size, seed)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(2016, 1512), (1512, 2016)], ids=str)
def test_mark_is_in_the_crop_for_every_exif_orientation(orientation, size):
    image, place = marked(size, orientation)
    upright_size = size if orientation < 5 else size[::-1]
    data = with_orientation(image, orientation, compress_level=1)
    check_mark(data, turned(place, size, orientation), upright_size, orientation)


def palette_with(paper, ink):
    return [*paper, *ink, *([7, 8, 9] * 254)]


CMYK_PAPER, CMYK_INK = (0, 255, 255, 0), (255, 0, 0, 0)
GREY = (100, 100, 100)
MODES = {
    "rgba": ({"mode": "RGBA", "paper": (*PAPER, 255), "ink": (*INK, 255)}, {}, PAPER, INK),
    "rgba-clear": ({"mode": "RGBA", "paper": (*PAPER, 0), "ink": (*INK, 255)}, {}, (255, 255, 255), INK),
    "la-clear": ({"mode": "LA", "paper": (100, 255), "ink": (7, 0)}, {}, GREY, (255, 255, 255)),
    "rgb-transparent": ({"paper": PAPER, "ink": INK}, {"transparency": PAPER}, (255, 255, 255), INK),
    "palette": ({"mode": "P", "paper": 0, "ink": 1, "palette": palette_with(PAPER, INK)}, {}, PAPER, INK),
    "palette-transparent": (
        {"mode": "P", "paper": 0, "ink": 1, "palette": palette_with(PAPER, INK)},
        {"transparency": 0},
        (255, 255, 255),
        INK,
    ),
    "palette-half-transparent": (
        {"mode": "P", "paper": 0, "ink": 1, "palette": palette_with((0, 0, 0), INK)},
        {"transparency": bytes([128, 255])},
        (127, 127, 127),
        INK,
    ),
    "cmyk": (
        {"mode": "CMYK", "paper": CMYK_PAPER, "ink": CMYK_INK},
        {"image_format": "TIFF", "compression": "tiff_lzw"},
        (255, 0, 0),
        (0, 255, 255),
    ),
    "16-bit": ({"mode": "I;16", "paper": 100 * 256, "ink": 250 * 256 + 255}, {}, GREY, (250, 250, 250)),
    "16-bit-tiff": (
        {"mode": "I;16", "paper": 100 * 256 + 255, "ink": 65535},
        {"image_format": "TIFF"},
        GREY,
        (255, 255, 255),
    ),
    "grayscale": ({"mode": "L", "paper": 100, "ink": 3}, {}, GREY, (3, 3, 3)),
    "bilevel": ({"mode": "1", "paper": 1, "ink": 0}, {}, (255, 255, 255), (0, 0, 0)),
}


@pytest.mark.parametrize("name", MODES)
def test_mark_is_in_the_crop_for_every_mode(name):
    drawn, options, paper, ink = MODES[name]
    size, seed = (1800, 1300), sum(map(ord, name))
    image, place = marked(size, seed, **drawn)
    check_mark(encode(image, **options), place, size, seed, ink, paper)


def test_mark_is_in_the_crop_of_a_jpeg():
    image, (x, y) = marked(LARGE, 11)
    x, y = x // 16 * 16, y // 16 * 16
    image.paste(INK, (x, y, x + 16, y + 16))
    data = with_orientation(image, 6, "JPEG", quality=95, subsampling=0)
    left, top = turned((x, y + 15), LARGE, 6)
    crop = crop_original(open_image(data, "photograph"), (left, top, left + 16, top + 16))
    assert max(abs(a - b) for pixel in crop.get_flattened_data() for a, b in zip(pixel, INK, strict=True)) < 12


def test_16_bit_is_scaled_and_never_clipped():
    ramp = Image.new("I;16", (256, 1))
    for x in range(256):
        ramp.putpixel((x, 0), x * 257)
    wanted = [(x, x, x) for x in range(256)]
    assert list(open_image(encode(ramp), "ramp").get_flattened_data()) == wanted
    pgm = b"P5 256 1 65535\n" + b"".join((x * 257).to_bytes(2, "big") for x in range(256))
    assert list(open_image(pgm, "ramp").get_flattened_data()) == wanted


@pytest.mark.parametrize("image", [Image.new("F", (3, 3), 0.5), Image.new("I", (3, 3), 70000)], ids=["float", "int"])
def test_brightness_without_a_scale_is_refused(image):
    with pytest.raises(ImageError, match="row 3: pixels of mode .* Save the image with 8 or 16 bits"):
        open_image(encode(image, "TIFF"), "row 3")


# --- orientation once, whatever the source -----------------------------------------------------------------------


@pytest.mark.parametrize("source", ["path", "str", "bytes", "bytearray", "struct", "struct-path", "image"])
def test_every_source_gives_the_same_picture(source, tmp_path):
    image, place = marked((90, 60), 5)
    data, path = with_orientation(image, 6), tmp_path / "photo.png"
    path.write_bytes(data)
    sources = {
        "path": path,
        "str": str(path),
        "bytes": data,
        "bytearray": bytearray(data),
        "struct": {"bytes": data, "path": "elsewhere.png"},
        "struct-path": {"bytes": None, "path": str(path)},
        "image": Image.open(path),
    }
    opened = open_image(sources[source], "photo")
    assert opened.size == (60, 90)
    assert opened.getpixel(turned(place, (90, 60), 6)) == INK


def test_orientation_is_applied_once():
    opened = open_image(with_orientation(marked((90, 60), 5)[0], 6, "JPEG"), "photo")
    assert opened.info == {} and not opened.getexif()
    for again in (open_image(opened, "again"), ImageOps.exif_transpose(opened)):
        assert (again.size, again.tobytes()) == (opened.size, opened.tobytes())


@pytest.mark.parametrize("image_format", ["TIFF", "WEBP", "JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once_in_every_format(image_format, orientation):
    size, corner = (96, 64), (0, 0)  # Pillow turns a TIFF by itself when it is decoded, the others never
    image = Image.new("RGB", size, PAPER)
    image.paste(INK, (0, 0, 32, 32))
    opened = open_image(with_orientation(image, orientation, image_format), "photo")
    assert opened.size == (size if orientation < 5 else size[::-1])
    x, y = turned(corner, size, orientation)
    assert max(abs(a - b) for a, b in zip(opened.getpixel((x, y)), INK, strict=True)) < 40
    opposite = opened.getpixel((opened.width - 1 - x, opened.height - 1 - y))
    assert max(abs(a - b) for a, b in zip(opposite, PAPER, strict=True)) < 40


def test_orientation_written_after_the_pixels_counts():
    data = with_orientation(Image.new("RGB", (90, 60)), 6)
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    late = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    assert open_image(late, "late").size == (60, 90)


def test_an_open_image_is_left_as_it_is():
    image = Image.new("RGBA", (9, 6), (1, 2, 3, 0))
    image.info["note"] = "mine"
    opened = open_image(image, "mine")
    opened.putpixel((0, 0), INK)
    assert (image.mode, image.getpixel((0, 0)), image.info) == ("RGBA", (1, 2, 3, 0), {"note": "mine"})
    rgb = Image.new("RGB", (9, 6))
    open_image(rgb, "mine").putpixel((0, 0), INK)
    assert rgb.getpixel((0, 0)) == (0, 0, 0)


# --- bad files ---------------------------------------------------------------------------------------------------

PHOTO = encode(Image.effect_noise((300, 200), 80).convert("RGB"), "JPEG")
NOISE_PNG = encode(Image.effect_noise((300, 200), 80))


@pytest.mark.parametrize(
    ("source", "fact"),
    [
        ("missing/photo.jpg", "there is no image file at missing"),
        (b"", "zero bytes"),
        ({"bytes": b"", "path": None}, "zero bytes"),
        (b"not an image", "cannot be decoded"),
        (PHOTO[: len(PHOTO) // 2], "cannot be decoded"),
        (PHOTO[:-200], "cannot be decoded"),
        (NOISE_PNG[: len(NOISE_PNG) // 2], "cannot be decoded"),
        (PHOTO[:40], "cannot be decoded"),
        (Image.new("RGB", (0, 5)), "no pixels"),
        (None, "got NoneType"),
        ({"bytes": None, "path": None}, "got NoneType"),
        ({}, "got NoneType"),
        (7, "got int"),
    ],
)
def test_bad_images_are_named(source, fact):
    with pytest.raises(ImageError, match=rf"^row 17 \(id x\): .*{fact}.*\. .*[.]$") as caught:
        open_image(source, "row 17 (id x)")
    assert isinstance(caught.value, ValueError)


def test_a_folder_and_an_empty_file_are_named(tmp_path):
    with pytest.raises(ImageError, match="there is no image file"):
        open_image(tmp_path, "row 0")
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match="row 0: the image file has zero bytes"):
        open_image(tmp_path / "empty.png", "row 0")


@pytest.mark.parametrize("cut", range(0, len(PHOTO), 997))
def test_no_cut_jpeg_gets_through(cut):
    with pytest.raises(ImageError):
        open_image(PHOTO[:cut], "cut")


# --- size --------------------------------------------------------------------------------------------------------


def test_8k_pictures_open_without_touching_pillows_limit():
    before = Image.MAX_IMAGE_PIXELS
    data = encode(Image.new("1", (20_000, 10_000)))  # 200 megapixels: Pillow alone raises
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(data))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = open_image(data, "8K")
        assert image.size == (20_000, 10_000)
        assert crop_original(image, (0, 0, 20_000, 9_999)).size == (20_000, 9_999)
    assert Image.MAX_IMAGE_PIXELS == before


def test_larger_pictures_are_refused_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 10_000)
    before = Image.MAX_IMAGE_PIXELS
    assert open_image(encode(Image.new("1", (100, 100))), "at the limit").size == (100, 100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ImageError, match=r"big: the image has 10,100 pixels, over the limit of 10,000\. Make"):
            open_image(encode(Image.new("1", (101, 100))), "big")
        with pytest.raises(ImageError, match="bomb: the image has more than 20,000 pixels, over the limit of 10,000"):
            open_image(encode(Image.new("1", (300, 100))), "bomb")
    assert Image.MAX_IMAGE_PIXELS == before


@pytest.mark.parametrize("box", [(-1, 0, 5, 5), (0, 0, 11, 5), (0, 0, 5, 9), (5, 5, 5, 8), (5, 5, 3, 8)])
def test_crops_outside_the_image_are_refused(box):
    with pytest.raises(ValueError, match=r"must lie inside the image of size \(10, 8\)"):
        crop_original(Image.new("RGB", (10, 8)), box)
