import io
import struct
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from magma_jax.data.images import ImageError, ImageInput, load_image, normalize, random_crop, to_uint8

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
NAMES = sorted(path.stem for path in (GOLDEN / "images").glob("*.png"))


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "preprocess.npz") as file:
        return dict(file)


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def gradient(width=40, height=20) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, x * 0 + 90], -1).astype(np.uint8))


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 4)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.parametrize("name", NAMES)
def test_pixels_equal_the_originals_in_every_mode(golden, name, size):
    pixels = to_uint8(load_image(GOLDEN / "images" / f"{name}.png"), size)
    np.testing.assert_array_equal(pixels, golden[f"{name}/{size}/uint8_hwc"])


def test_pixels_equal_the_originals_at_full_size(golden):
    pixels = to_uint8(load_image(GOLDEN / "images" / "rgb_landscape.png"), 384)
    np.testing.assert_array_equal(pixels[:64, :64], golden["rgb_landscape/384/corner"])


def test_scaled_values_equal_the_originals(golden):
    values = normalize(to_uint8(load_image(GOLDEN / "images" / "rgba.png"), 64))
    np.testing.assert_allclose(values, golden["rgba/64"][0].transpose(1, 2, 0), rtol=0, atol=1e-6)
    assert values.dtype == np.float32


def test_normalize_takes_batches_other_statistics_and_jax_arrays():
    pixels = np.arange(2 * 3 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3, 3)
    other = normalize(pixels, mean=[127 / 255] * 3, std=[128 / 255] * 3)
    np.testing.assert_allclose(other, (pixels.astype(np.float64) - 127) / 128, atol=1e-6)
    on_device = normalize(jnp.asarray(pixels))
    assert isinstance(on_device, jnp.ndarray)
    np.testing.assert_allclose(on_device, normalize(pixels), atol=1e-6)


@pytest.mark.parametrize("format", ["PNG", "BMP", "JPEG", "WEBP", "GIF"])
def test_accepted_formats_decode_alike_from_bytes_path_and_pil(tmp_path, format):
    data = encode(gradient(), format)
    path = tmp_path / "picture"
    path.write_bytes(data)
    images = [np.asarray(load_image(source).convert("RGB")) for source in (data, path, str(path))]
    with Image.open(path) as opened:
        images.append(np.asarray(load_image(opened).convert("RGB")))
    for image in images:
        np.testing.assert_array_equal(image, images[0])
    assert np.abs(images[0].astype(int) - np.asarray(gradient())).mean() < 8


def test_a_small_file_claiming_a_huge_image_is_refused_before_decoding(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_claiming(20_000, 20_000))
    assert path.stat().st_size < 100
    with pytest.raises(ImageError, match=r"bomb\.png.*limit is 64000000.*max_pixels"):
        load_image(path)
    # Between the library's limit and PIL's own, and just above a limit the caller chose.
    for data, options in [(png_claiming(9000, 9000), {}), (png_claiming(11, 10), {"max_pixels": 109})]:
        with pytest.raises(ImageError, match="the limit is"):
            load_image(data, **options)
    with pytest.raises(ImageError, match="the limit is"):
        load_image(gradient(), max_pixels=799)
    assert load_image(gradient(), max_pixels=800).size == (40, 20)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>", "formats PNG, JPEG"),
        (encode(gradient(), "TIFF"), "formats PNG, JPEG"),
        (encode(gradient(), "PNG")[:-60], "truncated or damaged"),
        (encode(gradient(), "JPEG")[:-60], "truncated or damaged"),
        (encode(gradient(), "PNG")[:40], "truncated|formats"),
    ],
)
def test_broken_files_raise_one_line_naming_file_and_remedy(tmp_path, content, says):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=says) as error:
        load_image(path)
    message = str(error.value)
    assert "broken.png" in message
    assert "\n" not in message
    assert ";" in message  # what to do follows
    with pytest.raises(ImageError, match=f"<{len(content)} bytes>"):
        load_image(content)


def test_damaged_pngs_decode_or_raise_image_error_and_nothing_else():
    data = bytearray(encode(gradient(), "PNG"))
    for position in range(8, len(data), 3):
        damaged = data.copy()
        damaged[position] ^= 0x5A
        try:
            load_image(bytes(damaged))
        except ImageError as error:
            assert "\n" not in str(error)  # noqa: PT017 (damage may also go unseen)


def test_missing_files_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.png"):
        load_image(tmp_path / "nothing.png")


@pytest.mark.parametrize("url", ["https://example.org/a.png", "file:///etc/hosts", "data:image/png;base64,AA"])
def test_urls_are_refused(url):
    for opens in (load_image, ImageInput):
        with pytest.raises(ImageError, match="not enabled"):
            opens(url)


def test_sixteen_bit_grey_is_scaled_not_clipped():
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    image = load_image(encode(Image.fromarray(values), "PNG"))
    assert image.mode == "L"
    np.testing.assert_array_equal(np.asarray(image), [[0, 0, 1, 1, 128, 255]])
    opened = Image.open(io.BytesIO(encode(Image.fromarray(np.full((9, 9), 65535, np.uint16)), "PNG")))
    assert (to_uint8(opened, 4) == 255).all()


def test_cmyk_and_palette_with_transparency_become_rgb():
    cmyk = load_image(encode(gradient(64, 64).convert("CMYK"), "JPEG", quality=95))
    assert cmyk.mode == "CMYK"
    assert np.abs(to_uint8(cmyk, 64).astype(int) - np.asarray(gradient(64, 64))).mean() < 8
    palette = gradient(64, 64).quantize(16)
    see_through = load_image(encode(palette, "PNG", transparency=bytes([0, 128] + [255] * 14)))
    assert see_through.mode == "P"
    np.testing.assert_array_equal(to_uint8(see_through, 32), to_uint8(palette, 32))
    assert "transparency" in see_through.info  # the caller's image is left as it was


def test_the_first_frame_of_an_animation_counts():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for format in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if format == "WEBP" else {}
        data = encode(frames[0], format, save_all=True, append_images=frames[1:], duration=50, **options)
        assert Image.open(io.BytesIO(data)).n_frames == 2
        assert load_image(data).convert("RGB").getpixel((4, 4)) == (255, 0, 0), format


def test_exif_orientation_is_obeyed_unless_told_otherwise():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by 90 degrees to view
    data = encode(gradient(40, 20), "PNG", exif=exif)
    turned = load_image(data)
    assert turned.size == (20, 40)
    np.testing.assert_array_equal(np.asarray(turned), np.rot90(np.asarray(gradient(40, 20)), -1))
    assert load_image(turned).size == (20, 40)  # not twice
    assert load_image(data, exif_transpose=False).size == (40, 20)
    unreadable = encode(gradient(40, 20), "JPEG", exif=b"Exif\0\0garbage")
    assert load_image(unreadable).size == (40, 20)


def test_extreme_shapes_are_refused_before_the_resize_needs_gigabytes():
    with pytest.raises(ImageError, match="too long and thin"):
        to_uint8(Image.new("L", (1, 200_000)), 384)
    assert to_uint8(Image.new("L", (1, 300)), 16).shape == (16, 16, 3)


def test_image_input_decodes_when_asked(tmp_path):
    promised = ImageInput(tmp_path / "later.png")
    assert "later.png" in repr(promised)
    gradient().save(tmp_path / "later.png")
    assert promised.load().size == (40, 20)
    with pytest.raises(ImageError, match="limit"):
        promised.load(max_pixels=1)


@pytest.mark.parametrize("size", [384, 224, 64])
def test_leaving_out_what_is_cropped_away_changes_no_pixel(size):
    rng = np.random.default_rng(0)
    for width, height in [(640, 480), (480, 640), (500, 375), (640, 427), (1024, 768), (300, 299), (1001, 600)]:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        longer = int(size * max(width, height) / min(width, height))
        whole = image.resize((longer, size) if width > height else (size, longer), Image.Resampling.BICUBIC)
        left, top = (round((side - size) / 2) for side in whole.size)
        expected = np.array(whole.crop((left, top, left + size, top + size)))
        np.testing.assert_array_equal(to_uint8(image, size), expected, err_msg=f"{width} x {height}")


def in_mode(mode: str) -> Image.Image:
    """The gradient, of which a mode keeps what it can."""
    image = gradient(64, 48)
    grey = np.asarray(image.convert("L"))
    if mode.startswith("I;16"):
        order = ">" if mode.endswith("B") else "<"
        return Image.frombytes(mode, image.size, (grey.astype(np.uint16) * 257).astype(f"{order}u2").tobytes())
    if mode in ("I", "F"):
        return Image.fromarray(grey.astype(np.int32) * 257 if mode == "I" else grey.astype(np.float32) / 255)
    through = {"La": "LA", "RGBa": "RGBA"}.get(mode)
    return image.convert(through).convert(mode) if through else image.convert(mode)


@pytest.mark.parametrize("mode", Image.MODES)
def test_no_mode_of_pillow_changes_a_image_in_silence(mode):
    # Two colours are dithered, a palette has 216.
    tolerance = {"1": 128, "P": 40, "PA": 8, "LAB": 8, "YCbCr": 4, "HSV": 4}.get(mode, 1)
    grey = mode[0] in "1LIF" and mode != "LAB"
    expected = to_uint8(gradient(64, 48).convert("L" if grey else "RGB"), 32).astype(int)
    for image in (in_mode(mode), load_image(in_mode(mode))):
        pixels = to_uint8(image, 32).astype(int)
        assert np.abs(pixels - expected).max() <= tolerance * (3 if tolerance > 1 else 1)
        assert np.abs(pixels - expected).mean() <= tolerance
        assert random_crop(image, 16, np.random.default_rng(0)).std() > 5


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 100, 255]], np.int32), [0, 100, 255]),
        (np.array([[0, 129, 256, 65535]], np.int32), [0, 1, 1, 255]),
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 1.5, 254.6]], np.float32), [0, 2, 255]),
    ],
)
def test_values_of_32_bits_are_scaled_by_the_stated_rule(values, expected):
    assert np.asarray(load_image(Image.fromarray(values))).tolist() == [expected]


@pytest.mark.parametrize(
    "values",
    [
        np.array([[0, 65536]], np.int32),
        np.array([[-1, 5]], np.int32),
        np.array([[0, 255.5]], np.float32),
        np.array([[-0.1, 1]], np.float32),
        np.array([[0, np.nan]], np.float32),
        np.array([[0, np.inf]], np.float32),
    ],
)
def test_values_of_32_bits_without_a_known_scale_are_refused(values):
    for use in (load_image, lambda image: to_uint8(image, 4)):
        with pytest.raises(ImageError, match="lie neither in") as error:
            use(Image.fromarray(values))
        assert "\n" not in str(error.value)


def test_a_mode_without_a_way_to_rgb_is_an_image_error(monkeypatch):
    image = gradient()
    monkeypatch.setattr(image, "resize", lambda *_, **__: (_ for _ in ()).throw(ValueError("image has wrong mode")))
    with pytest.raises(ImageError, match=r"this mode cannot be converted to RGB \(image has wrong mode\)"):
        to_uint8(image, 8)
