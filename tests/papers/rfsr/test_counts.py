"""Counts of section 4 of the spec on the meta device, and what the ablations' files make of the paper's."""

from pathlib import Path
from typing import Any

import pytest

from launch.parameters import build, parse, summary
from papers import rfsr
from papers.rfsr.sampling import trained_steps

CONFIGS = Path(rfsr.__file__).parent / "configs"
SEESR = CONFIGS / "seesr.yaml"
T = list(range(981, 0, -20))


def settings(overlay: str) -> dict[str, Any]:
    files = [SEESR] + ([CONFIGS / "ablations" / f"{overlay}.yaml"] if overlay else [])
    _, parsed = parse(files)
    found: dict[str, Any] = parsed.model.init_args.as_dict()
    return found


def counted(*overlays: str) -> dict[str, Any]:
    return summary(build([SEESR, *(CONFIGS / "ablations" / f"{name}.yaml" for name in overlays)]))


class TestCounts:
    def test_seesr_at_full_size(self) -> None:
        found = counted()
        rows = {row["name"]: (row["total"], row["trainable"]) for row in found["networks"]}
        assert rows["U-Net"] == (1_126_760_324, 260_849_600)
        assert rows["ControlNet"] == (489_031_440, 489_031_440)
        assert rows["VAE"] == (83_653_863, 0)
        assert rows["loss network (VGG19)"] == (20_024_384, 0)
        assert rows["reward imagereward"] == (303_301_632 + 141_977_088 + 927_969, 0)
        assert rows["EMA of what is trained"] == rows["theta' (what is trained, as it was)"] == (749_881_040, 0)
        assert found["trainable"] == found["optimizers"]["generator"] == 749_881_040

    def test_the_papers_literal_sentence(self) -> None:
        assert counted("full")["trainable"] == 1_615_791_764

    def test_adapters_are_few(self) -> None:
        found = counted("regulariser_lora")
        rows = {row["name"]: (row["total"], row["trainable"]) for row in found["networks"]}
        assert rows["U-Net"] == (1_126_760_324, 0)
        assert rows["ControlNet"] == (489_031_440, 0)
        assert rows["U-Net LoRA"][0] == rows["U-Net LoRA"][1]
        assert not any(name.startswith("theta'") for name in rows)
        assert found["trainable"] == rows["U-Net LoRA"][1] + rows["ControlNet LoRA"][1] < 40_000_000


class TestAblations:
    def test_the_papers_run_is_section_3s(self) -> None:
        found = settings("")
        assert found["rewards"] == {"clipiqa": 5e-5, "imagereward": 5e-5}
        assert (found["lambda_dwt"], found["lambda_r"], found["ema_decay"]) == (5e-4, 5e-5, 0.999)
        assert trained_steps(T, found["t_early_min"], found["t_late_max"]) == [*range(1, 21), *range(41, 51)]

    @pytest.mark.parametrize(
        ("overlay", "early", "late"),
        [("early_40", (1, 40), (41, 50)), ("late_30", (1, 20), (21, 50)), ("both", (1, 50), (1, 50))],
    )
    def test_table_2(self, overlay: str, early: tuple[int, int], late: tuple[int, int]) -> None:
        found = settings(f"bands_{overlay}")
        steps = {
            "early": [st for st, t in enumerate(T, 1) if t >= found["t_early_min"]],
            "late": [st for st, t in enumerate(T, 1) if t <= found["t_late_max"]],
        }
        for name, (first, last) in (("early", early), ("late", late)):
            assert steps[name] == list(range(first, last + 1))

    @pytest.mark.parametrize(
        ("overlay", "rewards"),
        [("none", {}), ("clipiqa", {"clipiqa": 5e-5}), ("imagereward", {"imagereward": 5e-5})],
    )
    def test_table_3_takes_rewards_away(self, overlay: str, rewards: dict[str, float]) -> None:
        found = settings(f"rewards_{overlay}")
        assert found["rewards"] == rewards
        assert found["regulariser"] == ("gram" if rewards else "none")  # "only L_dwt" in the first row

    @pytest.mark.parametrize(
        ("overlay", "key", "value"),
        [
            ("regulariser_none", "regulariser", "none"),
            ("regulariser_kl", "regulariser", "kl"),
            ("regulariser_lora", "regulariser", "lora"),
            ("early_none", "early_loss", "none"),
            ("early_l1", "early_loss", "l1"),
            ("full", "trained", "full"),
        ],
    )
    def test_the_others_change_one_thing(self, overlay: str, key: str, value: str) -> None:
        before, after = settings(""), settings(overlay)
        assert after[key] == value
        assert {name for name in before if before[name] != after[name]} <= {key, "lora_rank"}

    def test_ddim_changes_the_sampler_alone(self) -> None:
        before, after = (settings(name)["base"]["init_args"] for name in ("", "ddim"))
        assert after["sampler"] == "ddim"
        assert after | {"sampler": "ddpm"} == before

    def test_the_released_code(self) -> None:
        found = settings("released")
        expected = {"rollout": "none", "wavelet": "dtcwt3", "gram_distance": "l1_mean", "lambda_r": 5e-7}
        expected |= {"reference": "shared_control", "reward_prompt": "same"}
        assert {key: found[key] for key in expected} == expected
        assert found["rewards"] == {"clipiqa": 5e-5, "imagereward": 5e-6}
