"""Colour profiles: what the readers give is sRGB, wherever a file is read; values by published matrices or by hand."""

from __future__ import annotations

import io
import logging
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from data import colours
from data.crops import GridCrops
from data.datasets import DegradedCrops, HQImages, LQImages
from data.decoding import read_image
from data.pairing import Pairs

# Colorants adapted to D50, as the ICC's registry lists them
ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
# Linear light to linear sRGB, both of a white point of D65 (www.brucelindbloom.com, and Apple's for P3)
ADOBE_TO_SRGB = np.array([[1.39836, -0.39836, 0], [0, 1, 0], [0, -0.04293, 1.04293]])
P3_TO_SRGB = np.array([[1.22494, -0.22494, 0], [-0.04206, 1.04206, 0], [-0.01964, -0.07864, 1.09827]])


def fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256)) + b"\0\0"


def table(values: np.ndarray) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">I", len(values)) + np.rint(values * 65535).astype(">u2").tobytes()


def parametric(function: int, *values: float) -> bytes:
    return b"para\0\0\0\0" + struct.pack(">HH", function, 0) + fixed(*values)


def lookup(channels: int, lightness: np.ndarray) -> bytes:
    """A lut16Type of two grid points a channel, of lightness 0 to 1 without colour (ICC.1, 10.10)."""
    lab = np.stack([lightness.ravel() * 0xFF00, *[np.full(lightness.size, 0x8000)] * 2], axis=1).astype(">u2")
    head = b"mft2\0\0\0\0" + bytes([channels, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + struct.pack(">HH", 2, 2)
    return head + struct.pack(">HH", 0, 65535) * channels + lab.tobytes() + struct.pack(">HH", 0, 65535) * 3


def profile(space: bytes, pcs: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile of version 2 (ICC.1:2022, section 7)."""
    tags = {
        b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249),
        b"cprt": b"text\0\0\0\0none\0",
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 2) + b"a\0" + bytes(78),
        **tags,
    }
    listed, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        padded = data + bytes(-len(data) % 4)
        listed += name + struct.pack(">II", start + len(body), len(data))
        body += padded
    head = struct.pack(">I", start + len(body)) + b"lcms\x02\x10\0\0" + (b"prtr" if pcs == b"Lab " else b"mntr")
    head += space + pcs + struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + listed + body


def rgb_profile(colorants: tuple[tuple[float, ...], ...], curve: bytes) -> bytes:
    places = {f"{name}XYZ".encode(): b"XYZ \0\0\0\0" + fixed(*xyz) for name, xyz in zip("rgb", colorants, strict=True)}
    return profile(b"RGB ", b"XYZ ", {**places, **{f"{name}TRC".encode(): curve for name in "rgb"}})


def encoded(light: np.ndarray) -> np.ndarray:
    """sRGB's curve (IEC 61966-2-1), to 0 ... 255."""
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def decoded(values: np.ndarray) -> np.ndarray:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


ADOBE_ICC = rgb_profile(ADOBE, gamma(2.19921875))
SRGB_CURVE = parametric(3, 2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


@pytest.fixture(autouse=True)
def _nothing_named() -> Iterator[None]:
    colours._named.clear()
    yield
    colours._named.clear()


@pytest.fixture
def stored() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def by_library(stored: np.ndarray, icc: bytes, mode: str = "RGB") -> np.ndarray:
    transform = ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(io.BytesIO(icc)),
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    return np.asarray(transform.apply(Image.fromarray(stored, mode))).astype(int)


@pytest.mark.parametrize(
    ("colorants", "curve", "light", "matrix"),
    [
        (ADOBE, gamma(2.19921875), lambda v: v**2.19921875, ADOBE_TO_SRGB),
        (ADOBE, gamma(1), lambda v: v, ADOBE_TO_SRGB),
        (ADOBE, b"curv" + bytes(8), lambda v: v, ADOBE_TO_SRGB),
        (P3, SRGB_CURVE, decoded, P3_TO_SRGB),
        (P3, table(decoded(np.linspace(0, 1, 1024))), decoded, P3_TO_SRGB),
        (P3, parametric(0, 1.8), lambda v: v**1.8, P3_TO_SRGB),
        (P3, parametric(1, 2, 1.25, -0.25), lambda v: np.clip(1.25 * v - 0.25, 0, None) ** 2, P3_TO_SRGB),
        (P3, parametric(2, 2, 1, 0, 0.25), lambda v: v**2 + 0.25, P3_TO_SRGB),
        (
            P3,
            parametric(4, 2, 1, 0, 0.5, 0.25, 0.01, 0.02),
            lambda v: np.where(v >= 0.25, v**2 + 0.01, v / 2 + 0.02),
            P3_TO_SRGB,
        ),
    ],
)
def test_curves_and_colorants_are_applied_to_8_and_16_bits(colorants, curve, light, matrix, tmp_path) -> None:  # type: ignore[no-untyped-def]
    icc = rgb_profile(colorants, curve)
    values = np.random.default_rng(1).integers(0, 65536, (32, 32, 3), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "deep.tif", values, photometric="rgb", iccprofile=icc)
    expected = encoded(np.clip(light(values / 65535), 0, 1) @ matrix.T)
    np.testing.assert_allclose(read_image(tmp_path / "deep.tif"), expected, atol=1.01)
    stored = (values >> 8).astype(np.uint8)
    Image.fromarray(stored).save(tmp_path / "a.png", icc_profile=icc)
    expected = encoded(np.clip(light(stored / 255), 0, 1) @ matrix.T)
    np.testing.assert_allclose(read_image(tmp_path / "a.png"), expected, atol=1.01)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif", "a.jpg", "a.avif"])
def test_every_kind_that_holds_a_profile_is_converted(tmp_path: Path, name: str) -> None:
    flat = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    Image.fromarray(flat).save(tmp_path / name, icc_profile=ADOBE_ICC, lossless=True, quality=100)
    # (200/255)^2.2 = 0.586, 0.128, 0.0279; the matrix: 0.769, 0.128, 0.0236; sRGB's curve: 226.3, 100.6, 43
    np.testing.assert_allclose(read_image(tmp_path / name)[8, 8], (226, 100, 42), atol=4 if name == "a.avif" else 2)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif"])
def test_a_turned_photo_keeps_its_profile(tmp_path: Path, name: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (32, 16), (200, 100, 50))
    image.save(tmp_path / name, icc_profile=ADOBE_ICC, exif=exif, lossless=True, quality=100)
    read = read_image(tmp_path / name)
    assert read.shape == (32, 16, 3)
    np.testing.assert_allclose(read[8, 8], (226, 100, 42), atol=2)


def test_16_bits_keep_what_8_bits_lose(tmp_path: Path) -> None:
    """Of linear light, the lowest 8-bit step is 13 steps of sRGB; a ramp below it must rise by one at a time."""
    ramp = np.repeat(np.arange(0, 2048, 4, dtype=np.uint16)[None, :, None], 3, axis=2)
    tifffile.imwrite(tmp_path / "a.tif", ramp, photometric="rgb", iccprofile=rgb_profile(ADOBE, gamma(1)))
    read = read_image(tmp_path / "a.tif")[0].astype(int)
    assert np.diff(read[:, 1]).max() == 1
    assert read[-1, 1] > 45


def test_an_srgb_profile_changes_no_pixel(tmp_path: Path, stored: np.ndarray) -> None:
    srgb = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
    for icc in (
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        rgb_profile(srgb, SRGB_CURVE),
        rgb_profile(srgb, table(decoded(np.linspace(0, 1, 1024)))),
    ):
        Image.fromarray(stored).save(tmp_path / "a.png", icc_profile=icc)
        np.testing.assert_array_equal(read_image(tmp_path / "a.png"), stored)


@pytest.mark.parametrize("deep", [False, True])
def test_grey_takes_its_own_profile_or_one_for_rgb(tmp_path: Path, deep: bool) -> None:
    levels = np.linspace(0, 65535 if deep else 255, 64).round()[None].astype(np.uint16 if deep else np.uint8)
    expected = encoded(levels / (65535 if deep else 255))
    for icc in (profile(b"GRAY", b"XYZ ", {b"kTRC": gamma(1)}), rgb_profile(ADOBE, gamma(1))):
        tifffile.imwrite(tmp_path / "g.tif", levels, photometric="minisblack", iccprofile=icc)
        read = read_image(tmp_path / "g.tif")
        np.testing.assert_allclose(read, np.repeat(expected[..., None], 3, axis=2), atol=1.01)


def test_cmyk_and_tables_of_colours_are_converted(tmp_path: Path) -> None:
    """Lightness 50 is sRGB 118.9; black alone, or red alone, decides it here."""
    black = 1 - np.indices((2,) * 4)[3]
    ink = np.zeros((8, 8, 4), np.uint8)
    ink[..., 0], ink[..., 3] = 200, 127  # without the profile: (28, 128, 128)
    Image.fromarray(ink, "CMYK").save(
        tmp_path / "k.tif", icc_profile=profile(b"CMYK", b"Lab ", {b"A2B0": lookup(4, black)})
    )
    np.testing.assert_allclose(read_image(tmp_path / "k.tif")[4, 4], [119] * 3, atol=2)
    icc = profile(b"RGB ", b"Lab ", {b"A2B0": lookup(3, np.indices((2,) * 3)[0])})
    for kind in (np.uint8, np.uint16):
        flat = np.full((8, 8, 3), np.array((0.5, 0.1, 0.9)) * np.iinfo(kind).max, kind)
        tifffile.imwrite(tmp_path / "t.tif", flat, photometric="rgb", iccprofile=icc)
        np.testing.assert_allclose(read_image(tmp_path / "t.tif")[4, 4], [119] * 3, atol=2)


def test_palette_and_transparent_colours_are_converted_before_white_shows_through(tmp_path: Path) -> None:
    rgba = np.array([[[200, 100, 50, 255], [200, 100, 50, 51], [200, 100, 50, 0]]], np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a.png", icc_profile=ADOBE_ICC)
    solid, faint, clear = read_image(tmp_path / "a.png")[0].astype(float)
    np.testing.assert_allclose(solid, (226, 100, 42), atol=2)
    np.testing.assert_allclose(faint, 0.2 * solid + 0.8 * 255, atol=1)
    assert clear.tolist() == [255] * 3
    image = Image.new("P", (2, 2))
    image.putpalette([200, 100, 50])
    image.save(tmp_path / "p.png", icc_profile=ADOBE_ICC)
    np.testing.assert_array_equal(read_image(tmp_path / "p.png")[0, 0], solid)


def test_every_data_set_gives_the_readers_colours(tmp_path: Path) -> None:
    stored = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for folder in ("lq", "hq"):
        (tmp_path / folder).mkdir()
    Image.fromarray(stored).save(tmp_path / "hq" / "a.png", icc_profile=ADOBE_ICC)
    Image.fromarray(stored[:16, :16]).save(tmp_path / "lq" / "a.png", icc_profile=ADOBE_ICC)
    expected = by_library(stored, ADOBE_ICC)
    assert np.abs(expected - stored).mean() > 5
    pair = Pairs(tmp_path / "lq", tmp_path / "hq")[0]
    training = HQImages(tmp_path / "hq", crop_size=64, flips="none")
    window = tmp_path / "hq" / "m.csv"
    window.write_text("image_path,top,left,side\na.png,16,32,32\n")
    found = {
        "test": (pair["hq"], expected),
        "low": (pair["lq"], expected[:16, :16]),
        "prediction": (LQImages(tmp_path / "hq")[0]["lq"], expected),
        "training": (training[(0, 0, 0)]["hq"], expected),
        "window": (HQImages(window, crop_size=32, flips="none")[(0, 0, 0)]["hq"], expected[16:48, 32:64]),
        "validation": (DegradedCrops(tmp_path / "hq", 32, [0], None)[3]["hq"], expected[32:, 32:]),
    }
    for kind, (read, colour) in found.items():
        assert np.abs(read.permute(1, 2, 0).numpy() - colour).max() <= 1, kind


def test_resized_photos_are_converted_first(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (200, 100, 50)).save(tmp_path / "a.png", icc_profile=ADOBE_ICC)
    photo = HQImages(tmp_path, crop_size=32, rescales={"a": (0.5,)})[(0, 0, 0)]["hq"]
    np.testing.assert_allclose(photo[:, 16, 16], (226, 100, 42), atol=2)


def test_the_embedded_test_photo_is_adobe_rgb_and_comes_as_srgb() -> None:
    from data.photos import PHOTOS

    rocket = next(photo for photo in PHOTOS["test"] if photo.name == "rocket")
    with Image.open(rocket.path) as image:
        expected = by_library(np.asarray(image), image.info["icc_profile"])
    assert np.abs(read_image(rocket.path) - expected).max() <= 1
    crop = next(item for item in GridCrops("test", 256).items if item["name"] == "rocket")
    np.testing.assert_allclose(crop["hq"].permute(1, 2, 0) * 255, expected[:256, :256], atol=1.01)


@pytest.mark.parametrize("case", ["garbage", "cut", "of another space", "damaged chunk"])
def test_an_unusable_profile_is_ignored_and_named_once(
    tmp_path: Path, stored: np.ndarray, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    cmyk = profile(b"CMYK", b"Lab ", {b"A2B0": lookup(4, 1 - np.indices((2,) * 4)[3])})
    icc = {"garbage": b"none" * 60, "cut": ADOBE_ICC[:300], "of another space": cmyk}.get(case, ADOBE_ICC)
    for name in ("a.png", "b.png"):
        Image.fromarray(stored).save(tmp_path / name, icc_profile=icc)
        if case == "damaged chunk":
            data = bytearray((tmp_path / name).read_bytes())
            start = data.index(b"iCCP")
            length = struct.unpack(">I", data[start - 4 : start])[0]
            data[start + 24 : start + 30] = b"\xff" * 6
            data[start + 4 + length : start + 8 + length] = struct.pack(
                ">I", zlib.crc32(data[start : start + 4 + length])
            )
            (tmp_path / name).write_bytes(data)
    with caplog.at_level(logging.WARNING):
        for name in ("a.png", "b.png"):
            np.testing.assert_array_equal(read_image(tmp_path / name), stored)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"{tmp_path}/a.png: the colour profile is ignored")
    assert ("CMYK, the image is RGB" in message) == (case == "of another space")
