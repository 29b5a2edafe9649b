"""Contract of data.datamodules.

- Sources become the right datasets, named for the metrics; wrong ones are refused before anything runs.
- Under Lightning a resumed run goes on with the next sample, and ranks share everything out.
- `Photos` needs no arguments, and its roles are fixed.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

import data
from data import Photos, SRData
from data.datasets import DegradedCrops, HQImages, LQImages
from data.degradations.config import DegradationConfig, preset
from data.pairing import Pairs
from data.photos import CAPTIONS, PHOTOS
from data.sources import Part


def save(path: Path, height: int, width: int, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def hq(tmp_path: Path) -> Path:
    for i in range(5):
        save(tmp_path / "hq" / f"{i}.png", 40, 48, seed=i)
    return tmp_path / "hq"


def benchmark(folder: Path, n: int = 3) -> str:
    for i in range(n):
        save(folder / "test_LR" / f"{i}.png", 8, 8, seed=i)
        save(folder / "test_HR" / f"{i}.png", 32, 32, seed=i)
    return str(folder)


def small(**kwargs: Any) -> SRData:
    return SRData(**{"crop_size": 16, "batch_size": 2, "num_workers": 0, **kwargs})


class Recorder(LightningModule):
    """Notes what it is given; counts its training steps itself if told to."""

    def __init__(self, counts: bool = True) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        if counts:
            self.register_buffer("train_step", torch.zeros((), dtype=torch.int64))
        self.counts = counts
        self.seen: list[tuple[list[int], bytes]] = []
        self.evaluated: list[str] = []

    def training_step(self, batch: dict[str, Any], _batch_idx: int) -> torch.Tensor:
        assert batch["lq"].dtype == torch.uint8
        self.seen.append((batch["index"].tolist(), batch["lq"].numpy().tobytes()))
        if self.counts:
            self.train_step += 1
        return self.weight * 1.0

    def validation_step(self, batch: dict[str, Any], _batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluated.append(f"{dataloader_idx}/{batch['name'][0]}")

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, **kwargs: Any) -> Trainer:
    return Trainer(
        **{
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "default_root_dir": folder,
            "num_sanity_val_steps": 0,
            **kwargs,
        }
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
class TestUnderLightning:
    @pytest.mark.parametrize("counts", [True, False])
    @pytest.mark.parametrize("stop", [4, 6])  # in the second epoch, and at its end
    def test_resumed_run_goes_on_with_the_next_sample(self, hq: Path, tmp_path: Path, counts: bool, stop: int) -> None:
        whole = Recorder(counts)
        uninterrupted = trainer(tmp_path, max_steps=10)
        uninterrupted.fit(whole, small(train=str(hq), batches_per_epoch=3))
        assert [index for indices, _ in whole.seen for index in indices] == list(range(20))

        first = Recorder(counts)
        saver = ModelCheckpoint(tmp_path, "last", every_n_train_steps=stop)
        stopped = trainer(tmp_path, max_steps=stop, enable_checkpointing=True, callbacks=[saver])
        stopped.fit(first, small(train=str(hq), batches_per_epoch=3))
        second = Recorder(counts)
        resumed = trainer(tmp_path, max_steps=10)
        # another number of workers on the way changes nothing either
        datamodule = small(train=str(hq), batches_per_epoch=3, num_workers=1)
        resumed.fit(second, datamodule, ckpt_path=str(tmp_path / "last.ckpt"), weights_only=False)
        assert first.seen + second.seen == whole.seen
        assert resumed.current_epoch == uninterrupted.current_epoch

    def test_limit_of_batches_does_not_shorten_later_epochs(self, hq: Path, tmp_path: Path) -> None:
        module = Recorder()
        run = trainer(tmp_path, max_epochs=3, limit_train_batches=2)
        run.fit(module, small(train=str(hq), batches_per_epoch=3))
        assert [index for indices, _ in module.seen for index in indices] == list(range(12))

    def test_validation_test_and_predict_go_over_every_image(self, hq: Path, tmp_path: Path) -> None:
        sets = [benchmark(tmp_path / "A"), benchmark(tmp_path / "B", 2)]
        datamodule = small(val=[str(hq), sets[0]], test=sets, predict=str(hq), val_crops=2, eval_crop_size=32)
        module, run = Recorder(), trainer(tmp_path)
        run.validate(module, datamodule, verbose=False)
        assert module.evaluated == ["0/0_r0c0_s0", "0/2_r0c0_s0", "1/0", "1/1", "1/2"]
        module.evaluated.clear()
        run.test(module, datamodule, verbose=False)
        assert module.evaluated == ["0/0", "0/1", "0/2", "1/0", "1/1"]
        module.evaluated.clear()
        run.predict(module, datamodule, return_predictions=False)
        assert module.evaluated == [f"0/{i}" for i in range(5)]
        assert datamodule.dataset_names == {"val": ["hq", "A"], "test": ["A", "B"]}

    def test_a_share_of_an_epoch_and_overfitting_are_refused(self, hq: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"trainer\.limit_train_batches=0\.5 is a share.*batches_per_epoch"):
            trainer(tmp_path, limit_train_batches=0.5).fit(Recorder(), small(train=str(hq)))
        with pytest.raises(ValueError, match=r"trainer\.overfit_batches=2 cannot.*data\.init_args\.train"):
            trainer(tmp_path, overfit_batches=2).fit(Recorder(), small(train=str(hq)))


class TestRanks:
    @staticmethod
    def on(datamodule: LightningDataModule, world_size: int, rank: int) -> Any:
        datamodule.trainer = SimpleNamespace(
            world_size=world_size,
            global_rank=rank,
            limit_train_batches=1.0,
            overfit_batches=0,
            lightning_module=SimpleNamespace(train_step=0),
        )  # type: ignore[assignment]  # the five things asked of a trainer
        return datamodule

    def test_two_ranks_train_on_what_one_with_twice_the_batch_does(self, hq: Path) -> None:
        alone = small(train=str(hq), batch_size=4, batches_per_epoch=3)
        alone.setup("fit")
        expected = [batch["lq"] for batch in self.on(alone, 1, 0).train_dataloader()]
        halves = []
        for rank in range(2):
            datamodule = small(train=str(hq), batch_size=2, batches_per_epoch=3)
            datamodule.setup("fit")
            halves.append([batch["lq"] for batch in self.on(datamodule, 2, rank).train_dataloader()])
        for batch, first, second in zip(expected, *halves, strict=True):
            assert torch.equal(batch, torch.cat([first, second]))

    def test_one_pass_is_divided_by_the_ranks(self, hq: Path) -> None:
        datamodule = small(train=str(hq))
        datamodule.setup("fit")
        assert len(self.on(datamodule, 1, 0).train_dataloader()) == 3  # 5 photos in batches of 2
        assert len(self.on(datamodule, 2, 0).train_dataloader()) == 2

    def test_every_rank_evaluates_equally_many_and_together_all(self, hq: Path) -> None:
        names = []
        for rank in range(2):
            datamodule = small(predict=str(hq))
            datamodule.setup("predict")
            (loader,) = self.on(datamodule, 2, rank).predict_dataloader()
            names.append([batch["name"][0] for batch in loader])
        assert names == [["0", "2", "4"], ["1", "3", "0"]]


class TestSources:
    def test_kinds_of_sets(self, hq: Path, tmp_path: Path) -> None:
        datamodule = small(
            train=[str(hq), str(hq / "1.png")],
            val=[str(hq), benchmark(tmp_path / "A")],
            test=[str(tmp_path / "A"), str(tmp_path / "A" / "test_LR")],
        )
        datamodule.setup("fit")
        datamodule.setup("test")
        assert isinstance(datamodule.train_images, HQImages)
        assert len(datamodule.train_images) == 6
        assert [type(loader.dataset) for loader in datamodule.val_dataloader()] == [DegradedCrops, Pairs]
        assert [type(loader.dataset) for loader in datamodule.test_dataloader()] == [Pairs, LQImages]
        assert datamodule.dataset_names == {"val": ["hq", "A"], "test": ["A", "test_LR"]}

    def test_a_part_of_a_folder_of_pairs_is_of_its_good_photos(self, tmp_path: Path) -> None:
        pairs = benchmark(tmp_path / "A")
        whole, part = small(train=pairs), small(train=[Part(pairs, first=1, weight=2), pairs])
        for module in (whole, part):
            module.setup("fit")
        assert whole.train_images is not None
        assert part.train_images is not None
        names = [whole.train_images.paths[0]] * 2 + list(whole.train_images.paths)
        assert list(part.train_images.paths) == names
        assert all("test_HR" in path.parts for path in names)

    def test_sets_of_one_name_are_told_apart_by_the_folder_above(self, tmp_path: Path) -> None:
        datamodule = small(test=[benchmark(tmp_path / "x" / "RealSR"), benchmark(tmp_path / "y" / "RealSR")])
        datamodule.setup("test")
        assert datamodule.dataset_names["test"] == ["x_RealSR", "y_RealSR"]
        with pytest.raises(ValueError, match="would share the names"):
            small(test=[str(tmp_path / "x" / "RealSR")] * 2).setup("test")

    def test_no_validation_is_no_loader(self, hq: Path, tmp_path: Path) -> None:
        datamodule = small(train=str(hq))
        trainer(tmp_path, max_steps=2).fit(Recorder(), datamodule)
        assert datamodule.val_dataloader() == []

    def test_crops_and_flips_and_degradation_are_passed_on(self, hq: Path) -> None:
        datamodule = small(train=str(hq), flips="none", seed=4, degradation="bicubic", scale=2, on_error="raise")
        datamodule.setup("fit")
        expected = HQImages(hq, 2, 16, None, 4, on_error="raise", flips="none")
        assert datamodule.train_images is not None
        for key in ((0, 1, 2), (3, 4, 5)):
            assert torch.equal(datamodule.train_images[key]["lq"], expected[key]["lq"])
        preset_x2 = small(train=str(hq), scale=2, degradation="omgsr")
        assert preset_x2.degradation is not None
        assert preset_x2.degradation.config.scale == 2
        assert preset_x2.degradation.config.first == preset("omgsr").first

    @pytest.mark.parametrize("make", [SRData, Photos])
    def test_a_degradation_of_its_own_is_that_of_training_alone(self, hq: Path, make: type[SRData]) -> None:
        """Validation (and the embedded photos' test) keep theirs."""
        arguments: dict[str, Any] = {
            "train": str(hq),
            "val": str(hq),
            "crop_size": 16,
            "eval_crop_size": 16,
            "num_workers": 0,
        }
        own, plain = (make(degradation="bicubic", **arguments, **more) for more in ({"train_degradation": "omgsr"}, {}))
        for datamodule in (own, plain):
            datamodule.setup("fit")
            assert datamodule.train_images is not None
        trained = [module.train_images[0, 0, 0] for module in (own, plain)]  # type: ignore[index]
        assert not torch.equal(trained[0]["lq"], trained[1]["lq"])
        assert torch.equal(trained[0]["hq"], trained[1]["hq"])
        validated = [next(iter(datamodule.val_dataloader()[0]))["lq"] for datamodule in (own, plain)]
        assert torch.equal(*validated)

    def test_unreadable_files_are_skipped_everywhere_but_in_benchmarks(self, hq: Path, tmp_path: Path) -> None:
        (hq / "2.png").write_text("no image")
        datamodule = small(train=str(hq), val=str(hq), predict=str(hq), eval_crop_size=32)
        for stage in ("fit", "predict"):
            datamodule.setup(stage)
        for loader in (datamodule.train_dataloader(), datamodule.val_dataloader()[0]):
            assert {name[0] for batch in loader for name in batch["name"]} == set("0134")
        assert [batch["name"] for batch in datamodule.predict_dataloader()[0]] == [["0"], ["1"], ["3"], ["4"]]
        folder = benchmark(tmp_path / "A")
        save(tmp_path / "A" / "test_LR" / "more.png", 8, 8)
        for stage, sets in (("validate", {"val": folder}), ("test", {"test": folder}), ("test", {"test": str(hq)})):
            with pytest.raises(ValueError, match=r"more\.png|2\.png"):
                small(**sets).setup(stage)

    def test_prompts_of_each_split(self, hq: Path, tmp_path: Path) -> None:
        (tmp_path / "train.csv").write_text("name,prompt\n" + "".join(f"{i}.png,photo {i}\n" for i in range(5)))
        datamodule = small(train=str(hq), val=str(hq), prompts={"train": str(tmp_path / "train.csv")})
        datamodule.setup("fit")
        assert {p for batch in datamodule.train_dataloader() for p in batch["prompt"]} <= {
            f"photo {i}" for i in range(5)
        }
        assert next(iter(datamodule.val_dataloader()[0]))["prompt"] == [""]
        both = small(train=str(hq), val=str(hq), prompts=str(tmp_path / "train.csv"))
        both.setup("fit")
        assert next(iter(both.val_dataloader()[0]))["prompt"] == ["photo 0"]

    def test_it_knows_which_split_has_prompts(self, hq: Path, tmp_path: Path) -> None:
        (tmp_path / "train.csv").write_text(
            "name,prompt\n" + "".join(f"{i}.png,{'' if i else 'a cat'}\n" for i in range(5))
        )
        for prompts, expected in ((None, (False, False)), ({"train": str(tmp_path / "train.csv")}, (True, False))):
            datamodule = small(train=str(hq), val=str(hq), predict=str(hq), prompts=prompts)
            datamodule.setup("fit")
            datamodule.setup("predict")
            assert (datamodule.has_prompts("train"), datamodule.has_prompts("val")) == expected
            assert not datamodule.has_prompts("predict")
        assert datamodule.has_prompts("test")  # no set is no missing prompt

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"batch_size": 0}, "batch_size=0 is out of range; set batch_size >= 1"),
            ({"crop_size": 18}, "crop_size=18 is not a multiple of scale=4; set crop_size to 16"),
            ({"eval_crop_size": 18}, "eval_crop_size=18 is not a multiple of scale=4; set eval_crop_size to 16"),
            ({"seed": -1}, "seed=-1 is out of range; set seed >= 0"),
            ({"on_error": "ignore"}, "on_error=ignore is unknown; set on_error to skip or raise"),
            ({"degradation": "blur"}, "blur.*osediff"),
            ({"degradation": DegradationConfig(scale=2)}, r"degradation\.scale=2 is not scale=4; set both"),
            ({"train_degradation": DegradationConfig(scale=2)}, r"train_degradation\.scale=2 is not scale=4"),
            ({"prompts": {"training": "x"}}, "prompts has the keys training; use train, val, test, predict"),
        ],
    )
    def test_wrong_arguments_are_refused_at_once(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            small(**arguments)

    @pytest.mark.parametrize(
        ("stage", "message"),
        [
            ("fit", r"train=null .* set data\.init_args\.train"),
            ("test", r"test=null .* set data\.init_args\.test"),
            ("predict", r"predict=null .* set data\.init_args\.predict"),
        ],
    )
    def test_stage_without_data_says_which_argument_to_set(self, stage: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            small().setup(stage)

    @pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
    def test_a_model_of_another_scale_is_refused_before_anything_is_loaded(
        self, hq: Path, tmp_path: Path, stage: str
    ) -> None:
        """The sets are not there and the model cannot be built: neither is reached."""

        class Unbuilt(Recorder):
            scale = 4

            def configure_model(self) -> None:
                raise AssertionError("the model is built")

        gone = str(tmp_path / "gone")
        module = small(train=gone, val=gone, test=gone, predict=gone, scale=2)
        with pytest.raises(ValueError, match=r"data\.scale=2 is not model\.scale=4; set both to one value"):
            getattr(trainer(tmp_path, max_steps=1), stage)(Unbuilt(), datamodule=module)
        with pytest.raises(AssertionError, match="the model is built"):
            trainer(tmp_path, max_steps=1).predict(Unbuilt(), datamodule=small(predict=str(hq)))

    def test_missing_sources_are_named_by_argument(self, tmp_path: Path) -> None:
        gone = f"{tmp_path}/gone"
        for stage, arguments in {
            "fit": {"train": gone},
            "validate": {"val": gone},
            "test": {"test": gone},
            "predict": {"predict": gone},
        }.items():
            (argument,) = arguments
            with pytest.raises(FileNotFoundError, match=rf"{argument}={gone} "):
                small(**arguments).setup(stage)


class TestPhotos:
    def test_sets_are_the_embedded_photos_with_fixed_roles(self) -> None:
        datamodule = Photos(degradation="bicubic")
        for stage in ("fit", "test", "predict"):
            datamodule.setup(stage)
        assert datamodule.train_images is not None
        assert set(datamodule.train_images.names) == {photo.name for photo in PHOTOS["train"]}
        val, test = datamodule.val_dataloader()[0].dataset, datamodule.test_dataloader()[0].dataset
        assert datamodule.dataset_names == {"val": ["photos"], "test": ["photos"]}
        names = {split: {photo.name for photo in photos} for split, photos in PHOTOS.items()}
        for split, images, seeds in (("val", val, 1), ("test", test, 3)):
            assert isinstance(images, DegradedCrops)
            found = [images[i]["name"].rsplit("_", 2) for i in range(len(images))]
            assert {photo for photo, _, _ in found} == names[split]
            assert {seed for _, _, seed in found} == {f"s{seed}" for seed in range(seeds)}
        assert test[0]["hq"].shape == (3, 128, 128)
        assert test[0]["prompt"] == CAPTIONS["chelsea"]
        assert len(datamodule.predict_dataloader()[0].dataset) == len(test) // 3  # type: ignore[arg-type]  # is sized

    def test_few_test_crops_are_some_of_all(self) -> None:
        names = []
        for most in (None, 2):
            datamodule = Photos(test_seeds=1, test_crops=most)
            datamodule.setup("test")
            images: Any = datamodule.test_dataloader()[0].dataset
            names.append([images[i]["name"] for i in range(len(images))])
        assert len(names[1]) == 2
        assert {name.partition("_")[0] for name in names[1]} == {"chelsea", "rocket"}
        assert set(names[1]) < set(names[0])

    def test_weights_and_rescales_set_how_often_a_photo_is_drawn(self) -> None:
        datamodule = Photos()
        datamodule.setup("fit")
        images = datamodule.train_images
        assert images is not None
        drawn = [images.paths[place].stem for place, _ in images._items]
        ratio = {photo.name: drawn.count(photo.name) / photo.weight for photo in PHOTOS["train"]}
        assert all(value == pytest.approx(10, rel=0.15) for value in ratio.values())
        factors = {factor for place, factor in images._items if images.paths[place].stem == "motorcycle_left"}
        assert factors == set(next(p for p in PHOTOS["train"] if p.name == "motorcycle_left").rescales)

    def test_texts_of_training_and_validation_are_known_beforehand(self) -> None:
        photos = Photos()
        photos.setup("fit")
        assert photos.texts() == list(
            dict.fromkeys(photo.caption for split in ("train", "val") for photo in PHOTOS[split])
        )

    def test_sets_of_ones_own_take_their_place(self, hq: Path, tmp_path: Path) -> None:
        sets = {"train": str(hq), "val": str(hq), "test": benchmark(tmp_path / "A"), "predict": str(hq)}
        datamodule = Photos(crop_size=16, eval_crop_size=32, **sets)
        for stage in ("fit", "test", "predict"):
            datamodule.setup(stage)
        assert datamodule.train_images is not None
        assert datamodule.train_images.names == ["0", "1", "2", "3", "4"]
        assert isinstance(datamodule.test_dataloader()[0].dataset, Pairs)
        assert isinstance(datamodule.predict_dataloader()[0].dataset, LQImages)
        assert datamodule.dataset_names == {"val": ["hq"], "test": ["A"]}


class TestConfiguration:
    @staticmethod
    def parse(*arguments: str) -> Any:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(LightningDataModule, "data")
        return parser.instantiate(parser.parse_args(list(arguments))).data

    def test_class_paths_and_fields_of_the_degradation(self) -> None:
        photos = self.parse("--data=data.Photos", "--data.batch_size=3", "--data.test_seeds=2", "--data.scale=2")
        assert isinstance(photos, Photos)
        assert (photos.batch_size, photos.test_seeds, photos.scale) == (3, 2, 2)
        own = self.parse("--data=data.SRData", '--data.degradation={"first": {"sigma": [1, 2]}, "final_sinc_prob": 0}')
        assert own.degradation.config.first.sigma == (1, 2)
        assert own.degradation.config.second == DegradationConfig().second
        assert self.parse("--data=data.SRData", '--data.train=["a", "b"]').train == ["a", "b"]
        parsed = self.parse(
            "--data=data.SRData", '--data.train=["a", {source: b, first: 3}]', "--data.flips=horizontal"
        )
        assert parsed.train[0] == "a"
        assert (parsed.train[1].source, parsed.train[1].first, parsed.train[1].weight) == ("b", 3, 1)
        assert parsed.flips == "horizontal"

    @pytest.mark.parametrize("overlay", sorted((Path(data.__file__).parent / "configs").glob("*.yaml")), ids=str)
    def test_overlays_fit_the_signature_and_say_where_data_comes_from(self, overlay: Path) -> None:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--config", action="config")
        parser.add_subclass_arguments(LightningDataModule, "data")
        loaded = parser.instantiate(parser.parse_args([f"--config={overlay}"])).data
        assert isinstance(loaded, SRData)
        assert "https://" in overlay.read_text()


class TestImports:
    def test_photos_alone_stay_light(self) -> None:
        heavy = "{'torch', 'lightning', 'cv2', 'skimage'} & set(sys.modules)"
        code = f"import data.photos, sys; assert not {heavy}, {heavy}"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(data.__file__).parent.parent)
        with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
            data.Nothing  # noqa: B018  # the access is the test

    def test_no_file_of_data_imports_metrics_or_torchvision(self) -> None:
        for file in Path(data.__file__).parent.rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not {m.split(".")[0] for m in modules} & {"torchvision", "pyiqa", "skimage", "papers", "launch"}


class TestGlobalBatch:
    """`global_batch_size` is what an update sees, whatever shares it out."""

    def on(self, processes: int, accumulate: int, **kwargs: Any) -> SRData:
        datamodule = SRData(num_workers=0, crop_size=16, **kwargs)
        datamodule.trainer = SimpleNamespace(
            world_size=processes,
            global_rank=0,
            accumulate_grad_batches=1,
            limit_train_batches=1.0,
            overfit_batches=0,
            lightning_module=SimpleNamespace(train_step=0, accumulate=accumulate),
        )  # type: ignore[assignment]  # what is asked of a trainer
        datamodule.setup("fit")
        return datamodule

    @pytest.mark.parametrize(
        ("whole", "processes", "accumulate", "each"), [(16, 8, 1, 2), (16, 1, 1, 16), (120, 8, 1, 15), (16, 2, 4, 2)]
    )
    def test_a_process_takes_its_part(
        self, whole: int, processes: int, accumulate: int, each: int, hq: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        datamodule = self.on(processes, accumulate, train=str(hq), global_batch_size=whole)
        assert len(next(iter(datamodule.train_dataloader()))["lq"]) == each
        assert f"isr: global batch {whole} = {each} x {processes} x {accumulate} (" in capsys.readouterr().err

    def test_a_batch_of_a_process_says_what_it_comes_to(self, hq: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.on(8, 2, train=str(hq), batch_size=16).train_dataloader()
        assert "isr: global batch 256 = 16 x 8 x 2 (" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("whole", "processes", "accumulate", "near"),
        [(16, 3, 1, "15 or 18"), (6, 8, 1, "8"), (120, 7, 2, "112 or 126")],
    )
    def test_what_has_no_equal_parts_is_refused_with_what_has(
        self, whole: int, processes: int, accumulate: int, near: str, hq: Path
    ) -> None:
        expected = (
            rf"global_batch_size={whole} .* {processes} processes x {accumulate} .*global_batch_size to {near}, or"
        )
        with pytest.raises(ValueError, match=expected):
            self.on(processes, accumulate, train=str(hq), global_batch_size=whole)

    def test_both_are_refused(self) -> None:
        with pytest.raises(ValueError, match="batch_size=2 and global_batch_size=16 are both set"):
            Photos(batch_size=2, global_batch_size=16)
        with pytest.raises(ValueError, match="global_batch_size=0 is out of range"):
            SRData(global_batch_size=0)

    def test_every_paper_scale_config_names_the_papers_batch(self) -> None:
        root = Path(__file__).resolve().parents[2]
        found = {}
        for path in sorted(root.glob("papers/*/configs/*.yaml")):
            arguments = (yaml.safe_load(path.read_text()).get("data") or {}).get("init_args") or {}
            if "tiny" not in path.stem and {"batch_size", "global_batch_size"} & arguments.keys():
                assert "batch_size" not in arguments, path
                found[path.stem] = arguments["global_batch_size"]
        assert len(found) >= 14
        assert (found["sd21"], found["foundation_f2i"], found["kontext_sft"], found["seesr"]) == (16, 120, 8, 8)
