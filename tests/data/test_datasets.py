"""A training sample is a function of (seed, epoch, index); workers, ranks and resumes do not change it."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from data.datasets import DegradedCrops, HQImages, LQImages, degrade, resize_by
from data.decoding import ImageError, read_image
from data.degradations.config import preset
from data.degradations.realesrgan import Degradation, bicubic_downsample
from data.prompts import Prompts
from data.sampler import StreamSampler
from data.sources import Part


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


def hwc(tensor: torch.Tensor) -> np.ndarray:
    return tensor.permute(1, 2, 0).numpy()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for i in range(4):
        save(tmp_path / "photos" / f"{i}.png", noise(48 + 8 * i, 60, seed=i))
    return tmp_path / "photos"


class TestHQImages:
    def test_sample_is_a_crop_of_its_photo_and_its_bicubic_half(self, photos: Path) -> None:
        dataset = HQImages(photos, scale=2, crop_size=32, seed=7, flips="none")
        sample = dataset[(0, 2, 99)]
        hq, photo = hwc(sample["hq"]), read_image(photos / "2.png")
        windows = np.lib.stride_tricks.sliding_window_view(photo, (32, 32), axis=(0, 1)).transpose(0, 1, 3, 4, 2)
        assert (windows == hq).all(axis=(2, 3, 4)).any()
        np.testing.assert_array_equal(hwc(sample["lq"]), bicubic_downsample(hq, 2))
        assert sample["lq"].shape == (3, 16, 16)
        assert sample["lq"].dtype == sample["hq"].dtype == torch.uint8
        assert (sample["name"], sample["prompt"], sample["index"]) == ("2", "", 99)

    def test_flips_reach_all_eight_positions_and_off_means_off(self, tmp_path: Path) -> None:
        photo = noise(16, 16)
        save(tmp_path / "a.png", photo)
        dataset = HQImages(tmp_path, scale=4, crop_size=16)
        seen = {dataset[(epoch, 0, 0)]["hq"].numpy().tobytes() for epoch in range(100)}
        turned = [np.rot90(side, k) for side in (photo, photo[:, ::-1]) for k in range(4)]
        assert seen == {side.transpose(2, 0, 1).tobytes() for side in turned}
        plain = HQImages(tmp_path, scale=4, crop_size=16, flips="none")
        assert {plain[(epoch, 0, 0)]["hq"].numpy().tobytes() for epoch in range(20)} == {
            photo.transpose(2, 0, 1).tobytes()
        }
        mirrored = HQImages(tmp_path, scale=4, crop_size=16, flips="horizontal")
        assert {mirrored[(epoch, 0, 0)]["hq"].numpy().tobytes() for epoch in range(20)} == {
            side.transpose(2, 0, 1).tobytes() for side in (photo, photo[:, ::-1])
        }
        with pytest.raises(ValueError, match="flips=True is unknown; set flips to one of none, horizontal, all"):
            HQImages(tmp_path, scale=4, crop_size=16, flips=True)  # type: ignore[arg-type]  # the mistake under test

    def test_first_counts_photos_and_weight_their_draws(
        self, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        rows = ["3.png,0,0,16", "1.png,0,0,16", "3.png,9,9,16", "0.png,0,0,16"]
        (photos / "m.csv").write_text("\n".join(["path,top,left,side", *rows, ""]))

        def drawn(*source: str | Part) -> list[str]:
            dataset = HQImages(list(source), 4, 16)
            return [dataset[(0, index, 0)]["name"] for index in range(len(dataset))]

        assert drawn(Part(str(photos), first=2)) == ["0", "1"]
        assert drawn(Part(str(photos / "m.csv"), first=2)) == ["3", "1", "3"]
        assert drawn(Part(str(photos), 1, 3), str(photos / "2.png")) == ["0", "0", "0", "2"]
        assert not caplog.records
        assert drawn(Part(str(photos), first=9)) == ["0", "1", "2", "3"]
        assert "photos has 4 photos, fewer than first=9; all are taken" in caplog.text
        left = HQImages(Part(str(photos), first=3, weight=2), 4, 16).inventory("train")
        assert str(left) == (
            f"train={photos} (first 3, weight 2): 3 images (photos to degrade); not used: 2 files (1 .png, 1 .csv)"
        )
        for wrong in ({"first": 0}, {"weight": 0}):
            with pytest.raises(ValueError, match=r"(first|weight)=0 of .* is out of range; set (first|weight) >= 1"):
                Part(str(photos), **wrong)

    def test_depends_on_seed_epoch_and_index_but_not_on_position_or_what_came_before(self, photos: Path) -> None:
        degradation = Degradation(preset("osediff"))

        def lq(seed: int, key: tuple[int, int, int]) -> bytes:
            return HQImages(photos, 4, 32, degradation, seed)[key]["lq"].numpy().tobytes()

        reference = lq(0, (1, 2, 5))
        again = HQImages(photos, 4, 32, degradation, 0)
        for index in (3, 0, 2):
            again[(0, index, 0)]
        assert again[(1, 2, 77)]["lq"].numpy().tobytes() == reference
        assert reference not in {lq(1, (1, 2, 5)), lq(0, (2, 2, 5)), lq(0, (1, 3, 5))}

    def test_workers_change_nothing(self, photos: Path) -> None:
        (photos / "2b.png").write_text("no image")
        batches = []
        for workers in (0, 2):
            dataset = HQImages(photos, 4, 32, Degradation(preset("osediff")))
            sampler = StreamSampler(len(dataset), 3, seed=1, batches_per_epoch=4)
            batches.append(list(DataLoader(dataset, batch_sampler=sampler, num_workers=workers)))
            assert dataset.skipped == [photos / "2b.png"]  # seen from the main process, too
        for alone, shared in zip(*batches, strict=True):
            assert alone["name"] == shared["name"]
            for key in ("lq", "hq", "index"):
                assert torch.equal(alone[key], shared[key])

    def test_small_photo_is_continued_by_reflection(self, tmp_path: Path) -> None:
        photo = noise(10, 40)
        save(tmp_path / "a.png", photo)
        hq = hwc(HQImages(tmp_path, scale=4, crop_size=24, flips="none")[(0, 0, 0)]["hq"])
        rows = [*range(10), *range(8, -1, -1), *range(1, 6)]  # 0..9, back 8..0, on 1..5: no edge row twice
        left = next(x for x in range(17) if (photo[:, x : x + 24] == hq[:10]).all())
        np.testing.assert_array_equal(hq, photo[rows, left : left + 24])

    def test_corrupt_file_is_replaced_by_the_next_counted_and_named_once(
        self, photos: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (photos / "1.png").write_bytes((photos / "1.png").read_bytes()[:200])
        dataset = HQImages(photos, 4, 32)
        with caplog.at_level(logging.WARNING):
            names = [dataset[(epoch, 1, 0)]["name"] for epoch in range(3)]
        assert names == ["2", "2", "2"]
        assert dataset.skipped == [photos / "1.png"]
        assert len(caplog.records) == 1
        assert f"skipped, 1 so far: cannot read image {photos}/1.png" in caplog.text
        assert not torch.equal(dataset[(0, 1, 0)]["hq"], dataset[(0, 2, 0)]["hq"])  # another crop than 2's own

    def test_last_file_corrupt_wraps_to_the_first(self, photos: Path) -> None:
        (photos / "3.png").write_text("no image")
        assert HQImages(photos, 4, 32)[(0, 3, 0)]["name"] == "0"

    def test_corrupt_file_is_fatal_if_asked_and_so_are_all_files(self, photos: Path) -> None:
        (photos / "1.png").write_text("no image")
        with pytest.raises(ImageError, match=r"1\.png"):
            HQImages(photos, 4, 32, on_error="raise")[(0, 1, 0)]
        for i in (0, 2, 3):
            (photos / f"{i}.png").write_text("no image")
        with pytest.raises(ImageError, match=r"none of the 4 images can be read, among them .*0\.png.*replace"):
            HQImages(photos, 4, 32)[(0, 1, 0)]

    def test_rescaled_photos_are_there_once_a_factor(self, photos: Path) -> None:
        dataset = HQImages(photos, 4, 16, rescales={"1": (1.0, 0.5)}, cache=True)
        assert len(dataset) == 5
        assert [dataset[(0, i, 0)]["name"] for i in range(5)] == ["0", "1", "1", "2", "3"]
        half = resize_by(read_image(photos / "1.png"), 0.5)
        assert half.shape == (28, 30, 3)
        window = HQImages(photos, 4, 28, rescales={"1": (0.5,)}, flips="none")[(0, 1, 0)]["hq"]
        assert any(np.array_equal(half[:, x : x + 28], hwc(window)) for x in range(3))
        first, second = (dataset[(0, 2, 0)]["hq"] for _ in range(2))  # the second from the cache
        assert torch.equal(first, second)

    def test_prompts_of_manifest_then_of_folder(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            save(tmp_path / f"{name}.png", noise(16, 16))
        (tmp_path / "m.csv").write_text("path,prompt\na.png,from the manifest\n")
        (tmp_path / "texts").mkdir()
        (tmp_path / "texts" / "b.txt").write_text("from the folder\n")
        source = [str(tmp_path / "m.csv"), str(tmp_path / "b.png")]
        dataset = HQImages(source, 4, 16, prompts=Prompts(tmp_path / "texts"))
        assert [dataset[(0, i, 0)]["prompt"] for i in (0, 1)] == ["from the manifest", "from the folder"]

    def test_a_window_of_the_crops_size_is_the_crop_and_has_its_own_prompt(self, photos: Path, tmp_path: Path) -> None:
        (tmp_path / "m.csv").write_text(
            "image_path,top,left,side,prompt\nphotos/2.png,5,7,16,first\nphotos/2.png,48,44,16,corner\n"
            "photos/0.png,0,1,16,\nphotos/2.png,0,0,16,last\n"
        )
        dataset = HQImages(tmp_path / "m.csv", 4, 16, flips="none")
        photo, other = read_image(photos / "2.png"), read_image(photos / "0.png")
        expected = [photo[5:21, 7:23], photo[48:64, 44:60], other[:16, 1:17], photo[:16, :16]]
        for epoch in range(3):
            samples = [dataset[(epoch, i, i)] for i in range(4)]
            for sample, pixels in zip(samples, expected, strict=True):
                np.testing.assert_array_equal(hwc(sample["hq"]), pixels)
                np.testing.assert_array_equal(hwc(sample["lq"]), bicubic_downsample(pixels, 4))
            assert [sample["prompt"] for sample in samples] == ["first", "corner", "", "last"]
            assert [sample["name"] for sample in samples] == ["2", "2", "0", "2"]

    @pytest.mark.parametrize("cache", [False, True])
    def test_crops_of_a_larger_window_reach_all_of_it_and_nothing_else(
        self, photos: Path, tmp_path: Path, cache: bool
    ) -> None:
        (tmp_path / "m.csv").write_text("path,top,left,side\nphotos/3.png,10,20,14\nphotos/3.png,0,0,13\n")
        dataset = HQImages(tmp_path / "m.csv", 4, 12, flips="none", cache=cache)
        photo = read_image(photos / "3.png")
        for item, (top, left, side) in enumerate([(10, 20, 14), (0, 0, 13)]):
            places = [(y, x) for y in range(top, top + side - 11) for x in range(left, left + side - 11)]
            seen = {hwc(dataset[(epoch, item, 0)]["hq"]).tobytes() for epoch in range(100)}
            assert seen == {photo[y : y + 12, x : x + 12].tobytes() for y, x in places}

    def test_a_photo_that_is_not_the_windows_is_skipped_once_with_all_its_windows(
        self, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "m.csv").write_text(
            "path,top,left,side\nphotos/0.png,33,0,16\nphotos/0.png,0,0,16\nphotos/1.png,0,0,16\n"
        )
        dataset = HQImages(tmp_path / "m.csv", 4, 16)
        with caplog.at_level(logging.WARNING):
            assert [dataset[(0, i, 0)]["name"] for i in (0, 1, 2)] == ["1", "1", "1"]
        assert dataset.skipped == [photos / "0.png"]
        assert len(caplog.records) == 1
        assert "0.png is 60x48, but source has a window of it with top=33, left=0, side=16" in caplog.text

    def test_windows_smaller_than_the_crop_are_refused(self, photos: Path, tmp_path: Path) -> None:
        (tmp_path / "m.csv").write_text("path,top,left,side\nphotos/0.png,0,0,18\nphotos/0.png,0,0,40\n")
        with pytest.raises(ValueError, match=r"crop_size=32 does not fit .* source=.*side 18; set crop_size to 16"):
            HQImages(tmp_path / "m.csv", 4, 32)

    def test_errors_name_argument_value_and_fix(self, photos: Path) -> None:
        with pytest.raises(ValueError, match="crop_size=30 is not a multiple of scale=4; set crop_size to 28"):
            HQImages(photos, 4, 30)
        with pytest.raises(ValueError, match="scale=0 is out of range; set scale >= 1"):
            HQImages(photos, 0, 32)
        with pytest.raises(ValueError, match="on_error=ignore is unknown; set on_error to skip or raise"):
            HQImages(photos, 4, 32, on_error="ignore")  # type: ignore[arg-type]  # the mistake under test
        with pytest.raises(ValueError, match="16x16 of 64x64, which is not scale=2; set the degradation's scale to 2"):
            degrade(noise(64, 64), Degradation(preset("osediff")), 2, np.random.default_rng(0))


class TestLQImages:
    def test_whole_image_without_reference(self, tmp_path: Path) -> None:
        image = noise(7, 5)
        save(tmp_path / "a.png", image)
        sample = LQImages(tmp_path, prompts={"a": "a cat"})[0]
        np.testing.assert_array_equal(hwc(sample["lq"]), image)
        assert "hq" not in sample
        assert (sample["name"], sample["prompt"], sample["index"]) == ("a", "a cat", 0)

    def test_names_are_unique_and_keep_folders(self, tmp_path: Path) -> None:
        for name in ("a.png", "a.jpg", "b.png", "sub/a.png", "sub/b.v2.png"):
            save(tmp_path / name, noise(4, 4))
        assert LQImages(tmp_path).names == ["a.jpg", "a.png", "b", "sub/a", "sub/b.v2"]
        (tmp_path / "l.txt").write_text("sub/b.v2.png\nb.png\n")
        assert LQImages(tmp_path / "l.txt").names == ["b.v2", "b"]
        (tmp_path / "l.txt").write_text("sub/../b.png\nsub/a.png\na.png\n")
        assert LQImages(tmp_path / "l.txt").names == ["b", "sub/a", "a"]

    def test_unreadable_files_stop_or_are_named(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        save(tmp_path / "a.png", noise(4, 4))
        (tmp_path / "b.png").write_text("no image")
        with pytest.raises(ImageError, match=r"b\.png: not an image"):
            LQImages(tmp_path)
        with caplog.at_level(logging.WARNING):
            assert LQImages(tmp_path, on_error="skip").names == ["a"]
        assert "skipped 1" in caplog.text
        assert "b.png" in caplog.text
        with pytest.raises(ImageError, match=r"predict=.*b\.png: none of its images can be read"):
            LQImages(tmp_path / "b.png", on_error="skip", argument="predict")

    def test_one_image_listed_twice_or_references_within_are_refused(self, tmp_path: Path) -> None:
        save(tmp_path / "set" / "test_LR" / "a.png", noise(4, 4))
        save(tmp_path / "set" / "test_HR" / "a.png", noise(16, 16))
        with pytest.raises(ValueError, match=r"source=.* holds references \(.*test_HR\).*; give .*set/test_LR"):
            LQImages(tmp_path)
        (tmp_path / "l.txt").write_text("set/test_LR/a.png\nset/test_LR/a.png\n")
        with pytest.raises(ValueError, match=r"source=.*l\.txt lists .*a\.png more than once; keep one"):
            LQImages(tmp_path / "l.txt")


class TestDegradedCrops:
    def test_grid_covers_the_photo_from_the_upper_left(self, tmp_path: Path) -> None:
        photo = noise(70, 100)
        save(tmp_path / "chelsea.png", photo)
        crops = DegradedCrops({"chelsea": tmp_path / "chelsea.png"}, 32, [0, 5], None)
        assert len(crops) == 2 * 3 * 2
        assert [crops[i]["name"] for i in range(4)] == [f"chelsea_r0c{c}_s{s}" for c in (0, 1) for s in (0, 5)]
        last = crops[11]
        assert (last["name"], last["index"]) == ("chelsea_r1c2_s5", 11)
        np.testing.assert_array_equal(hwc(last["hq"]), photo[32:64, 64:96])
        np.testing.assert_array_equal(hwc(last["lq"]), bicubic_downsample(photo[32:64, 64:96], 4))

    def test_degradation_depends_on_crop_and_seed_and_not_on_the_other_photos(self, tmp_path: Path) -> None:
        paths = {name: save(tmp_path / f"{name}.png", np.full((64, 64, 3), 128, np.uint8)) for name in ("b", "a")}
        degradation = Degradation(preset("osediff"))
        both = DegradedCrops(paths, 32, range(2), degradation)
        lq = {both[i]["name"]: both[i]["lq"] for i in reversed(range(len(both)))}
        assert len({value.numpy().tobytes() for value in lq.values()}) == 16  # all differ
        alone = DegradedCrops({"a": paths["a"]}, 32, [1], degradation)
        assert all(torch.equal(alone[i]["lq"], lq[alone[i]["name"]]) for i in range(4))

    def test_at_most_so_many_spread_evenly(self, tmp_path: Path) -> None:
        for name in ("a", "b", "c"):
            save(tmp_path / f"{name}.png", noise(32, 64))
        crops = DegradedCrops(tmp_path, 32, [0], None, max_crops=3)
        assert [crops[i]["name"] for i in range(3)] == ["a_r0c0_s0", "b_r0c0_s0", "c_r0c0_s0"]
        assert len(DegradedCrops(tmp_path, 32, [0], None, max_crops=99)) == 6

    def test_photo_smaller_than_a_crop_is_named(self, tmp_path: Path) -> None:
        save(tmp_path / "big.png", noise(64, 64))
        save(tmp_path / "small.png", noise(20, 64))
        with pytest.raises(ValueError, match=r"small\.png is 64x20, smaller than crop_size=32; set a smaller"):
            DegradedCrops(tmp_path, 32, [0], None)
        crops = DegradedCrops(tmp_path, 32, [0], None, on_error="skip")
        assert len(crops) == 4
        assert "small.png" in crops.skipped[0]
        with pytest.raises(ValueError, match="no photo holds a crop of crop_size=128; set a smaller crop_size"):
            DegradedCrops(tmp_path, 128, [0], None, on_error="skip")

    def test_a_window_is_cut_like_a_photo_and_has_its_own_prompt(self, tmp_path: Path) -> None:
        photo, other = noise(70, 100), noise(40, 40, 1)
        save(tmp_path / "a.png", photo)
        save(tmp_path / "b.png", other)
        (tmp_path / "m.csv").write_text(
            "image_path,top,left,side,prompt\na.png,5,7,32,first\na.png,6,36,64,large\na.png,5,7,32,again\nb.png,8,8,32,\n"
        )
        crops = DegradedCrops(tmp_path / "m.csv", 32, [3], None)
        samples = [crops[i] for i in range(len(crops))]
        places = [(5, 7), (6, 36), (6, 68), (38, 36), (38, 68)]
        expected = [photo[y : y + 32, x : x + 32] for y, x in places] + [other[8:40, 8:40]]
        for sample, pixels in zip(samples, expected, strict=True):
            np.testing.assert_array_equal(hwc(sample["hq"]), pixels)
            np.testing.assert_array_equal(hwc(sample["lq"]), bicubic_downsample(pixels, 4))
        assert [sample["prompt"] for sample in samples] == ["again", *["large"] * 4, ""]
        assert crops.sample_names == [sample["name"] for sample in samples]
        assert crops.sample_names[:2] == ["a_5_7_32_r0c0_s3", "a_6_36_64_r0c0_s3"]
        assert "2 images (photos, 3 windows, cut to 6 crops of 32 px)" in str(crops.inventory("val"))

    def test_a_photo_that_is_not_the_windows_is_left_out_with_all_its_windows(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            save(tmp_path / f"{name}.png", noise(48, 60))
        (tmp_path / "m.csv").write_text("path,top,left,side\na.png,0,0,32\na.png,17,0,32\nb.png,16,28,32\n")
        message = "a.png is 60x48, but val has a window of it with top=17, left=0, side=32"
        with pytest.raises(ImageError, match=message):
            DegradedCrops(tmp_path / "m.csv", 32, [0], None, argument="val")
        crops = DegradedCrops(tmp_path / "m.csv", 32, [0], None, on_error="skip", argument="val")
        assert crops.sample_names == ["b_16_28_32_r0c0_s0"]
        (tmp_path / "p.csv").write_text("name,prompt\na,one\nb,other\n")
        texts = Prompts(tmp_path / "p.csv")  # by the photo's name, as in training
        assert DegradedCrops(tmp_path / "m.csv", 32, [0], None, 4, texts, None, "skip")[0]["prompt"] == "other"
        assert [message in reason for reason in crops.skipped] == [True]
        with pytest.raises(ValueError, match=r"crop_size=64 does not fit .* val=.*m\.csv, .* side 32; set it to 32"):
            DegradedCrops(tmp_path / "m.csv", 64, [0], None, on_error="skip", argument="val")

    def test_errors_name_argument_value_and_fix(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"seeds=\[\] leaves no crops; give at least one seed"):
            DegradedCrops(tmp_path, 32, [], None)
        with pytest.raises(ValueError, match="max_crops=0 leaves no crops; set max_crops >= 1 or null"):
            DegradedCrops(tmp_path, 32, [0], None, max_crops=0)
