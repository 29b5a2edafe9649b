"""Any image file becomes the RGB a viewer shows, or an error that names the file and why."""

from __future__ import annotations

import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from data.decoding import IMAGE_EXTENSIONS, ImageError, image_size, is_image, read_image
from data.sources import list_images

from .orientation import UPRIGHT

ORIENTATION = 0x0112


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


class TestModes:
    def test_rgb_png_comes_back_as_written(self, tmp_path: Path, pixels: np.ndarray) -> None:
        Image.fromarray(pixels).save(tmp_path / "a.png")
        read = read_image(tmp_path / "a.png")
        assert read.dtype == np.uint8
        assert read.flags.writeable
        np.testing.assert_array_equal(read, pixels)

    @pytest.mark.parametrize("extension", sorted(IMAGE_EXTENSIONS))
    def test_every_extension_listed_can_be_read_in_upper_and_lower_case(self, tmp_path: Path, extension: str) -> None:
        flat = np.full((16, 24, 3), (200, 120, 40), np.uint8)
        kinds = {".jfif": "JPEG", ".jpg": "JPEG", ".tif": "TIFF", ".pgm": "PPM"}
        for name in (f"a{extension}", f"B{extension.upper()}"):
            image = Image.fromarray(flat).convert("L") if extension == ".pgm" else Image.fromarray(flat)
            image.save(tmp_path / name, format=kinds.get(extension, extension[1:].upper()))
            expected = np.full_like(flat, 135) if extension == ".pgm" else flat  # 0.299 R + 0.587 G + 0.114 B = 134.8
            assert is_image(name)
            assert np.abs(read_image(tmp_path / name).astype(int) - expected).max() <= 4  # lossy kinds
        assert len(list_images(tmp_path)) == 2

    def test_grey_and_bilevel_fill_all_channels(self, tmp_path: Path, pixels: np.ndarray) -> None:
        Image.fromarray(pixels[..., 0]).save(tmp_path / "l.png")
        np.testing.assert_array_equal(read_image(tmp_path / "l.png"), np.repeat(pixels[..., :1], 3, axis=2))
        Image.fromarray(pixels[..., 0] > 100).save(tmp_path / "1.png")
        expected = np.where(pixels[..., :1] > 100, 255, 0).repeat(3, axis=2)
        np.testing.assert_array_equal(read_image(tmp_path / "1.png"), expected)

    def test_palette_indices_become_their_colours(self, tmp_path: Path) -> None:
        image = Image.new("P", (3, 1))
        image.putpalette([10, 20, 30, 200, 100, 50, 0, 255, 0])
        for x in range(3):
            image.putpixel((x, 0), x)
        image.save(tmp_path / "p.png")
        assert read_image(tmp_path / "p.png").tolist() == [[[10, 20, 30], [200, 100, 50], [0, 255, 0]]]

    def test_transparent_palette_entry_is_white(self, tmp_path: Path) -> None:
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 200, 100, 50])
        image.putpixel((1, 0), 1)
        image.save(tmp_path / "p.png", transparency=1)
        assert read_image(tmp_path / "p.png").tolist() == [[[10, 20, 30], [255, 255, 255]]]

    def test_alpha_is_composited_over_white(self, tmp_path: Path) -> None:
        rgba = np.array([[[100, 0, 0, 255], [100, 0, 0, 0], [100, 0, 0, 51]]], np.uint8)
        Image.fromarray(rgba).save(tmp_path / "rgba.png")
        # 51/255 = 0.2: 0.2 * 100 + 0.8 * 255 = 224 and 0.8 * 255 = 204
        assert read_image(tmp_path / "rgba.png").tolist() == [[[100, 0, 0], [255, 255, 255], [224, 204, 204]]]
        Image.fromarray(rgba[..., [0, 3]], mode="LA").save(tmp_path / "la.png")
        assert read_image(tmp_path / "la.png")[0, :, 0].tolist() == [100, 255, 224]

    def test_cmyk_becomes_rgb(self, tmp_path: Path) -> None:
        Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "red.tif")
        assert read_image(tmp_path / "red.tif")[0, 0].tolist() == [255, 0, 0]

    def test_animation_gives_its_first_frame(self, tmp_path: Path) -> None:
        frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "blue")]
        for name in ("a.gif", "a.png", "a.webp"):
            frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
            red, green, blue = read_image(tmp_path / name)[0, 0].tolist()
            assert (red > 250, green < 5, blue < 5) == (True, True, True)


class TestSixteenBit:
    """Divided by 257 and rounded: 65535 -> 255, 128 -> 0, 129 -> 1; cutting off the low byte would be wrong by one."""

    values = np.array([[0, 128, 129, 32767, 40000, 65535]], np.uint16)
    expected = np.array([[0, 0, 1, 127, 156, 255]])  # 32767/257 = 127.498; 40000/257 = 155.6, high byte 156

    @pytest.mark.parametrize("name", ["g.png", "g.tif"])
    def test_grey(self, tmp_path: Path, name: str) -> None:
        cv2.imwrite(str(tmp_path / name), self.values)
        np.testing.assert_array_equal(read_image(tmp_path / name)[..., 2], self.expected)

    @pytest.mark.parametrize("name", ["c.png", "c.tif"])
    def test_colour_keeps_its_channel_order(self, tmp_path: Path, name: str) -> None:
        bgr = np.stack([self.values, self.values[:, ::-1], self.values // 2], axis=2)
        cv2.imwrite(str(tmp_path / name), bgr)
        read = read_image(tmp_path / name)
        np.testing.assert_array_equal(read[..., 2], self.expected)
        np.testing.assert_array_equal(read[..., 1], self.expected[:, ::-1])
        np.testing.assert_array_equal(read[..., 0], np.round(self.values // 2 / 257))

    def test_rounds_where_the_high_byte_differs(self, tmp_path: Path) -> None:
        ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
        cv2.imwrite(str(tmp_path / "ramp.png"), np.stack([ramp] * 3, axis=2))
        read = read_image(tmp_path / "ramp.png")
        np.testing.assert_array_equal(read[..., 0], np.round(ramp / 257))
        assert (read[..., 0] != ramp >> 8).any()

    def test_alpha_is_composited_over_white(self, tmp_path: Path) -> None:
        bgra = np.array([[[0, 0, 25700, 65535], [0, 0, 25700, 0]]], np.uint16)
        cv2.imwrite(str(tmp_path / "a.png"), bgra)
        assert read_image(tmp_path / "a.png").tolist() == [[[100, 0, 0], [255, 255, 255]]]

    @pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
    def test_png_with_exif_stands_upright(self, tmp_path: Path, orientation: int) -> None:
        values = np.random.default_rng(1).integers(0, 65536, (4, 7, 3), dtype=np.uint16)
        _, plain = cv2.imencode(".png", values)
        data = plain.tobytes()
        body = b"eXIf" + b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0" + bytes([orientation, 0, 0, 0]) + b"\0\0\0\0"
        chunk = (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
        (tmp_path / "o.png").write_bytes(data[:33] + chunk + data[33:])  # after the signature and IHDR
        expected = UPRIGHT[orientation](np.round(values[..., ::-1] / 257))
        np.testing.assert_array_equal(read_image(tmp_path / "o.png"), expected)

    def test_tiff_with_orientation_stands_upright(self, tmp_path: Path) -> None:
        Image.fromarray(self.values).save(tmp_path / "t.tif", tiffinfo={ORIENTATION: 6})
        np.testing.assert_array_equal(read_image(tmp_path / "t.tif")[..., 0], self.expected.T)
        assert image_size(tmp_path / "t.tif") == (6, 1)

    def test_32_bit_is_refused_by_name(self, tmp_path: Path) -> None:
        Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "f.tif")
        with pytest.raises(ImageError, match=r"f\.tif: TIFF with SampleFormat 3 has no known range, save it"):
            read_image(tmp_path / "f.tif")


class TestOrientation:
    @pytest.mark.parametrize("orientation", sorted(UPRIGHT))
    @pytest.mark.parametrize("name", ["o.png", "o.tif", "o.webp"])
    def test_all_eight_stand_upright(self, tmp_path: Path, pixels: np.ndarray, orientation: int, name: str) -> None:
        image = Image.fromarray(pixels)
        exif = image.getexif()
        exif[ORIENTATION] = orientation
        image.save(tmp_path / name, exif=exif, lossless=True)
        expected = UPRIGHT[orientation](pixels)
        np.testing.assert_array_equal(read_image(tmp_path / name), expected)
        assert image_size(tmp_path / name) == expected.shape[:2]

    def test_jpeg_of_a_turned_phone(self, tmp_path: Path) -> None:
        stored = np.zeros((32, 64, 3), np.uint8)
        stored[:, 48:] = 255  # bright at the right; turned by 90 degrees clockwise: bright below
        image = Image.fromarray(stored)
        exif = image.getexif()
        exif[ORIENTATION] = 6
        image.save(tmp_path / "p.JPG", exif=exif, quality=95)
        read = read_image(tmp_path / "p.JPG")
        assert read.shape == (64, 32, 3)
        assert read[56:].min() > 200
        assert read[:40].max() < 55
        assert image_size(tmp_path / "p.JPG") == (64, 32)


class TestBrokenFiles:
    @pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp", ".gif", ".bmp"])
    def test_truncated_file_is_named(self, tmp_path: Path, suffix: str) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"whole{suffix}")
        data = (tmp_path / f"whole{suffix}").read_bytes()
        (tmp_path / f"cut{suffix}").write_bytes(data[: len(data) // 2])
        with pytest.raises(ImageError, match=rf"cannot read image .*cut\{suffix}: .+; replace the file"):
            read_image(tmp_path / f"cut{suffix}")

    def test_truncated_16_bit_file_is_named(self, tmp_path: Path) -> None:
        noise = np.random.default_rng(0).integers(0, 65536, (64, 64, 3), dtype=np.uint16)
        data = cv2.imencode(".png", noise)[1].tobytes()
        (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
        with pytest.raises(ImageError, match=r"cut\.png"):
            read_image(tmp_path / "cut.png")

    def test_text_named_png_empty_file_and_missing_file_say_why(self, tmp_path: Path) -> None:
        (tmp_path / "text.png").write_text("<html>404</html>")
        (tmp_path / "empty.png").touch()
        for name, why in (
            ("text.png", "not an image"),
            ("empty.png", "the file is empty"),
            ("gone.png", "No such file"),
        ):
            with pytest.raises(ImageError, match=rf"{name}: {why}[^\n]*; replace the file or take it out") as caught:
                read_image(tmp_path / name)
            assert "\n" not in str(caught.value)
        with pytest.raises(ImageError, match=r"text\.png: not an image"):
            image_size(tmp_path / "text.png")

    def test_damaged_byte_in_a_png_is_named(self, tmp_path: Path, pixels: np.ndarray) -> None:
        Image.fromarray(pixels).save(tmp_path / "bad.png")
        data = bytearray((tmp_path / "bad.png").read_bytes())
        data[data.index(b"IDAT") + 10] ^= 0xFF
        (tmp_path / "bad.png").write_bytes(data)
        with pytest.raises(ImageError, match=r"bad\.png"):
            read_image(tmp_path / "bad.png")
