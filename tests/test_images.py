"""Opening every kind of file as upright RGB, and crops of the original's own pixels."""

import io
import random
import warnings

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from mgpo_trl import images
from mgpo_trl.boxes import format_box, parse_box
from mgpo_trl.geometry import view_to_original
from mgpo_trl.images import ImageError, LateImage, crop_original, open_image, open_late, read_header

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


def check_mark(data, place, size, seed, ink=INK, paper=PAPER, opener=open_image):
    """Text -> view -> original -> crop: the mark is in the crop at the place that the mapping says, and only there."""
    image = opener(data, "case")
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
@pytest.mark.parametrize("opener", [open_image, open_late])
def test_mark_is_in_the_crop_for_every_exif_orientation(orientation, size, opener):
    image, place = marked(size, orientation)
    upright_size = size if orientation < 5 else size[::-1]
    data = with_orientation(image, orientation, compress_level=1)
    check_mark(data, turned(place, size, orientation), upright_size, orientation, opener=opener)


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


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("opener", [open_image, open_late])
def test_mark_is_in_the_crop_of_a_jpeg(orientation, opener):
    image, (x, y) = marked(LARGE, 11)
    x, y = x // 16 * 16, y // 16 * 16
    image.paste(INK, (x, y, x + 16, y + 16))
    data = with_orientation(image, orientation, "JPEG", quality=95, subsampling=0)
    corners = [turned(corner, LARGE, orientation) for corner in ((x, y), (x + 15, y + 15))]
    left, top = (min(sides) for sides in zip(*corners, strict=True))
    crop = crop_original(opener(data, "photograph"), (left, top, left + 16, top + 16))
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


def test_opened_images_are_plain_and_their_own():
    """Decoded pixels are kept, not copied, and nothing of the file stays with them."""
    opened = open_image(with_orientation(marked((90, 60), 5)[0], 1, "JPEG"), "photo")
    assert type(opened) is Image.Image and opened.format is None and opened.readonly == 0
    rgb = Image.new("RGB", (9, 6))
    assert open_image(rgb, "mine").im is not rgb.im


def test_an_alpha_channel_that_hides_nothing_leaves_the_colours():
    colours = Image.frombytes("RGB", (256, 3), random.Random(2).randbytes(256 * 9))
    colours.putalpha(255)
    white = Image.new("RGBA", colours.size, "white")
    laid = Image.alpha_composite(white, colours).convert("RGB")
    assert open_image(encode(colours), "opaque").tobytes() == laid.tobytes() == colours.convert("RGB").tobytes()


# --- late decoding -----------------------------------------------------------------------------------------------


def detailed(size, seed=0, mode="RGB"):
    """Noise at two scales: hard on a view that leaves pixels out."""
    rng = random.Random(seed)
    small = tuple(-(-side // 8) for side in size)
    layers = [Image.frombytes("RGB", sides, rng.randbytes(3 * sides[0] * sides[1])) for sides in (small, size)]
    return Image.blend(layers[0].resize(size), layers[1], 0.3).convert(mode)


def difference(one, other):
    """Mean and largest difference of two images of one size, in levels of 255."""
    values = np.abs(np.asarray(one, int) - np.asarray(other, int))
    return values.mean(), values.max()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_late_image_has_the_size_the_view_and_the_crop_of_the_picture(orientation):
    size, view_size = (1203, 802), (112, 84)
    data = with_orientation(detailed(size), orientation, "JPEG", quality=92)
    late, whole = LateImage(data, "late"), open_image(data, "whole")
    if orientation > 4:
        view_size = view_size[::-1]
    assert late.size == whole.size == (late.width, late.height)
    view = late.draft(view_size, Image.Resampling.BICUBIC)
    assert not late.is_decoded and view.size == view_size and view.mode == "RGB" and view.info == {}
    mean, largest = difference(view, whole.resize(view_size, Image.Resampling.BICUBIC))
    assert mean < 1.5 and largest < 12
    box = (300, 200, 700, 500)
    assert crop_original(late, box).tobytes() == crop_original(whole, box).tobytes()
    assert late.is_decoded and late.decoded.tobytes() == whole.tobytes()


@pytest.mark.parametrize(
    "mode, options",
    [("CMYK", {}), ("L", {}), ("RGB", {"progressive": True}), ("RGB", {"subsampling": 0}), ("RGB", {"quality": 40})],
)
def test_every_kind_of_jpeg_can_be_late(mode, options):
    data = encode(detailed((1001, 999), mode=mode), "JPEG", **{"quality": 92, **options})
    late, whole = open_late(data, "late"), open_image(data, "whole")
    view = late.draft((112, 112), Image.Resampling.BICUBIC)
    mean, largest = difference(view, whole.resize((112, 112), Image.Resampling.BICUBIC))
    assert not late.is_decoded and mean < 1.5 and largest < 12
    assert crop_original(late, (7, 9, 500, 600)).tobytes() == crop_original(whole, (7, 9, 500, 600)).tobytes()


def test_a_draft_is_not_stretched_to_the_columns_that_the_decoder_fills_up():
    """1601 pixels are 201 eighths, the last of them one pixel wide: a step near the right edge stays in its place."""
    image = Image.new("RGB", (1601, 1601), "black")
    image.paste("white", (1440, 0, 1601, 1601))
    data = encode(image, "JPEG", quality=95)
    size = (100, 100)
    draft = LateImage(data, "late").draft(size, Image.Resampling.BICUBIC)
    assert difference(draft, open_image(data, "whole").resize(size, Image.Resampling.BICUBIC))[1] < 40


def test_a_jpeg_too_small_to_be_reduced_is_decoded_once_and_exactly(monkeypatch):
    data = with_orientation(detailed((300, 200)), 6, "JPEG")
    opened = []
    monkeypatch.setattr(images, "open_image", lambda *args: opened.append(args) or open_image(*args))
    late = LateImage(data, "late")
    view = late.draft((84, 112), Image.Resampling.BICUBIC)
    assert view.tobytes() == open_image(data, "x").resize((84, 112), Image.Resampling.BICUBIC).tobytes()
    crop_original(late, (0, 0, 9, 9))
    assert len(opened) == 1


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "WEBP"])
def test_only_a_jpeg_is_late(image_format):
    data = with_orientation(marked((90, 60), 5)[0], 6, image_format)
    opened = open_late(data, "photo")
    assert (opened.size, opened.tobytes()) == ((60, 90), open_image(data, "photo").tobytes())
    with pytest.raises(ValueError, match=rf"photo: {image_format} cannot be decoded late. Open it with `open_late`"):
        LateImage(data, "photo")
    image = Image.new("RGB", (9, 6))
    assert open_late(image, "open already").tobytes() == image.tobytes()


@pytest.mark.parametrize("cut", [0, 40, 500, 5000, -200])
def test_no_cut_jpeg_gets_through_as_a_draft(cut):
    data = encode(detailed((900, 600)), "JPEG")[:cut]
    with pytest.raises(ImageError, match=r"^cut: .*\. .*[.]$"):
        open_late(data, "cut").draft((112, 84), Image.Resampling.BICUBIC)


def test_late_errors_name_the_image(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(PHOTO)
    late = open_late(path, "row 8")
    path.unlink()
    with pytest.raises(ImageError, match="row 8: there is no image file"):
        crop_original(late, (0, 0, 9, 9))
    with pytest.raises(ImageError, match="row 9: there is no image file"):
        open_late(path, "row 9")


def test_a_header_is_read_without_decoding(tmp_path, monkeypatch):
    """Of a file even the beginning is enough; asking Pillow for the orientation of a PNG would decode it."""
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    path = tmp_path / "photo.png"
    path.write_bytes(NOISE_PNG[:100])
    for source in (path, str(path), NOISE_PNG, {"bytes": NOISE_PNG, "path": None}, {"bytes": None, "path": str(path)}):
        assert read_header(source, "photo") == ("PNG", 300 * 200)
    assert read_header(PHOTO, "photo").format == "JPEG"
    assert read_header(Image.new("RGB", (5, 4)), "in memory") == (None, 20)
    path.write_bytes(b"")
    for source, fact in ((path, "zero bytes"), (tmp_path / "gone.png", "no image file"), (b"nothing", "be decoded")):
        with pytest.raises(ImageError, match=f"^row 3: .*{fact}"):
            read_header(source, "row 3")


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
