"""Pictures on the host: reading, preprocessing against the recordings, measures, writing."""

import io
import pathlib
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from blip3o_jax.data import images
from blip3o_jax.errors import UserError

LARGE = """
import io
from PIL import Image
from blip3o_jax.data.images import load_image
Image.MAX_IMAGE_PIXELS = 100
for width in (20, 21):
    file = io.BytesIO()
    Image.new("RGB", (10, width)).save(file, "PNG")
    print(load_image(file.getvalue()).size)
"""


def test_large_images_are_read_without_a_warning_and_larger_ones_refused():
    run = subprocess.run([sys.executable, "-W", "always", "-c", LARGE], capture_output=True, text=True)
    assert run.stdout == "(10, 20)\n" and "DecompressionBombWarning" not in run.stderr
    assert re.search("UserError: image: got .* bytes: Image size .210 pixels. .* scale it down first", run.stderr)


def noise(height, width, seed=0):
    """uint8[Y X 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["wide", "tall"])
def test_tokenizer_pixels_equal_the_recording(golden_dir, name):
    arrays = np.load(golden_dir / "golden.npz")
    expected = arrays[f"pre_{name}_siglip"].transpose(1, 2, 0)
    pixels = images.tokenizer_pixels(Image.fromarray(arrays[f"pre_{name}_uint8"]), len(expected))
    assert pixels.dtype == np.float32
    assert np.abs(pixels - expected).max() <= 1 / 255


def reference_target(picture, size):
    """Resize of the shorter side and centre crop, with the rounding the reference's transforms have."""
    short, long = sorted(picture.size)
    long = int(size * long / short)
    shape = (size, long) if picture.width <= picture.height else (long, size)
    resized = np.asarray(picture.resize(shape, Image.Resampling.BILINEAR), np.float32)
    top, left = (int(round((side - size) / 2.0)) for side in resized.shape[:2])
    return (resized[top : top + size, left : left + size] / 255 - 0.5) / 0.5


@pytest.mark.parametrize("shape", [(40, 61), (70, 33), (24, 24), (31, 47), (16, 100), (17, 16), (300, 201), (201, 300)])
def test_square_target_equals_resize_and_centre_crop(shape):
    picture = Image.fromarray(noise(*shape))
    np.testing.assert_array_equal(images.target_pixels(picture, 24, 24), reference_target(picture, 24))


@pytest.mark.parametrize("shape", [(40, 61), (70, 33), (24, 24), (7, 90)])
@pytest.mark.parametrize("target", [(24, 48), (48, 24), (32, 32), (5, 61)])
def test_any_target_shape_is_covered_around_the_centre(shape, target):
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    ramp = np.stack([rows / (shape[0] - 1), columns / (shape[1] - 1), rows * 0], -1) * 255
    ramp = ramp.round().astype(np.uint8)
    pixels = images.target_pixels(Image.fromarray(ramp), *target)
    assert pixels.shape == (*target, 3)
    centre = pixels[:, :, :2].mean((0, 1))
    assert np.abs(centre).max() < 2 / min(*target, *shape)


def test_cropping_first_shows_the_tokenizer_what_the_target_shows():
    picture = np.zeros((40, 120, 3), np.uint8)
    picture[:, 40:80] = 255
    picture = Image.fromarray(picture)
    cropped = images.tokenizer_pixels(picture, 31, crop_first=(64, 64))
    assert cropped[:, 2:-2].min() > 0.9
    whole = images.tokenizer_pixels(picture, 31)
    assert whole[:, 0].max() < -0.9
    np.testing.assert_array_equal(images.tokenizer_pixels(picture, 31, crop_first=(40, 120)), whole)


def test_a_strip_that_would_exhaust_memory_is_refused():
    with pytest.raises(UserError, match="less extreme aspect ratio"):
        images.target_pixels(Image.new("RGB", (1, 4000)), 1024, 1024)


def test_uint8_rounds_and_clips():
    pixels = np.array([-2.0, -1.0, -1 + 2 * 0.4 / 255, -1 + 2 * 0.6 / 255, 0.0, 1.0, 1.5], np.float32)
    assert images.to_uint8(pixels).tolist() == [0, 0, 0, 1, 128, 255, 255]
    picture = noise(8, 8)
    np.testing.assert_array_equal(images.to_uint8(images.tokenizer_pixels(Image.fromarray(picture), 8)), picture)


def test_exif_rotation_is_applied(tmp_path):
    upright = np.full((32, 64, 3), 255, np.uint8)
    upright[:16, :16] = (255, 0, 0)
    stored = {  # EXIF: where row 0 and column 0 of the stored picture are seen
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture = Image.fromarray(np.ascontiguousarray(pixels))
        (tmp_path / "p.jpg").write_bytes(encoded(picture, "JPEG", exif=exif, quality=95))
        picture = images.load_image(tmp_path / "p.jpg")
        loaded = np.asarray(picture, int)
        assert loaded.shape == upright.shape
        assert np.abs(loaded - upright).mean() < 3, orientation
        np.testing.assert_array_equal(images.load_image(picture), loaded)  # once is enough


def test_broken_exif_does_not_lose_the_picture():
    data = encoded(Image.new("RGB", (8, 8), "red"), "JPEG", exif=b"Exif\x00\x00no tiff header")
    assert images.load_image(data).getpixel((4, 4))[0] > 250


def rgba(alpha):
    return Image.fromarray(np.dstack([np.zeros((8, 8, 3), np.uint8), np.full((8, 8), alpha, np.uint8)]))


def test_transparency_is_laid_on_white():
    assert images.load_image(encoded(rgba(0))).getpixel((0, 0)) == (255, 255, 255)
    assert images.load_image(encoded(rgba(128))).getpixel((0, 0)) == (127, 127, 127)
    assert images.load_image(rgba(255)).getpixel((0, 0)) == (0, 0, 0)
    assert images.load_image(encoded(rgba(0).convert("LA"))).getpixel((0, 0)) == (255, 255, 255)


def test_transparent_palette_entry_is_laid_on_white():
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 200, 0, 0])
    assert images.load_image(encoded(picture)).getpixel((0, 0)) == (200, 0, 0)
    assert images.load_image(encoded(picture, transparency=1)).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_grey_keeps_its_range():
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for kind in ("PNG", "TIFF"):
        loaded = images.load_image(encoded(Image.fromarray(ramp), kind))
        np.testing.assert_array_equal(np.asarray(loaded)[..., 0], np.round(ramp / 257))


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "YCbCr"])
def test_other_colour_spaces_become_rgb(mode):
    picture = Image.new("RGB", (8, 8), "white").convert(mode)
    loaded = images.load_image(encoded(picture, "TIFF"))
    assert loaded.mode == "RGB"
    assert min(loaded.getpixel((0, 0))) >= 254


def test_animations_give_their_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert images.load_image(data).getpixel((0, 0)) == (255, 0, 0)


def test_paths_bytes_files_and_pil_images_are_equal(tmp_path):
    picture = Image.fromarray(noise(9, 7))
    path = tmp_path / "p.png"
    path.write_bytes(encoded(picture))
    for source in (path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), picture):
        np.testing.assert_array_equal(np.asarray(images.load_image(source)), np.asarray(picture))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(header, rows, *chunks):
    """A PNG from the fields of its header and its filtered rows."""
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", *header, 0, 0, 0)), *chunks, chunk(b"IDAT", zlib.compress(rows))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


LONG = zlib.compress(b"a" * 2**21)
BOMB = png((60000, 60000, 8, 2), b"")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "which is empty"),
        (b"no picture", "not a readable image"),
        (BOMB, "scale it down first"),
        (BOMB[:33] + chunk(b"zTXt", b"x\0\0" + LONG) + BOMB[33:], "scale it down first"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "not a readable image"),
        (encoded(Image.fromarray(noise(64, 64)))[:2000], "damaged"),
        (encoded(Image.fromarray(noise(64, 64)), "JPEG")[:900], "damaged"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "floating-point"),
    ],
)
def test_what_is_no_picture_is_reported_with_its_path(tmp_path, content, message):
    path = tmp_path / "p.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        images.load_image(path)
    assert "\n" not in str(caught.value)
    assert "p.png" in str(caught.value)


@pytest.mark.parametrize(
    "shape, kind", [((4, 4), "uint8"), ((4, 4, 4), "uint8"), ((4, 4, 3), "float32"), ((0, 4, 3), "uint8")]
)
def test_an_array_is_of_rgb_pixels(shape, kind):
    with pytest.raises(UserError, match=rf"image: got an array {kind}.* - expected uint8\[Y X 3\]"):
        images.load_image(np.zeros(shape, kind))


def test_a_missing_picture_is_reported(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        images.load_image(tmp_path / "absent.png")
    with pytest.raises(UserError, match="directory"):
        images.load_image(tmp_path)
    with pytest.raises(UserError, match="not a regular file"):
        images.load_image("/dev/zero")


def test_a_file_that_is_too_long_is_refused_however_it_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 40)
    content = encoded(Image.new("RGB", (4, 4)))
    (tmp_path / "a.png").write_bytes(content)
    for source in (tmp_path / "a.png", content, io.BytesIO(content)):
        with pytest.raises(UserError, match="more than 40 bytes"):
            images.load_image(source)


def test_psnr_of_a_known_error():
    a, b = np.full((4, 4, 3), 100, np.uint8), np.full((4, 4, 3), 110, np.uint8)
    assert images.psnr(a, b) == pytest.approx(20 * np.log10(255 / 10))
    assert images.psnr(b, a) == images.psnr(a, b)
    assert images.psnr(a, a) == float("inf")
    with pytest.raises(UserError, match="expected equal shapes"):
        images.psnr(a, b[:2])


def slow_ssim(a, b):
    """SSIM from its definition, window by window."""
    offsets = np.arange(-5, 6)
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weights = (weights / weights.sum())[..., None]
    values = []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            p, q = a[y : y + 11, x : x + 11].astype(float), b[y : y + 11, x : x + 11].astype(float)
            mp, mq = (weights * p).sum((0, 1)), (weights * q).sum((0, 1))
            vp, vq = (weights * (p - mp) ** 2).sum((0, 1)), (weights * (q - mq) ** 2).sum((0, 1))
            cov = (weights * (p - mp) * (q - mq)).sum((0, 1))
            c1, c2 = 2.55**2, 7.65**2
            values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return np.mean(values)


def test_ssim_equals_its_definition():
    a = noise(17, 14)
    b = (0.7 * a + 0.3 * noise(17, 14, seed=1)).astype(np.uint8)
    assert images.ssim(a, b) == pytest.approx(slow_ssim(a, b), abs=1e-9)
    assert images.ssim(a, a) == images.ssim(a[:11, :11], a[:11, :11]) == pytest.approx(1)
    with pytest.raises(UserError, match="at least 11"):
        images.ssim(a[:10], b[:10])


def test_grid_places_pictures_row_by_row_on_white():
    pictures = [np.full((2 + i % 2, 3, 3), 10 * i, np.uint8) for i in range(3)]
    sheet = images.grid(pictures, 2)
    assert sheet.shape == (6, 6, 3)
    assert sheet[0, 0, 0] == 0 and sheet[0, 3, 0] == 10 and sheet[3, 0, 0] == 20
    assert sheet[2, 0, 0] == 255 and (sheet[3:, 3:] == 255).all()
    assert images.grid(pictures[:1], 5).shape == (2, 3, 3)


def test_png_keeps_pixels_and_metadata(tmp_path):
    picture = noise(5, 6)
    metadata = {"parameters": "a café\nSteps: 30", "blip3o": '{"prompt": "你好 \U0001f3a8"}'}
    images.save_png(picture, tmp_path / "new" / "p.png", metadata)
    with Image.open(tmp_path / "new" / "p.png") as loaded:
        np.testing.assert_array_equal(np.asarray(loaded), picture)
        assert {key: str(value) for key, value in loaded.text.items()} == metadata
    content = (tmp_path / "new" / "p.png").read_bytes()
    assert b"tEXtparameters" in content and b"iTXtblip3o" in content
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["p.png"]


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "p.png"
    images.save_png(noise(4, 4), path)
    before = path.read_bytes()

    def half(place, content):
        with open(place, "wb") as file:
            file.write(content[:20])
        raise OSError("disk full")

    monkeypatch.setattr(pathlib.Path, "write_bytes", half)
    with pytest.raises(OSError, match="disk full"):
        images.save_png(noise(4, 4), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------- colours


PROPHOTO = ((0.7977, 0.2880, 0.0), (0.1352, 0.7119, 0.0), (0.0313, 0.0001, 0.8249))
WHITE = struct.pack(">iii", *(round(value * 65536) for value in (0.9642, 1.0, 0.8249)))


def matrix_profile(columns, gamma):
    """An RGB profile of three primaries (XYZ, D50) and one gamma."""
    primaries = [struct.pack(">iii", *(round(value * 65536) for value in column)) for column in columns]
    return icc(b"RGB ", gamma, dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries)), (b"rTRC", b"gTRC", b"bTRC"))


def grey_profile(gamma):
    return icc(b"GRAY", gamma, {}, (b"kTRC",))


def icc(space, gamma, primaries, curves):
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = [(b"desc", b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + b"\0" * 75)]
    tags += [(name, b"XYZ \0\0\0\0" + values) for name, values in ({b"wtpt": WHITE} | primaries).items()]
    tags += [*((name, curve) for name in curves), (b"cprt", b"text\0\0\0\0test\0")]
    offset, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags:
        data += b"\0" * (-len(data) % 4)
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s", offset + len(body), b"\0" * 4, 0x02400000, b"mntr", space, b"XYZ ")
    return head + b"\0" * 12 + b"acsp" + b"\0" * 28 + WHITE + b"\0" * 48 + table + body


def shown(rgb, columns=PROPHOTO, gamma=1.8):
    """sRGB of a colour by the definition of its profile: linear light, XYZ under D50, sRGB."""
    linear = (np.array(rgb) / 255) ** gamma
    srgb = np.array(((0.4360, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7142)))
    light = np.linalg.solve(srgb.T, linear @ np.array(columns)).clip(0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_an_embedded_profile_is_applied(kind):
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind in ("JPEG", "AVIF") else {}
    profile = matrix_profile(PROPHOTO, 1.8)
    content = encoded(Image.new("RGB", (16, 16), (120, 90, 60)), kind, icc_profile=profile, **options)
    loaded = images.load_image(content)
    assert np.abs(np.array(loaded.getpixel((4, 4))) - shown((120, 90, 60))).max() <= 3
    assert images.load_image(loaded).getpixel((4, 4)) == loaded.getpixel((4, 4)), "once is enough"
    assert not loaded.info


def test_profiles_of_other_modes_are_applied_to_their_colours():
    profile = matrix_profile(PROPHOTO, 1.8)
    expected = shown((120, 90, 60))
    alpha = Image.new("RGBA", (8, 8), (120, 90, 60, 0))
    alpha.paste((120, 90, 60, 255), (0, 0, 4, 8))
    loaded = images.load_image(encoded(alpha, icc_profile=profile))
    assert np.abs(np.array(loaded.getpixel((0, 0))) - expected).max() <= 2
    assert loaded.getpixel((7, 0)) == (255, 255, 255)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 120, 90, 60])
    loaded = images.load_image(encoded(palette, icc_profile=profile))
    assert np.abs(np.array(loaded.getpixel((0, 0))) - expected).max() <= 2
    grey = images.load_image(encoded(Image.new("L", (8, 8), 128), icc_profile=profile))
    assert np.abs(np.array(grey.getpixel((0, 0))) - shown((128, 128, 128))).max() <= 2


def test_grey_profiles_are_applied_to_grey_of_8_and_16_bits():
    expected = 255 * (1.055 * (128 / 255) ** (1.0 / 2.4) - 0.055)  # gamma 1 is linear light
    for image in (
        Image.new("L", (4, 4), 128),
        Image.new("LA", (4, 4), (128, 255)),
        Image.fromarray(np.full((4, 4), 128 * 257, np.uint16)),
    ):
        loaded = images.load_image(encoded(image, icc_profile=grey_profile(1.0)))
        assert np.abs(np.array(loaded.getpixel((0, 0))) - expected).max() <= 1
    profile = chunk(b"iCCP", b"x\0\0" + zlib.compress(grey_profile(1.0)))
    deep = png((1, 1, 16, 4), b"\0\x80\x80\xff\xff", profile)
    assert np.abs(np.array(images.load_image(deep).getpixel((0, 0))) - expected).max() <= 1


def test_profiles_that_are_srgb_damaged_or_of_another_mode_change_nothing():
    image = Image.fromarray(noise(16, 16))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    broken = matrix_profile(PROPHOTO, 1.8)
    for profile in (srgb, b"no profile", broken[:200], broken[:40] + b"\xff" * 300, grey_profile(1.0)):
        loaded = images.load_image(encoded(image, icc_profile=profile))
        np.testing.assert_array_equal(np.asarray(loaded), np.asarray(image))
    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    with_rgb_profile = images.load_image(encoded(cmyk, "TIFF", icc_profile=broken))
    assert with_rgb_profile.getpixel((0, 0)) == images.load_image(encoded(cmyk, "TIFF")).getpixel((0, 0))


def test_lab_is_converted():
    lab = ImageCms.profileToProfile(
        Image.new("RGB", (4, 4), (200, 100, 50)), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )  # fmt: skip
    got = images.load_image(encoded(lab, "TIFF")).getpixel((0, 0))
    assert np.abs(np.array(got) - (200, 100, 50)).max() <= 2


WHITE_PIXEL = (255, 255, 255)


@pytest.mark.parametrize(
    ("header", "rows", "clear", "pixels"),
    [  # two pixels each, of which the first is transparent
        ((2, 1, 1, 0), b"\0\x40", (0,), [WHITE_PIXEL, WHITE_PIXEL]),
        ((2, 1, 2, 0), b"\0\x60", (1,), [WHITE_PIXEL, (170, 170, 170)]),
        ((2, 1, 4, 0), b"\0\x3c", (3,), [WHITE_PIXEL, (204, 204, 204)]),
        ((2, 1, 8, 0), b"\0\x05\x06", (5,), [WHITE_PIXEL, (6, 6, 6)]),
        ((2, 1, 16, 0), b"\0\x01\x02\x80\x80", (0x102,), [WHITE_PIXEL, (128, 128, 128)]),
        ((2, 1, 8, 2), b"\0\x01\x02\x03\x04\x05\x06", (1, 2, 3), [WHITE_PIXEL, (4, 5, 6)]),
        ((2, 1, 16, 2), b"\0\1\0\2\0\3\0\4\0\5\0\6\0", (0x100, 0x200, 0x300), [WHITE_PIXEL, (4, 5, 6)]),
    ],
)
def test_a_transparent_colour_of_any_depth_is_laid_on_white(header, rows, clear, pixels):
    content = png(header, rows, chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear)))
    assert [images.load_image(content).getpixel((x, 0)) for x in (0, 1)] == pixels


@pytest.mark.parametrize("mode", ["RGBa", "La", "PA", "LA", "HSV", "1", "RGBX"])
def test_uncommon_modes_of_pil_images_are_read(mode):
    white = Image.new("RGBA", (4, 4), "white")
    image = {"HSV": lambda: Image.new("HSV", (4, 4), (0, 0, 255)), "La": lambda: white.convert("LA").convert("La")}
    image = image.get(mode, lambda: white.convert("RGB" if mode in ("1", "RGBX") else "RGBA").convert(mode))()
    loaded = images.load_image(image)
    assert loaded.mode == "RGB" and loaded.getpixel((0, 0)) == WHITE_PIXEL


def test_integers_of_more_than_16_bits_are_refused():
    with pytest.raises(UserError, match="integers of more than 16 bits"):
        images.load_image(encoded(Image.fromarray(np.full((4, 4), 70000, np.int32)), "TIFF"))
    ok = images.load_image(encoded(Image.fromarray(np.full((4, 4), 65535, np.int32)), "TIFF"))
    assert ok.getpixel((0, 0)) == WHITE_PIXEL


@pytest.mark.parametrize(
    "text",
    [
        chunk(b"zTXt", b"workflow\0\0" + LONG),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG),
        chunk(b"tEXt", b"prompt\0" + b"a" * 2**21),
        chunk(b"zTXt", b"x\0\0" + zlib.compress(b"a" * 2**20)) * 70,
        chunk(b"iCCP", b"x\0\0" + LONG),
        b"\0\0\0\5tEXta\0bcd\0\0\0\0",  # a wrong checksum
    ],
)
@pytest.mark.parametrize("where", ["before", "behind"])
def test_long_texts_and_profiles_of_a_png_do_not_matter(text, where):
    image = noise(6, 5)
    content = encoded(Image.fromarray(image))
    content = content[:33] + text + content[33:] if where == "before" else content[:-12] + text + content[-12:]
    np.testing.assert_array_equal(np.asarray(images.load_image(content)), image)


def test_a_long_profile_of_a_png_is_applied():
    profile = matrix_profile(PROPHOTO, 1.8)
    long = struct.pack(">I", len(profile) + 2**21) + profile[4:] + bytes(2**21)
    content = encoded(Image.new("RGB", (8, 8), (120, 90, 60)))
    content = content[:33] + chunk(b"iCCP", b"x\0\0" + zlib.compress(long)) + content[33:]
    assert np.abs(np.array(images.load_image(content).getpixel((0, 0))) - shown((120, 90, 60))).max() <= 2


def test_suffixes_are_those_of_the_formats_that_are_read():
    assert {".jpg", ".jpe", ".jfif", ".avif", ".webp", ".tiff", ".bmp", ".gif", ".png"} <= set(images.suffixes())
    names = ("A/B.c/D.JPeG", "jpg", "a.eps", "a.pdf", "a.txt", ".png/a")
    assert [name for name in names if images.is_image(name)] == ["A/B.c/D.JPeG"]
