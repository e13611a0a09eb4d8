"""Pictures on the host: reading, preprocessing against the recordings, measures, writing."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from blip3o_jax.data import images
from blip3o_jax.errors import UserError


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
    ramp = (
        np.stack([rows * 255 / (shape[0] - 1), columns * 255 / (shape[1] - 1), rows * 0], -1).round().astype(np.uint8)
    )
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


def bomb():
    """A PNG whose header claims 60000 x 60000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + struct.pack(">I", 9) + b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "which is empty"),
        (b"no picture", "no readable picture"),
        (bomb(), "scale it down first"),
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


def test_a_missing_picture_is_reported(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        images.load_image(tmp_path / "absent.png")
    with pytest.raises(UserError, match="directory"):
        images.load_image(tmp_path)


def test_psnr_of_a_known_error():
    a, b = np.full((4, 4, 3), 100, np.uint8), np.full((4, 4, 3), 110, np.uint8)
    assert images.psnr(a, b) == pytest.approx(20 * np.log10(255 / 10))
    assert images.psnr(b, a) == images.psnr(a, b)
    assert images.psnr(a, a) == float("inf")
    with pytest.raises(UserError, match="expected equal ones"):
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
    assert images.ssim(a, a) == pytest.approx(1)
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


def test_a_failed_write_leaves_the_old_picture(tmp_path):
    path = tmp_path / "p.png"
    images.save_png(noise(4, 4), path)
    before = path.read_bytes()

    class Unwritable(Image.Image):
        def save(self, fp, *args, **kwargs):
            with open(fp, "wb") as file:
                file.write(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        images.save_png(Unwritable(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
