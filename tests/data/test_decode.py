import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from distill.data import decode
from distill.data.decode import Item, PixelFormat, decode_images
from distill.errors import DamagedDataError, InputError, MemoryExhaustedError

AS_STORED = PixelFormat()


def run(items, progress, *, pixel_format=AS_STORED, bad_images=0.0, threads=2, count=None):
    return decode_images(
        iter(items),
        count=len(items) if count is None else count,
        pixel_format=pixel_format,
        bad_images=bad_images,
        progress=progress,
        title="decode",
        threads=threads,
    )


def one(payload, progress, **options):
    """The pixels of one item, uint8 (Ch, H, W)."""
    return run([Item("image", payload)], progress, **options).images[0].numpy()


def test_pixels_come_in_order_and_are_those_of_the_files(progress, encode, picture, tmp_path):
    pictures = [picture(number) for number in range(150)]
    items = [Item(f"{number}", encode(pixels)) for number, pixels in enumerate(pictures)]
    file = tmp_path / "0.png"
    file.write_bytes(encode(pictures[0]))
    items[0] = Item("0", file)
    items[1] = Item("1", pictures[1].transpose(2, 0, 1))
    decoded = run(items, progress)
    np.testing.assert_array_equal(decoded.images.numpy(), np.stack(pictures).transpose(0, 3, 1, 2))
    assert decoded.kept.tolist() == list(range(150))
    assert progress.tasks["decode"][0] == progress.tasks["decode"][1].done == 150


def test_threads_do_not_change_the_result(progress, encode, picture):
    items = [Item(f"{n}", encode(picture(n, 20, 30), "JPEG") if n % 9 else b"broken") for n in range(200)]
    results = [
        run(items, progress, pixel_format=PixelFormat("grayscale", (8, 8)), bad_images=0.5, threads=threads)
        for threads in (1, 4)
    ]
    assert results[0].images.equal(results[1].images)
    assert results[0].kept.equal(results[1].kept)
    assert results[0].bad == results[1].bad


def test_items_are_consumed_as_they_are_needed(progress, encode, picture, monkeypatch):
    monkeypatch.setattr(decode, "_BATCH_ITEMS", 2)
    data = encode(picture(0))
    taken = 0
    ahead = []

    def items():
        nonlocal taken
        for _ in range(60):
            taken += 1
            yield Item("x", data)

    class Watching:
        def advance(self, count=1):
            self.done = getattr(self, "done", 0) + count
            ahead.append(taken - self.done)

    watching = Watching()
    monkeypatch.setattr(
        type(progress), "task", lambda *_, **__: __import__("contextlib").nullcontext(watching)
    )
    decode_images(
        items(), count=60, pixel_format=AS_STORED, bad_images=0, progress=progress, title="t", threads=2
    )
    assert watching.done == 60
    assert max(ahead) <= 2 * 2 * 2


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("1", 1), ("RGB", 3), ("P", 3), ("CMYK", 3)])
def test_modes_become_grey_or_rgb(progress, encode, picture, mode, channels):
    image = Image.fromarray(picture(0)).convert(mode)
    pixels = one(encode(image, "TIFF" if mode == "CMYK" else "PNG"), progress)
    expected = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    np.testing.assert_array_equal(pixels, expected[None] if channels == 1 else expected.transpose(2, 0, 1))


def test_16_bit_grey_is_scaled_to_8(progress, encode):
    values = np.array([[0, 128, 129], [32768, 65406, 65535]], dtype=np.uint16)
    pixels = one(encode(Image.fromarray(values)), progress)
    np.testing.assert_array_equal(pixels[0], np.round(values * (255 / 65535)).astype(np.uint8))


def test_16_bit_pgm(progress):
    pixels = one(b"P5 2 1 65535\n" + bytes([255, 255, 0, 0]), progress)
    assert pixels.tolist() == [[[255, 0]]]


@pytest.mark.parametrize(("mode", "channels"), [("LA", 1), ("RGBA", 3)])
def test_transparency_is_composited_on_white(progress, encode, mode, channels):
    colour = (10, 0) if mode == "LA" else (10, 20, 30, 0)
    image = Image.new(mode, (2, 1), colour)
    image.putpixel((1, 0), (*colour[:-1], 255))
    pixels = one(encode(image), progress)
    assert pixels[:, 0, 0].tolist() == [255] * channels
    assert pixels[:, 0, 1].tolist() == list(colour[:-1])


def test_exif_orientation_is_honoured(progress, encode, picture):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    image = Image.fromarray(picture(0, 4, 7))
    pixels = one(encode(image, "PNG", exif=exif), progress)
    np.testing.assert_array_equal(pixels.transpose(1, 2, 0), np.rot90(picture(0, 4, 7), k=-1))


@pytest.mark.parametrize(("channels", "mode"), [("grayscale", "L"), ("rgb", "RGB")])
@pytest.mark.parametrize("stored", [1, 3])
def test_channels_are_converted_as_pillow_does(progress, encode, picture, channels, mode, stored):
    pixels = picture(0, channels=stored)
    expected = np.asarray(Image.fromarray(pixels).convert(mode))
    expected = expected[None] if mode == "L" else expected.transpose(2, 0, 1)
    array = pixels[None] if stored == 1 else pixels.transpose(2, 0, 1)
    for payload in (encode(pixels), array):
        result = one(payload, progress, pixel_format=PixelFormat(channels))
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("size", [(8, 8), (5, 9), (40, 30)])
def test_resize_covers_and_crops_with_antialiasing(progress, encode, picture, size):
    image = Image.fromarray(picture(0, 24, 30))
    expected = ImageOps.fit(image, size[::-1], Image.Resampling.BILINEAR)
    pixels = one(encode(image), progress, pixel_format=PixelFormat(size=size))
    assert pixels.shape == (3, *size)
    np.testing.assert_array_equal(pixels.transpose(1, 2, 0), np.asarray(expected))


def test_resize_halves_by_averaging(progress):
    """Against plain arithmetic: a step edge of 0 and 200, far from the border, keeps both levels."""
    edge = np.zeros((1, 16, 16), dtype=np.uint8)
    edge[:, :, 8:] = 200
    pixels = one(edge, progress, pixel_format=PixelFormat(size=(8, 8)))
    assert pixels[0, 0, [0, 1, 2, 5, 6, 7]].tolist() == [0, 0, 0, 200, 200, 200]
    assert 0 < pixels[0, 0, 3] < pixels[0, 0, 4] < 200


def test_arrays_of_other_channels_are_resized_plane_by_plane(progress, picture):
    planes = np.stack([picture(number, 8, 8, 1) for number in range(5)])
    pixels = one(planes, progress, pixel_format=PixelFormat(size=(4, 4)))
    for plane, result in zip(planes, pixels, strict=True):
        expected = ImageOps.fit(Image.fromarray(plane), (4, 4), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(result, np.asarray(expected))


def test_reduced_decoding_of_large_jpegs_stays_close(progress, encode):
    y, x = np.mgrid[0:256, 0:320]
    smooth = np.stack([x * 255 // 319, y * 255 // 255, (x + y) * 255 // 574], -1).astype(np.uint8)
    data = encode(smooth, "JPEG", quality=95)
    reference = ImageOps.fit(Image.open(io.BytesIO(data)), (32, 32), Image.Resampling.BILINEAR)
    pixels = one(data, progress, pixel_format=PixelFormat(size=(32, 32)))
    difference = np.abs(pixels.transpose(1, 2, 0).astype(int) - np.asarray(reference).astype(int))
    assert difference.max() <= 4


def bad_payloads(encode, picture):
    whole = encode(picture(0, 40, 40), "JPEG")
    return {
        "nothing": b"",
        "text": b"no image at all",
        "cut short": whole[: len(whole) // 2],
        "float": encode(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"),
        "32 bit": encode(Image.fromarray(np.full((4, 4), 2**20, np.int32)), "TIFF"),
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 5\n",
    }


def test_bad_images_are_dropped_listed_and_counted(progress, encode, picture, tmp_path):
    bad = [Item(name, payload) for name, payload in bad_payloads(encode, picture).items()]
    bad.append(Item("gone", tmp_path / "gone.png"))
    good = [Item(f"good {number}", encode(picture(number))) for number in range(7)]
    decoded = run([item for pair in zip(good, bad, strict=True) for item in pair], progress, bad_images=0.5)
    assert decoded.kept.tolist() == list(range(0, 14, 2))
    np.testing.assert_array_equal(decoded.images[6].numpy().transpose(1, 2, 0), picture(6))
    (warning,) = progress.warnings
    assert "7 of 14 images" in warning
    assert all(item.name in warning for item in bad)


def test_only_the_first_bad_images_are_listed(progress, encode, picture):
    items = [Item("good", encode(picture(0)))] + [Item(f"bad{number:02}", b"") for number in range(20)]
    run(items, progress, bad_images=1.0)
    assert "bad09" in progress.warnings[0]
    assert "bad10" not in progress.warnings[0]


def test_too_many_bad_images_fail_at_once(progress, encode, picture):
    items = [Item(f"{number}", b"" if number < 3 else encode(picture(number))) for number in range(100)]
    with pytest.raises(DamagedDataError, match="3 of the first 3 images") as caught:
        run(items, progress, bad_images=0.02)
    assert caught.value.exit_code == 3
    assert len(run(items, progress, bad_images=0.03).images) == 97


def test_all_bad_is_an_error_whatever_is_allowed(progress):
    with pytest.raises(DamagedDataError, match="no image could be decoded"):
        run([Item("x", b"")], progress, bad_images=1.0)


def test_more_pixels_than_pillow_allows_is_a_bad_image(progress, encode, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    fine, large = encode(Image.new("L", (10, 10))), encode(Image.new("L", (10, 15)))
    run([Item("fine", fine)], progress)
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(DamagedDataError, match="more than the 100 that Pillow allows"),
    ):
        run([Item("large", large)], progress)


def test_a_file_of_absurd_size_is_a_bad_image(progress, encode, picture, tmp_path, monkeypatch):
    file = tmp_path / "large.png"
    file.write_bytes(encode(picture(0)))
    monkeypatch.setattr(decode, "MAX_FILE_BYTES", 10)
    with pytest.raises(DamagedDataError, match="more than the 10 allowed"):
        run([Item("large", file)], progress)


def test_different_sizes_name_both_files_and_the_option(progress, encode, picture):
    items = [Item("a.png", encode(picture(0, 6, 6))), Item("b.png", encode(picture(1, 6, 8)))]
    with pytest.raises(InputError) as caught:
        run(items, progress)
    for part in ("a.png is 6 x 6", "b.png is 6 x 8", "data.resize=6"):
        assert part in str(caught.value)


def test_different_channels_name_both_files_and_the_option(progress, encode, picture):
    items = [Item("a.png", encode(picture(0))), Item("b.png", encode(picture(1, channels=1)))]
    with pytest.raises(InputError, match=r"a\.png has 3, b\.png has 1[^$]*data\.channels"):
        run(items, progress)


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_items_than_announced(progress, encode, picture, count):
    items = [Item(f"{number}", encode(picture(number))) for number in range(2)]
    with pytest.raises(DamagedDataError, match="changed while they were read"):
        run(items, progress, count=count)


def test_an_error_of_the_stream_reaches_the_caller(progress, encode, picture):
    def items():
        yield Item("0", encode(picture(0)))
        raise DamagedDataError("the shard is truncated")

    with pytest.raises(DamagedDataError, match="the shard is truncated"):
        decode_images(
            items(), count=2, pixel_format=AS_STORED, bad_images=0, progress=progress, title="t", threads=2
        )


def test_memory_exhausted_names_the_knobs(progress, encode, picture, monkeypatch):
    def no_memory(*_, **__):
        raise MemoryError

    items = [Item("0", encode(picture(0)))]
    monkeypatch.setattr(decode.np, "empty", no_memory)
    with pytest.raises(MemoryExhaustedError, match=r"data\.resize.*data\.cap"):
        run(items, progress)
