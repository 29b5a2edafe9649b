"""Captions: small random BLIP and LLaVA-OneVision models, and the errors where a model is missing."""

import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoProcessor,
    BertConfig,
    BertModel,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedModel,
    Qwen2Config,
    SiglipVisionConfig,
)

from common.conditioning import captions as module
from common.conditioning.captions import Captioner
from common.loading import WeightsNotFoundError
from launch.commands.caption import _parse

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<image>", "<video>"]
PROMPT = ["user", ":", "what", "is", "this", "assistant", ":"]
WORDS = [*SPECIAL, *PROMPT[:-1], "cat", "dog", "mat", "hat", "red", "blue", "green", "on", "the"]
PAD, END, START, IMAGE, VIDEO = 0, 3, 2, 5, 6
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def tokenizer() -> BertTokenizer:
    return BertTokenizer(
        vocab={word: i for i, word in enumerate(WORDS)},
        additional_special_tokens=["<image>", "<video>"],
        model_input_names=["input_ids", "attention_mask"],
    )


def save(root: Path, model: PreTrainedModel, processor: Any, seed: int = 0) -> str:
    """Save with random weights large enough that different images give different captions."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(root)
    processor.save_pretrained(root)
    return str(root)


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> str:
    text = {
        **SMALL,
        "encoder_hidden_size": 32,
        "vocab_size": len(WORDS),
        "max_position_embeddings": 32,
        "bos_token_id": START,
        "eos_token_id": END,
        "sep_token_id": END,
        "pad_token_id": PAD,
    }
    vision = {**SMALL, "image_size": 16, "patch_size": 8}
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))
    processor = BlipProcessor(BlipImageProcessor(size={"height": 16, "width": 16}), tokenizer())
    return save(tmp_path_factory.mktemp("blip"), model, processor)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    size = {"height": 16, "width": 16}
    grid = [[16, 16], [16, 32], [32, 32]]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**SMALL, image_size=16, patch_size=8),
        text_config=Qwen2Config(
            **SMALL,
            num_key_value_heads=2,
            vocab_size=len(WORDS),
            eos_token_id=END,
            pad_token_id=PAD,
            bos_token_id=START,
            max_position_embeddings=256,
        ),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=grid,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=grid),
        tokenizer(),
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    )
    return save(tmp_path_factory.mktemp("llava"), LlavaOnevisionForConditionalGeneration(config), processor, seed=5)


def florence(instruction: str | None = None) -> tuple[Captioner, dict[str, Any]]:
    """A captioner on what looks like Florence-2, and what it is asked once it is called."""
    asked: dict[str, Any] = {}

    class Inputs(dict[str, Tensor]):
        def to(self, device: torch.device, dtype: torch.dtype) -> "Inputs":
            return self

    class Processor:
        task_prompts_without_inputs: ClassVar = {"<CAPTION>": "What is there?", "<MORE_DETAILED_CAPTION>": "All of it?"}
        task_prompts_with_input: ClassVar = {"<OCR_IN>": "Text in {input}?"}

        def __call__(self, images: list[Any], text: list[str], return_tensors: str) -> Inputs:
            asked["text"] = text
            return Inputs(input_ids=torch.zeros(len(images), 9, dtype=torch.long))

        def batch_decode(self, tokens: Tensor, skip_special_tokens: bool) -> list[str]:
            return [str(row.tolist()) for row in tokens]

    class Model:
        class config:  # noqa: N801 - as transformers calls it
            is_encoder_decoder = True

        def generate(self, input_ids: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
            asked["max_new_tokens"] = max_new_tokens
            return torch.full((len(input_ids), 2), 7)

    captioner = Captioner("florence", instruction)
    captioner._loaded = (Processor(), Model())
    return captioner, asked


@pytest.fixture
def images() -> Tensor:
    """Noises of red, green and blue, (3, 3, 20, 28)."""
    noise = torch.rand(3, 3, 20, 28, generator=torch.Generator().manual_seed(1))
    return (noise + torch.eye(3)[..., None, None]) / 2


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Arguments and tokens of every call of `generate`."""
    seen: list[dict[str, Any]] = []
    for model_class in (BlipForConditionalGeneration, LlavaOnevisionForConditionalGeneration):

        def generate(self: Any, *, real: Any = model_class.generate, **arguments: Any) -> Tensor:
            tokens: Tensor = real(self, **arguments)
            seen.append({**arguments, "tokens": tokens})
            return tokens

        monkeypatch.setattr(model_class, "generate", generate)
    return seen


@pytest.mark.usefixtures("no_network")
class TestCaptions:
    def test_blip_says_what_greedy_decoding_of_the_saved_model_says(self, blip: str, images: Tensor) -> None:
        model = BlipForConditionalGeneration.from_pretrained(blip).eval()
        processor = BlipProcessor.from_pretrained(blip)
        expected = []
        for image in images:
            array = (image * 255).round().byte().permute(1, 2, 0).numpy()
            pixels = processor(images=Image.fromarray(array), return_tensors="pt").pixel_values
            states, tokens = model.vision_model(pixels)[0], torch.tensor([[START]])
            for _ in range(6):
                logits = model.text_decoder(tokens, encoder_hidden_states=states).logits[:, -1]
                tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
                if tokens[0, -1] == END:
                    break
            expected.append(" ".join(WORDS[token] for token in tokens[0] if token > 6))
        assert len(set(expected)) > 1
        found = Captioner(blip, max_new_tokens=6)(images)
        assert found == expected

    def test_a_chat_model_says_what_comes_after_the_prompt(
        self, llava: str, images: Tensor, calls: list[dict[str, Any]]
    ) -> None:
        captions = Captioner(llava, "what is this", max_new_tokens=5)(images)
        (call,) = calls
        prompt, tokens = call["input_ids"], call["tokens"]
        assert (call["do_sample"], call["num_beams"], call["max_new_tokens"]) == (False, 1, 5)
        # 4 of the whole image, then a row of 2 x 4 features without padding and newlines: the image was seen
        assert (prompt == IMAGE).sum(1).tolist() == [int((prompt[0] == IMAGE).sum())] * 3
        assert (prompt[0] == IMAGE).sum() > 4
        words = [WORDS[token] for token in prompt[0] if token not in (IMAGE, START, END)]
        assert words == PROMPT
        assert torch.equal(tokens[:, : prompt.shape[1]], prompt)
        new = [[WORDS[token] for token in row if token > 6] for row in tokens[:, prompt.shape[1] :]]
        assert captions == [" ".join(words) for words in new]
        assert len(set(captions)) > 1

    @pytest.mark.parametrize("kind", ["blip", "llava"])
    def test_captions_repeat_and_do_not_depend_on_the_batch_or_on_random_state(
        self, kind: str, images: Tensor, request: pytest.FixtureRequest
    ) -> None:
        captioner = Captioner(request.getfixturevalue(kind), max_new_tokens=6)
        state = torch.get_rng_state()
        together = captioner(images)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(5)
        assert [captioner(image[None])[0] for image in images] == together
        assert Captioner(captioner.model, max_new_tokens=6)(images) == together

    def test_a_model_works_in_its_own_dtype_within_autocast(self, llava: str, images: Tensor) -> None:
        captioner, found = Captioner(llava, max_new_tokens=2), []
        captioner(images)
        assert captioner._loaded is not None
        head = captioner._loaded[1].lm_head
        head.register_forward_hook(lambda module, args, out: found.append(out.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            captioner(images)
        assert set(found) == {torch.float32}

    def test_the_instruction_is_not_shown_to_a_model_without_a_chat_template(
        self, blip: str, images: Tensor, calls: list[dict[str, Any]]
    ) -> None:
        one, two = (Captioner(blip, text, max_new_tokens=4)(images) for text in ("the cat", "on the hat"))
        assert one == two
        assert all("input_ids" not in call for call in calls)

    def test_a_caption_ends_after_the_tokens_allowed_and_bears_no_blanks_around(
        self, llava: str, images: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert all(len(caption.split()) <= 1 for caption in Captioner(llava, max_new_tokens=1)(images))
        monkeypatch.setattr(LlavaOnevisionProcessor, "batch_decode", lambda *_, **__: [" a cat\n"])
        assert Captioner(llava, max_new_tokens=1)(images[:1]) == ["a cat"]

    def test_a_florence_like_model_gets_the_instruction_as_its_task_and_is_not_cut(self, images: Tensor) -> None:
        captioner, asked = florence("<CAPTION>")
        assert captioner(images) == ["[7, 7]"] * 3
        assert asked["text"] == ["<CAPTION>"] * 3

    def test_florence_is_asked_by_default_what_isr_caption_asks_for_training(self, images: Tensor) -> None:
        captioner, asked = florence()
        captioner(images)
        options = _parse("caption", ["photos"])
        assert asked == {"text": [options.instruction] * 3, "max_new_tokens": options.max_new_tokens}
        assert asked == {"text": ["<MORE_DETAILED_CAPTION>"] * 3, "max_new_tokens": 77}

    def test_other_models_are_asked_for_a_sentence_by_default(
        self, llava: str, images: Tensor, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        chats: list[Any] = []
        real = LlavaOnevisionProcessor.apply_chat_template
        monkeypatch.setattr(
            LlavaOnevisionProcessor, "apply_chat_template", lambda s, c, **o: chats.extend(c) or real(s, c, **o)
        )
        Captioner(llava)(images[:1])
        assert chats[0][0]["content"][1]["text"] == "Describe this image in one sentence."
        assert calls[0]["max_new_tokens"] == 64

    def test_an_instruction_that_is_none_for_the_model_is_refused(self, llava: str, images: Tensor) -> None:
        message = r"instruction=what is this is not a task of model='florence'; give one of <CAPTION>, .*<OCR_IN>"
        with pytest.raises(ValueError, match=message):
            florence("what is this")[0](images)
        message = r"instruction=<CAPTION> is a task of Florence-2, and model='.*' is a chat model; give a question"
        with pytest.raises(ValueError, match=message):
            Captioner(llava, "<CAPTION>")(images)
        captioner, asked = florence("<OCR_IN> upper left")
        captioner(images)
        assert asked["text"] == ["<OCR_IN> upper left"] * 3

    def test_is_loaded_at_the_first_call_once_frozen_and_moves(
        self, blip: str, images: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loads = []
        real = Captioner._load
        monkeypatch.setattr(Captioner, "_load", lambda self: loads.append(1) or real(self))
        captioner = Captioner(blip, max_new_tokens=1)
        assert captioner.to("cpu") is captioner
        assert captioner(images[:0]) == []
        assert not loads
        captioner(images)
        captioner(images)
        assert len(loads) == 1
        assert captioner._loaded is not None
        model = captioner._loaded[1]
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        captioner.to("meta")
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}

    @pytest.mark.parametrize("kind", ["blip", "llava"])
    def test_the_weights_are_float32_on_a_cpu_unless_another_type_is_chosen(
        self, kind: str, images: Tensor, request: pytest.FixtureRequest
    ) -> None:
        for chosen, expected in (("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            captioner = Captioner(request.getfixturevalue(kind), max_new_tokens=2, dtype=chosen)  # type: ignore[arg-type]
            assert len(captioner(images)) == 3
            assert captioner._loaded is not None
            assert captioner._loaded[1].dtype == expected

    def test_an_accelerator_takes_bfloat16_of_itself(self, blip: str, images: Tensor) -> None:
        for dtype, expected in (("auto", torch.bfloat16), ("float32", torch.float32)):
            captioner = Captioner(blip, max_new_tokens=1, dtype=dtype)  # type: ignore[arg-type]
            captioner(images)
            captioner.to("meta")  # which is no CPU
            assert captioner._loaded is not None
            assert captioner._loaded[1].dtype == expected

    def test_another_dtype_is_refused(self) -> None:
        with pytest.raises(ValueError, match="dtype='half' is unknown; use one of auto, float32, bfloat16"):
            Captioner("a/b", dtype="half")  # type: ignore[arg-type]

    def test_what_is_no_batch_of_images_and_no_number_of_tokens_is_refused(self, blip: str, images: Tensor) -> None:
        with pytest.raises(ValueError, match=r"x_01 has shape \(3, 20, 28\); pass \(B, 3, h, w\)"):
            Captioner(blip)(images[0])
        with pytest.raises(ValueError, match="max_new_tokens=0 is out of range"):
            Captioner(blip, max_new_tokens=0)


@pytest.mark.usefixtures("no_network")
class TestMissing:
    def test_what_is_neither_folder_nor_id_is_refused(self, images: Tensor) -> None:
        with pytest.raises(ValueError, match="model='nowhere' is neither an existing folder nor a hub id"):
            Captioner("nowhere")(images)

    def test_a_folder_without_weights_or_image_processor_is_named(
        self, blip: str, tmp_path: Path, images: Tensor
    ) -> None:
        for file in Path(blip).iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / "processor_config.json").rename(tmp_path / "away")
        with pytest.raises(WeightsNotFoundError, match=f"model='{tmp_path}' cannot be read: .*image processor") as one:
            Captioner(str(tmp_path))(images)
        (tmp_path / "away").rename(tmp_path / "processor_config.json")
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(WeightsNotFoundError, match=f"model='{tmp_path}' cannot be read: .*safetensors") as two:
            Captioner(str(tmp_path))(images)
        assert "\n" not in str(one.value) + str(two.value)

    def test_a_tokenizer_in_the_place_of_a_processor_is_refused(
        self, blip: str, monkeypatch: pytest.MonkeyPatch, images: Tensor
    ) -> None:
        # what AutoProcessor falls back to for kinds of models that have no processor class of their own
        monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *_, **__: tokenizer())
        with pytest.raises(WeightsNotFoundError, match=r"has no image processor \(preprocessor_config\.json\)\. Give"):
            Captioner(blip)(images)

    def test_a_model_of_another_kind_is_refused(self, blip: str, tmp_path: Path, images: Tensor) -> None:
        BlipProcessor.from_pretrained(blip).save_pretrained(tmp_path)
        BertModel(BertConfig(**SMALL, vocab_size=40)).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=f"model='{tmp_path}' is not an image-to-text model") as caught:
            Captioner(str(tmp_path))(images)
        assert "\n" not in str(caught.value)

    def test_is_read_from_the_cache_without_network(self, blip: str, empty_cache: Path, images: Tensor) -> None:
        home = empty_cache / "models--someone--blip"
        (home / "snapshots").mkdir(parents=True)
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text("0" * 40)
        (home / "snapshots" / ("0" * 40)).symlink_to(blip, target_is_directory=True)
        assert Captioner("someone/blip", max_new_tokens=4)(images) == Captioner(blip, max_new_tokens=4)(images)

    def test_offline_names_id_cache_and_command_at_once(
        self, empty_cache: Path, monkeypatch: pytest.MonkeyPatch, images: Tensor
    ) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        start = time.monotonic()
        with pytest.raises(WeightsNotFoundError) as caught:
            Captioner("someone/blip")(images)
        assert time.monotonic() - start < 2
        assert str(caught.value) == (
            f"model='someone/blip': not in the Hugging Face cache {empty_cache}, and HF_HUB_OFFLINE is set. "
            "Fetch it with `hf download someone/blip`, or give a folder."
        )


def test_a_dead_line_is_asked_once(empty_cache: Path, monkeypatch: pytest.MonkeyPatch, images: Tensor) -> None:
    asked = []

    def dead(url: str, timeout: float) -> None:
        asked.append(timeout)
        raise urllib.error.URLError("unreachable")

    monkeypatch.setattr(urllib.request, "urlopen", dead)
    with pytest.raises(WeightsNotFoundError, match=r"no connection to https://.*hf download someone/blip"):
        Captioner("someone/blip")(images)
    assert len(asked) == 1
    assert asked[0] <= 5


def test_is_fetched_without_other_formats_and_a_failed_download_keeps_its_reason(
    blip: str, empty_cache: Path, monkeypatch: pytest.MonkeyPatch, images: Tensor
) -> None:
    asked: list[str] = []

    def snapshot(repo: str, local_files_only: bool = False, allow_patterns: list[str] | None = None) -> str:
        if local_files_only:
            raise FileNotFoundError(repo)
        asked.extend(allow_patterns or [])
        return blip

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(module, "ask_hub", lambda: None)
    assert len(Captioner("someone/blip", max_new_tokens=1)(images)) == 3
    files = [file.name for file in Path(blip).iterdir()]
    assert all(any(Path(file).match(pattern) for pattern in asked) for file in files)
    assert not any(Path(f).match(p) for f in ("pytorch_model.bin", "tf_model.h5", "onnx/model.onnx") for p in asked)

    def fail(repo: str, local_files_only: bool = False, allow_patterns: list[str] | None = None) -> str:
        raise FileNotFoundError(repo) if local_files_only else RuntimeError("disk\nfull")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(WeightsNotFoundError, match="the download failed with RuntimeError: disk full"):
        Captioner("someone/blip")(images)
