"""Whatever a header of a TIFF, PNG or PNM says, the pixels are those the test wrote, or the file is refused by name."""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from data import rasters
from data.decoding import ImageError, image_size, read_image

from .orientation import UPRIGHT

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR = 0, 1, 2, 3, 5, 6
CHANNELS = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, PALETTE: 1, CMYK: 4, YCBCR: 3}
UNSPECIFIED, ASSOCIATED, UNASSOCIATED = 0, 1, 2
NONE, LZW, DEFLATE, PACKBITS = 1, 5, 8, 32773


def as_bits(values: np.ndarray, bits: int, order: str = ">") -> bytes:
    """(rows, n) numbers, each row from a byte of its own."""
    if bits in {8, 16, 32}:
        return values.astype(f"{order}u{bits // 8}").tobytes()
    places = (values[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(places.reshape(len(values), -1).astype(np.uint8), axis=1).tobytes()


def lzw(data: bytes) -> bytes:
    """LZW without any compression: the table is cleared before a code needs more than 9 bits."""
    codes = [code for start in range(0, len(data), 200) for code in (256, *data[start : start + 200])] + [257]
    bits = "".join(f"{code:09b}" for code in codes)
    return int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")


def packbits(data: bytes) -> bytes:
    parts = [data[start : start + 128] for start in range(0, len(data), 128)]
    return b"".join(bytes([len(part) - 1]) + part for part in parts)


PACK: dict[int, Callable[[bytes], bytes]] = {NONE: bytes, LZW: lzw, DEFLATE: zlib.compress, PACKBITS: packbits}


def tiff(
    samples: np.ndarray,
    bits: int,
    photometric: int,
    planar: int = 1,
    compression: int = NONE,
    predictor: int = 1,
    order: str = "<",
    rows: int | None = None,
    tile: int | None = None,
    tags: dict[int, list[int]] | None = None,
) -> bytes:
    """A TIFF of (H, W, C) numbers, written by the standard's text (TIFF 6.0, sections 2, 7, 8 and 14 to 18)."""
    height, width, count = samples.shape
    stored = []
    for plane in [samples] if planar == 1 else list(np.moveaxis(samples[..., None], 2, 0)):
        if tile:
            padded = np.pad(plane, ((0, -height % tile), (0, -width % tile), (0, 0)))
            places = itertools.product(range(0, height, tile), range(0, width, tile))
            stored += [padded[top : top + tile, left : left + tile] for top, left in places]
        else:
            stored += [plane[top : top + (rows or height)] for top in range(0, height, rows or height)]
    if predictor == 2:
        stored = [np.diff(part.astype(np.int64), axis=1, prepend=0) % 2**bits for part in stored]
    parts = [PACK[compression](as_bits(part.reshape(len(part), -1), bits, order)) for part in stored]
    offsets = [8 + sum(map(len, parts[:i])) for i in range(len(parts))]
    entries: dict[int, list[int]] = {
        **{256: [width], 257: [height], 258: [bits] * count, 259: [compression], 262: [photometric]},
        **{277: [count], 284: [planar], 317: [predictor]},
    }
    sizes = [len(part) for part in parts]
    entries |= (
        {322: [tile], 323: [tile], 324: offsets, 325: sizes}
        if tile
        else {273: offsets, 278: [rows or height], 279: sizes}
    )
    entries |= tags or {}
    body = b"".join(parts) + bytes(sum(sizes) % 2)
    start = 8 + len(body)
    behind, directory = b"", struct.pack(f"{order}H", len(entries))
    for tag, values in sorted(entries.items()):
        kind, code = (4, "I") if tag in {273, 279, 324, 325} else (3, "H")
        data = struct.pack(f"{order}{len(values)}{code}", *values)
        if len(data) > 4:
            behind, data = behind + data, struct.pack(f"{order}I", start + 6 + 12 * len(entries) + len(behind))
        directory += struct.pack(f"{order}HHI", tag, kind, len(values)) + data.ljust(4, b"\0")
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}I", start) + body + directory + bytes(4) + behind


def shown(samples: np.ndarray, bits: int, photometric: int, extra: tuple[int, ...] = ()) -> np.ndarray:
    """The colours that a viewer shows over white, 0 to 255, by the standard's definitions."""
    values = samples / (2**bits - 1)
    channels = CHANNELS[photometric]
    colours = values[..., :channels]
    if photometric == WHITE_IS_ZERO:
        colours = 1 - colours
    if photometric == CMYK:
        colours = (1 - colours[..., :3]) * (1 - colours[..., 3:])
    colours = np.broadcast_to(colours, (*samples.shape[:2], 3))
    if extra and extra[0] != UNSPECIFIED:
        alpha = values[..., channels : channels + 1]
        colours = colours * (alpha if extra[0] == UNASSOCIATED else 1) + 1 - alpha
    return 255 * colours


def check(path: Path, expected: np.ndarray, about: object) -> None:
    """What is read agrees to 1/255, as does its size."""
    read = read_image(path)
    assert read.shape == expected.shape, about
    assert image_size(path) == read.shape[:2], about
    assert np.abs(read - expected).max() <= 1.001, about


class TestTiff:
    def test_any_combination_of_a_header_is_read_as_written(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        space: dict[str, list[Any]] = {
            "bits": [8, 16],
            "photometric": [WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, CMYK],
            "planar": [1, 2],
            "extra": [(), (UNSPECIFIED,), (ASSOCIATED,), (UNASSOCIATED,), (UNSPECIFIED,) * 2, (UNASSOCIATED, 0)],
            "packing": [(NONE, 1), (LZW, 1), (LZW, 2), (DEFLATE, 1), (DEFLATE, 2), (PACKBITS, 1)],
            "order": ["<", ">"],
            "layout": [{}, {"rows": 5}, {"rows": 1}, {"tile": 16}],
            "orientation": list(range(1, 9)),
        }
        kinds = [
            kind
            for kind in itertools.product(*space.values())
            if kind[3] != (ASSOCIATED,) or kind[1] in {BLACK_IS_ZERO, RGB}
        ]
        for number in rng.choice(len(kinds), 120, replace=False):
            bits, photometric, planar, extra, (compression, predictor), order, layout, orientation = kinds[number]
            samples = rng.integers(0, 2**bits, (13, 21, CHANNELS[photometric] + len(extra)))
            if extra == (ASSOCIATED,):  # no colour is above its alpha
                samples = np.minimum(samples, samples[..., -1:])
            tags = {274: [orientation]} | ({338: list(extra)} if extra else {})
            data = tiff(samples, bits, photometric, planar, compression, predictor, order, **layout, tags=tags)
            (tmp_path / "a.tif").write_bytes(data)
            expected = UPRIGHT[orientation](shown(samples, bits, photometric, extra))
            check(tmp_path / "a.tif", expected, kinds[number])

    @pytest.mark.parametrize("planar", ["contig", "separate"])
    @pytest.mark.parametrize("order", ["<", ">"])
    def test_files_of_another_writer_are_read_as_written(self, tmp_path: Path, planar: str, order: str) -> None:
        rng = np.random.default_rng(1)
        for dtype, big, compression in itertools.product((np.uint8, np.uint16), (False, True), (None, "zlib")):
            samples = rng.integers(0, np.iinfo(dtype).max + 1, (70, 50, 3), dtype=dtype)
            tifffile.imwrite(
                tmp_path / "a.tif",
                (samples if planar == "contig" else np.moveaxis(samples, 2, 0).copy()).astype(
                    f"{order}u{dtype(0).nbytes}"
                ),
                photometric="rgb",
                planarconfig=planar,
                byteorder=order,
                bigtiff=big,
                compression=compression,
                predictor=compression is not None,
                rowsperstrip=32,
            )
            check(tmp_path / "a.tif", samples * (255 / np.iinfo(dtype).max), (dtype, big, compression))

    @pytest.mark.parametrize("bits", [1, 2, 4, 8])
    def test_few_bits_and_palettes_are_read_as_written(self, tmp_path: Path, bits: int) -> None:
        rng = np.random.default_rng(bits)
        samples = rng.integers(0, 2**bits, (13, 21, 1))
        for photometric, order, compression in itertools.product((0, 1), "<>", (NONE, LZW, DEFLATE, PACKBITS)):
            data = tiff(samples, bits, photometric, order=order, compression=compression, rows=5)
            (tmp_path / "a.tif").write_bytes(data)
            check(tmp_path / "a.tif", shown(samples, bits, photometric), (photometric, order, compression))
        table = rng.integers(0, 256, (3, 2**bits))
        (tmp_path / "a.tif").write_bytes(tiff(samples, bits, PALETTE, tags={320: list((table * 257).ravel())}))
        check(tmp_path / "a.tif", table.T[samples[..., 0]], "palette")

    def test_bits_in_the_other_order_are_read_as_written(self, tmp_path: Path) -> None:
        samples = np.random.default_rng(0).integers(0, 2, (13, 24, 1))
        turned = samples.reshape(13, 3, 8)[..., ::-1].reshape(13, 24, 1)
        (tmp_path / "a.tif").write_bytes(tiff(turned, 1, BLACK_IS_ZERO, tags={266: [2]}))
        check(tmp_path / "a.tif", shown(samples, 1, BLACK_IS_ZERO), "FillOrder 2")

    @pytest.mark.parametrize(
        ("bits", "photometric", "more", "reason"),
        [
            (12, BLACK_IS_ZERO, {}, "12 bits"),
            (10, RGB, {}, "10/10/10 bits"),
            (32, BLACK_IS_ZERO, {}, "32 bits"),
            (16, BLACK_IS_ZERO, {"tags": {339: [2]}}, "SampleFormat 2"),
            (16, RGB, {"tags": {339: [3] * 3}}, "SampleFormat 3"),
            (8, BLACK_IS_ZERO, {"tags": {339: [2]}}, "SampleFormat 2"),
            (8, YCBCR, {}, "PhotometricInterpretation 6"),
            (8, CMYK, {"tags": {338: [ASSOCIATED]}}, "8 bits, 5 samples.*PhotometricInterpretation 5"),
            (16, PALETTE, {"tags": {320: [0] * 3 * 2**10}}, "16 bits.*PhotometricInterpretation 3"),
            (4, RGB, {"planar": 2}, "4 bits.*PlanarConfiguration 2"),
            (16, BLACK_IS_ZERO, {"tags": {262: [32803]}}, "PhotometricInterpretation 32803"),
            (16, BLACK_IS_ZERO, {"tags": {259: [34712]}}, "Compression 34712"),
            (16, BLACK_IS_ZERO, {"tags": {317: [2]}}, "Compression 1.*Predictor 2"),
            (8, BLACK_IS_ZERO, {"tags": {266: [2]}}, "FillOrder 2"),
        ],
    )
    def test_what_is_not_supported_is_refused_by_name(
        self, tmp_path: Path, bits: int, photometric: int, more: dict[str, Any], reason: str
    ) -> None:
        count = CHANNELS[photometric] + len(more.get("tags", {}).get(338, []))
        samples = np.random.default_rng(0).integers(0, 2**bits, (6, 8, count))
        (tmp_path / "odd.tif").write_bytes(tiff(samples, bits, photometric, **more))
        for read in (read_image, image_size):
            with pytest.raises(ImageError, match=rf"odd\.tif: TIFF with .*{reason}.*; replace the file"):
                read(tmp_path / "odd.tif")

    @pytest.mark.parametrize("compression", sorted(PACK))
    @pytest.mark.parametrize("planar", [1, 2])
    def test_a_cut_or_damaged_file_is_refused(self, tmp_path: Path, compression: int, planar: int) -> None:
        samples = np.random.default_rng(0).integers(0, 2**16, (40, 30, 3))
        data = tiff(samples, 16, RGB, planar, compression, rows=16)
        (tmp_path / "cut.tif").write_bytes(data[: len(data) // 2])
        with pytest.raises(ImageError, match=r"cut\.tif"):
            read_image(tmp_path / "cut.tif")
        end = struct.unpack_from("<I", data, 4)[0]
        (tmp_path / "wrong.tif").write_bytes(data[:8] + b"\xff" * 200 + data[208:end] + data[end:])
        if compression in {LZW, DEFLATE}:
            with pytest.raises(ImageError, match=r"wrong\.tif"):
                read_image(tmp_path / "wrong.tif")
        short = tiff(samples[:20], 16, RGB, planar, compression, rows=16, tags={257: [40]})
        (tmp_path / "short.tif").write_bytes(short)
        with pytest.raises(ImageError, match=r"short\.tif"):
            read_image(tmp_path / "short.tif")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(samples: np.ndarray, colour: int, bits: int, interlaced: bool = False, chunks: bytes = b"") -> bytes:
    """A PNG of (H, W, C) numbers, with the passes of Adam7 where interlaced (PNG, sections 8 and 11)."""
    height, width, _ = samples.shape
    passes = [samples]
    if interlaced:
        starts = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
        passes = [samples[top::down, left::right] for top, left, down, right in starts]
    lines = (line for part in passes if part.size for line in part.reshape(len(part), 1, -1))
    body = b"".join(b"\0" + as_bits(line, bits) for line in lines)
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunks + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")
    )


class TestPng:
    KINDS = [(0, b) for b in (1, 2, 4, 8, 16)] + [(c, b) for c in (2, 4, 6) for b in (8, 16)]

    @pytest.mark.parametrize("interlaced", [False, True])
    @pytest.mark.parametrize(("colour", "bits"), KINDS)
    def test_every_kind_is_read_as_written(self, tmp_path: Path, colour: int, bits: int, interlaced: bool) -> None:
        photometric, extra = {
            0: (BLACK_IS_ZERO, ()),
            2: (RGB, ()),
            4: (BLACK_IS_ZERO, (UNASSOCIATED,)),
            6: (RGB, (UNASSOCIATED,)),
        }[colour]
        rng = np.random.default_rng(0)
        samples = rng.integers(0, 2**bits, (13, 21, CHANNELS[photometric] + len(extra)))
        for orientation in UPRIGHT:
            exif = chunk(b"eXIf", b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0" + bytes([orientation] + [0] * 7))
            (tmp_path / "a.png").write_bytes(png(samples, colour, bits, interlaced, exif))
            check(tmp_path / "a.png", UPRIGHT[orientation](shown(samples, bits, photometric, extra)), orientation)

    @pytest.mark.parametrize(("colour", "bits"), [kind for kind in KINDS if kind[0] in {0, 2}])
    def test_a_transparent_colour_is_white(self, tmp_path: Path, colour: int, bits: int) -> None:
        channels = 3 if colour == 2 else 1
        samples = np.random.default_rng(bits).integers(0, 2**bits, (13, 21, channels))
        key = samples[5, 7]
        samples[8, 3] = key
        if bits == 16:  # the same high bytes are another colour
            samples[0, 0], key = key ^ 1, key
        (tmp_path / "a.png").write_bytes(
            png(samples, colour, bits, chunks=chunk(b"tRNS", struct.pack(f">{channels}H", *key)))
        )
        expected = shown(samples, bits, RGB if colour == 2 else BLACK_IS_ZERO)
        expected = np.where((samples == key).all(axis=2, keepdims=True), 255, expected)
        check(tmp_path / "a.png", expected, key)

    @pytest.mark.parametrize("bits", [1, 2, 4, 8])
    def test_palettes_with_alpha_are_read_as_written(self, tmp_path: Path, bits: int) -> None:
        rng = np.random.default_rng(bits)
        samples = rng.integers(0, 2**bits, (13, 21, 1))
        table, alpha = rng.integers(0, 256, (2**bits, 3), dtype=np.uint8), rng.integers(0, 256, 2**bits, dtype=np.uint8)
        chunks = chunk(b"PLTE", table.tobytes()) + chunk(b"tRNS", alpha.tobytes())
        (tmp_path / "a.png").write_bytes(png(samples, 3, bits, chunks=chunks))
        colours = np.concatenate([table, alpha[:, None]], axis=1)[samples[..., 0]]
        check(tmp_path / "a.png", shown(colours, 8, RGB, (UNASSOCIATED,)), bits)


class TestPnm:
    @pytest.mark.parametrize("most", [1, 15, 100, 255, 256, 1000, 65534, 65535])
    @pytest.mark.parametrize("kind", [2, 3, 5, 6])
    def test_any_largest_value_is_white(self, tmp_path: Path, kind: int, most: int) -> None:
        samples = np.random.default_rng(most).integers(0, most + 1, (13, 21, 1 if kind in {2, 5} else 3))
        head = f"P{kind}\n# a comment\n21 13\n{most}\n".encode()
        if kind < 4:
            body = " ".join(map(str, samples.ravel())).encode()
        else:
            body = as_bits(samples.reshape(13, -1), 8 if most < 256 else 16)
        name = tmp_path / ("a.pgm" if kind in {2, 5} else "a.ppm")
        name.write_bytes(head + body)
        check(name, np.broadcast_to(255 * samples / most, (13, 21, 3)), (kind, most))

    @pytest.mark.parametrize("kind", [1, 4])
    def test_bilevel_files_have_ones_for_black(self, tmp_path: Path, kind: int) -> None:
        samples = np.random.default_rng(0).integers(0, 2, (13, 21))
        body = " ".join(map(str, samples.ravel())).encode() if kind == 1 else as_bits(samples, 1)
        (tmp_path / "a.ppm").write_bytes(f"P{kind}\n21 13\n".encode() + body)
        check(tmp_path / "a.ppm", np.broadcast_to(255 * (1 - samples[..., None]), (13, 21, 3)), kind)


class TestLimits:
    """No limit but memory: PIL's own would refuse large photos and photos with much text."""

    @staticmethod
    def bilevel(path: Path, width: int, height: int) -> Path:
        head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
        body = zlib.compress(bytes(height * (1 + -(-width // 8))), 1)
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b""))
        return path

    def test_a_large_photo_is_no_attack(self, tmp_path: Path) -> None:
        assert image_size(self.bilevel(tmp_path / "large.png", 14000, 13000)) == (13000, 14000)

    def test_what_memory_does_not_hold_is_refused_before_it_is_decoded(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rasters, "_free_memory", lambda: 2**31)
        large = self.bilevel(tmp_path / "large.png", 14000, 14000)
        # 196 MP of 12 bytes are 2.19 GiB
        reason = r"large\.png: 14000x14000 px take 2\.2 GiB .*, 2\.0 GiB are free; .* ISR_MAX_PIXELS=196000000 to try"
        for read in (read_image, image_size):
            with pytest.raises(ImageError, match=reason):
                read(large)

    def test_the_environment_sets_another_limit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ISR_MAX_PIXELS", "6")
        (tmp_path / "a.png").write_bytes(png(np.zeros((2, 3, 3), np.int64), 2, 8))
        (tmp_path / "b.png").write_bytes(png(np.zeros((2, 4, 3), np.int64), 2, 8))
        assert read_image(tmp_path / "a.png").shape == (2, 3, 3)
        for read in (read_image, image_size):
            with pytest.raises(ImageError, match=r"b\.png: 4x2 px are more than ISR_MAX_PIXELS=6; set it to 8 or more"):
                read(tmp_path / "b.png")
        monkeypatch.setenv("ISR_MAX_PIXELS", "1e9")
        with pytest.raises(ImageError, match="ISR_MAX_PIXELS=1e9 is not a number of pixels; set a whole number"):
            image_size(tmp_path / "a.png")

    def test_the_free_memory_is_that_of_the_machine(self) -> None:
        assert 2**26 < rasters._free_memory() < 2**46

    def test_megabytes_of_text_are_read_over(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        samples = np.random.default_rng(0).integers(0, 256, (4, 5, 3))
        text = chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"x" * 2_000_000))
        (tmp_path / "a.png").write_bytes(png(samples, 2, 8, chunks=text))
        np.testing.assert_array_equal(read_image(tmp_path / "a.png"), samples)
        monkeypatch.setattr(rasters.PngImagePlugin, "MAX_TEXT_CHUNK", 1000)
        with pytest.raises(ImageError, match=r"a\.png: its texts .* take more than 268435456 bytes; save it without"):
            read_image(tmp_path / "a.png")
