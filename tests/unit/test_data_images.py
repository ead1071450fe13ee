"""Images of rows: every form of data gives the ids of the model's own processor, and each wrong row is one error."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers

from rlhf.data.examples import Example, Reading, load_examples
from rlhf.data.images import RowImages, has_images, with_images
from rlhf.data.labelled import load_labelled
from rlhf.data.preferences import load_pairs
from rlhf.data.prompts import load_prompts
from rlhf.data.row import Row
from rlhf.data.sources import open_shards, read_rows
from rlhf.data.steps import load_step_labelled
from rlhf.errors import UserError
from rlhf.models.files.tiny import byte_tokenizer
from rlhf.models.files.tiny_vision import build_tiny_vision
from rlhf.vision.keys import image_key, image_keys
from rlhf.vision.processor import ImageProcessing
from rlhf.vision.reading import ImageCollector, ImageLimits
from rlhf.vision.store import ImageStore
from tests.vision_models import drawn, encoded

RED, BLUE = encoded(drawn("red")), encoded(drawn("blue", (32, 64)))
KEYS = image_key(RED), image_key(BLUE)
IMAGE = {"type": "image"}
IN_QWEN = "<|vision_start|><|image_pad|><|vision_end|>"


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def user(*parts: Any) -> dict[str, Any]:
    content = [text(part) if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": content}


class Model:
    """A tiny model with its own processor as the reference."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.folder = build_tiny_vision(folder / kind, kind, seed=0)
        self.processor: Any = transformers.AutoProcessor.from_pretrained(self.folder)
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(self.folder)
        processing = ImageProcessing.of_model(str(self.folder))
        assert processing is not None
        self.processing = processing

    def reading(self, store: Path, **more: Any) -> Reading:
        limits = ImageLimits(**more.pop("limits", {}))
        images = RowImages(self.processing, ImageCollector(ImageStore(store / "images"), limits))
        given = {"system_prompt": None, "apply_chat_template": True, "max_tokens": 1000, "images": images}
        return Reading(**given | more)  # type: ignore[arg-type]

    def their_ids(self, written: str, images: Sequence[bytes]) -> list[int]:
        """Return the ids of transformers' processor for a text with a mark `{}` for each image."""
        store = ImageStore(self.folder / "images")
        decoded = [store.image(store.add(data)) for data in images]
        mark = IN_QWEN if "qwen" in self.folder.name else "<image>"
        filled = written.format(*[mark] * len(images))
        given = self.processor(text=[filled], images=[decoded] if decoded else None)
        return [int(token) for token in given["input_ids"][0]]


@pytest.fixture(scope="module", params=["qwen2_5_vl", "idefics3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(request.param, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model("qwen2_5_vl", tmp_path_factory.getbasetemp())


def rows(folder: Path, *columns: Mapping[str, Any]) -> list[Row]:
    (folder / "red.png").write_bytes(RED)
    (folder / "blue.png").write_bytes(BLUE)
    file = folder / "data.jsonl"
    file.touch()
    return [Row(file=str(file), line=i, columns=given) for i, given in enumerate(columns, start=1)]


RED_PART = {"type": "image", "image": "red.png"}
BLUE_URI = f"data:image/png;base64,{base64.b64encode(BLUE).decode()}"
# columns of a prompt, and the text with marks that the template writes for them
PROMPTS: dict[str, tuple[dict[str, Any], str]] = {
    "parts": (
        {"messages": [user(RED_PART, "Like", {"type": "image_url", "image_url": {"url": BLUE_URI}}, "?")]},
        "<|user|>{}Like{}?<|eos|><|assistant|>",
    ),
    "parts filled in order": (
        {"messages": [user("Is", IMAGE, "like", IMAGE, "?")], "images": ["red.png", {"bytes": BLUE, "path": None}]},
        "<|user|>Is{}like{}?<|eos|><|assistant|>",
    ),
    "markers in messages": (
        {"messages": [{"role": "user", "content": "<image> or <image>?"}], "images": ["red.png", "blue.png"]},
        "<|user|>{} or {}?<|eos|><|assistant|>",
    ),
    "a string with markers": (
        {"prompt": "See <image>, <image>.", "images": ["red.png", "blue.png"]},
        "<|user|>See {}, {}.<|eos|><|assistant|>",
    ),
    "a string alone": (
        {"prompt": "Alike?", "images": ["red.png", "blue.png"]},
        "<|user|>{}{}Alike?<|eos|><|assistant|>",
    ),
    "several turns": (
        {
            "messages": [
                *(user(RED_PART, "Colour?"), {"role": "assistant", "content": "red"}),
                user({"type": "image", "bytes": BLUE}, "And this?"),
            ]
        },
        "<|user|>{}Colour?<|eos|><|assistant|>red<|eos|><|user|>{}And this?<|eos|><|assistant|>",
    ),
}


@pytest.mark.parametrize("form", PROMPTS)
def test_a_prompt_has_the_ids_of_the_models_processor(form: str, model: Model, tmp_path: Path) -> None:
    columns, written = PROMPTS[form]
    reading = model.reading(tmp_path)
    (prompt,) = load_prompts(rows(tmp_path, columns), model.tokenizer, reading).items
    assert model.processing.plain_ids(prompt.token_ids) == model.their_ids(written, [RED, BLUE])
    assert image_keys(prompt.token_ids) == KEYS
    assert reading.images is not None
    store = reading.images.reader.store
    assert prompt.columns["images"] == [str(store.path(key)) for key in KEYS]
    assert [Path(path).read_bytes() for path in prompt.columns["images"]] == [RED, BLUE]
    assert "\\x89PNG" not in repr(prompt.columns)  # rewards get no encoded bytes
    assert BLUE_URI not in repr(prompt.columns)
    marks = [prompt.question.index("<image>"), prompt.question.rindex("<image>")]
    assert marks[0] < marks[1]


def test_other_images_make_other_ids_of_the_same_length(qwen: Model, tmp_path: Path) -> None:
    green = base64.b64encode(encoded(drawn("green"))).decode()
    given = [{"prompt": "Colour?", "image": image} for image in ("red.png", {"base64": green}, "red.png")]
    first, other, again = (
        p.token_ids for p in load_prompts(rows(tmp_path, *given), qwen.tokenizer, qwen.reading(tmp_path)).items
    )
    assert first == again != other
    assert qwen.processing.plain_ids(first) == qwen.processing.plain_ids(other)


def test_examples_learn_the_answer_behind_the_images(model: Model, tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "red"}
    given = rows(
        tmp_path,
        {"messages": [user(RED_PART, "Colour?"), answer]},
        {"prompt": "<image>Colour?", "completion": "red", "images": ["red.png"]},
        {"prompt": [user(IMAGE, "Colour?")], "completion": [answer], "image": {"bytes": RED, "path": None}},
        {"instruction": "Colour?", "output": "red", "image": "red.png"},
    )
    examples = load_examples(given, model.tokenizer, model.reading(tmp_path)).items
    written = "<|user|>{}Colour?<|eos|><|assistant|>"
    for example in examples:
        prompt = model.processing.plain_ids(example.token_ids[: example.prompt_tokens])
        assert prompt == model.their_ids(written, [RED])
        assert model.tokenizer.decode(example.token_ids[example.prompt_tokens :]) == "red<|eos|>"
        assert all(token >= 0 for token, learn in zip(example.token_ids, example.loss_mask, strict=True) if learn)
        assert example.token_ids == examples[0].token_ids


def test_pairs_labels_and_steps_take_images_in_the_prompt(model: Model, tmp_path: Path) -> None:
    chosen, rejected = ({"role": "assistant", "content": word} for word in ("red", "green"))
    both = [user(RED_PART, "Colour?")]
    pairs = rows(
        tmp_path,
        {"prompt": "Colour?", "chosen": "red", "rejected": "green", "images": ["red.png"]},
        {"prompt": both, "chosen": [chosen], "rejected": [rejected]},
        {"chosen": [*both, chosen], "rejected": [*both, rejected]},
        {
            "chosen": [user(IMAGE, "Colour?"), chosen],
            "rejected": [user(IMAGE, "Colour?"), rejected],
            "images": ["red.png"],
        },
    )
    loaded = load_pairs(pairs, model.tokenizer, model.reading(tmp_path)).items
    wanted = model.their_ids("<|user|>{}Colour?<|eos|><|assistant|>", [RED])
    for pair in loaded:
        assert model.processing.plain_ids(pair.chosen.token_ids[: pair.prompt_tokens]) == wanted
        assert pair.token_ids == loaded[0].token_ids
        assert image_keys(pair.rejected.token_ids) == KEYS[:1]
    (label,) = load_labelled(
        rows(tmp_path, {"prompt": both, "completion": [chosen], "label": True}),
        model.tokenizer,
        model.reading(tmp_path),
    ).items
    assert label.token_ids == loaded[0].chosen.token_ids
    steps = {"prompt": "Colour?", "completions": ["It is", "red"], "labels": [True, True], "image": "red.png"}
    (step,) = load_step_labelled(rows(tmp_path, steps), model.tokenizer, model.reading(tmp_path)).items
    assert model.processing.plain_ids(step.token_ids[: len(wanted)]) == wanted


def test_prompts_that_differ_in_the_image_are_not_common(qwen: Model, tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "red"}
    given = {
        "chosen": [user(RED_PART, "?"), answer],
        "rejected": [user({"type": "image", "path": "blue.png"}, "?"), answer],
    }
    with pytest.raises(UserError, match="None of the 1 rows can be used"):
        load_pairs(rows(tmp_path, given), qwen.tokenizer, qwen.reading(tmp_path))


def test_rows_of_text_keep_their_ids(model: Model, tmp_path: Path) -> None:
    given = rows(
        tmp_path,
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"prompt": "Hi", "images": []},
        {"prompt": "Hi", "images": None, "image": ""},
        {"messages": [user("H", "i")]},
    )
    reading = model.reading(tmp_path)
    texts = Reading(system_prompt=None, apply_chat_template=True, max_tokens=1000)
    for which in (reading, texts):
        for prompt in load_prompts(given, model.tokenizer, which).items:
            assert prompt.text == "<|user|>Hi<|eos|><|assistant|>"
            assert list(prompt.token_ids) == model.tokenizer(prompt.text, add_special_tokens=False).input_ids
    assert not (tmp_path / "images").exists()


def test_a_template_that_writes_parts_alone_gets_parts(qwen: Model, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(qwen.folder)
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}"
        "{% for p in m.content if p.type == 'image' %}<|image_pad|>{% endfor %}<|eos|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    given = [{"prompt": "Hi"}, {"prompt": "Hi", "image": "red.png"}]
    alone, seen = load_prompts(rows(tmp_path, *given), tokenizer, qwen.reading(tmp_path)).items
    assert alone.text == "<|user|>Hi<|eos|><|assistant|>"
    assert seen.text == "<|user|>Hi<|image_pad|><|eos|><|assistant|>"
    (example,) = load_examples(
        rows(tmp_path, {"prompt": "Hi", "completion": "Yo"}), tokenizer, qwen.reading(tmp_path)
    ).items
    assert tokenizer.decode(example.token_ids) == "<|user|>Hi<|eos|><|assistant|>Yo<|eos|>"


def test_raw_prompts_take_images_at_their_markers(qwen: Model, tmp_path: Path) -> None:
    reading = qwen.reading(tmp_path, apply_chat_template=False)
    given = [{"prompt": "a <image> b", "image": "red.png"}, {"prompt": "ab", "image": "red.png"}]
    inside, before = load_prompts(rows(tmp_path, *given), qwen.tokenizer, reading).items
    assert inside.text == "a <|image_pad|> b"
    assert before.text == "<|image_pad|>ab"
    (example,) = load_examples(rows(tmp_path, {**given[0], "completion": "c"}), qwen.tokenizer, reading).items
    assert example.token_ids[: example.prompt_tokens] == inside.token_ids


def test_a_cut_never_divides_an_image(qwen: Model, tmp_path: Path) -> None:
    size = len(qwen.processing.expansion(48, 32))
    assert size > 3
    raw = rows(tmp_path, {"prompt": "abc<image>defg<image>hij", "images": ["red.png", "red.png"]})
    for limit in range(3, 3 * size + 20):
        reading = qwen.reading(tmp_path, apply_chat_template=False, too_long="cut", max_tokens=limit)
        (prompt,) = load_prompts(raw, qwen.tokenizer, reading).items
        whole = "abc#defg#hij"
        expected = next(
            whole[start:] for start in range(len(whole)) if sum(size if c == "#" else 1 for c in whole[start:]) <= limit
        )
        assert prompt.text == expected.replace("#", "<|image_pad|>")
        assert sum(token < 0 for token in prompt.token_ids) == size * expected.count("#")
        assert len(prompt.token_ids) <= limit
    turns = [
        user(RED_PART, "one"),
        {"role": "assistant", "content": "a"},
        user({"type": "image", "path": "blue.png"}, "two"),
    ]
    whole_length = len(
        load_prompts(rows(tmp_path, {"messages": turns}), qwen.tokenizer, qwen.reading(tmp_path)).items[0].token_ids
    )
    reading = qwen.reading(tmp_path, too_long="cut", max_tokens=whole_length - 1)
    (prompt,) = load_prompts(rows(tmp_path, {"messages": turns}), qwen.tokenizer, reading).items
    assert image_keys(prompt.token_ids) == KEYS[1:]
    learned = [*turns[:2], turns[2], {"role": "assistant", "content": "bcdefgh"}]
    long = load_examples(rows(tmp_path, {"messages": learned}), qwen.tokenizer, qwen.reading(tmp_path)).items[0]
    for limit in range(long.prompt_tokens + 1, len(long.token_ids)):
        reading = qwen.reading(tmp_path, too_long="cut", max_tokens=limit)
        example: Example = load_examples(rows(tmp_path, {"messages": learned}), qwen.tokenizer, reading).items[0]
        assert example.loss_mask[-1]  # a cut is behind a learned token, so never inside an image
        assert example.token_ids == long.token_ids[: len(example.token_ids)]


A = {"role": "assistant", "content": "red"}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "too few images": (
        {"messages": [user(IMAGE, IMAGE)], "images": ["red.png"]},
        "has 2 parts .* the row has 1 images",
    ),
    "too many images": ({"messages": [user(IMAGE)], "images": ["red.png"] * 2}, "has 1 parts .* the row has 2 images"),
    "no images for parts": (
        {"messages": [user(IMAGE, "a")]},
        "has 1 parts of type `image` without an image, .* 0 images",
    ),
    "too few markers": ({"prompt": "<image> a", "images": ["red.png"] * 2}, "has 1 markers <image> .* 2 images"),
    "too many markers": ({"prompt": "<image> <image>", "image": "red.png"}, "has 2 markers <image> .* 1 images"),
    "markers in messages": (
        {"messages": [{"role": "user", "content": "<image><image>"}], "image": "red.png"},
        "has 2 markers <image>, .* 1 images",
    ),
    "images twice": (
        {"messages": [user(RED_PART)], "images": ["red.png"]},
        "names images in its parts, and column `images` too",
    ),
    "both columns": ({"prompt": "a", "images": ["red.png"], "image": "red.png"}, "both columns `images` and `image`"),
    "more than allowed": ({"prompt": "a", "images": ["gone.png"] * 9}, "the row has 9 images, more than 8"),
    "more parts than allowed": ({"messages": [user(*[RED_PART] * 9)]}, "the row has 9 images, more than 8"),
    "a typed placeholder": ({"messages": [user(RED_PART, "<|image_pad|>")]}, "part 2, .* holds the text <|image_pad|>"),
    "a typed placeholder in a string": (
        {"prompt": "<|image_pad|>", "image": "red.png"},
        "holds the text <|image_pad|>",
    ),
    "a placeholder without images": ({"prompt": "<|image_pad|>"}, "has 1 placeholders .* 0 images"),
    "a marked image of the assistant": (
        {"messages": [user("a"), {"role": "assistant", "content": [RED_PART]}, user("b")]},
        "is an image of the assistant",
    ),
    "an audio": (
        {"messages": [user({"type": "audio", "audio": "a.wav"})]},
        "of type 'audio', expected a part of type `text`",
    ),
    "a video beside an image": ({"messages": [user(RED_PART, {"type": "video", "video": "a"})]}, "of type 'video'"),
    "a part without a type": ({"messages": [user({"text": "a"})]}, "expected a part of type `text`"),
    "a missing file": (
        {"messages": [user("a", {"type": "image", "image": "gone.png"})]},
        "message 1, part 2: .*cannot be read",
    ),
    "images without a prompt": ({"question": "a", "image": "red.png"}, "has images and no prompt"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_row_is_one_error_with_its_place(case: str, qwen: Model, tmp_path: Path) -> None:
    columns, words = WRONG[case]
    given = rows(tmp_path, {"prompt": "fine", "image": "red.png"}, columns)
    with pytest.raises(UserError, match=words) as failure:
        load_prompts(given, qwen.tokenizer, qwen.reading(tmp_path))
    assert str(failure.value).startswith(f"{tmp_path}/data.jsonl:2: ")


def test_answers_hold_no_images(qwen: Model, tmp_path: Path) -> None:
    typed = {"prompt": "a", "completion": "see <|image_pad|>"}
    inside = {"prompt": [user("a")], "completion": [A, user(RED_PART), A]}
    learned = {"text": "a", "image": "red.png"}
    for columns, words in (
        (typed, "the answer holds the text"),
        (inside, "column `completion` holds an image"),
        (learned, "a model does not learn to write images"),
    ):
        with pytest.raises(UserError, match=words):
            load_examples(rows(tmp_path, columns), qwen.tokenizer, qwen.reading(tmp_path))


@pytest.mark.parametrize(
    "columns",
    [
        {"messages": [user({"type": "image", "image": "gone.png"}, "a")]},
        {"prompt": "a", "images": ["gone.png"]},
        {"prompt": "a", "image": {"bytes": RED, "path": None}},
        {"prompt": "a", "image": BLUE_URI},
    ],
)
def test_a_model_of_text_refuses_images_once(columns: dict[str, Any], tmp_path: Path) -> None:
    texts = Reading(system_prompt=None, apply_chat_template=True, max_tokens=1000)
    with pytest.raises(UserError, match=r"data\.jsonl:1: holds an image, and the model reads only text"):
        load_prompts(rows(tmp_path, columns), byte_tokenizer(), texts)


def test_a_column_image_of_another_meaning_stays(tmp_path: Path) -> None:
    texts = Reading(system_prompt=None, apply_chat_template=True, max_tokens=1000)
    given = rows(tmp_path, {"prompt": "a", "image": "python:3.11-slim"})  # a container, as in data of software tasks
    (prompt,) = load_prompts(given, byte_tokenizer(), texts).items
    assert prompt.columns["image"] == "python:3.11-slim"
    assert not has_images(given[0], strict=True)


def test_agents_and_privileged_prompts_take_no_images(qwen: Model, tmp_path: Path) -> None:
    given = rows(tmp_path, {"messages": [user(RED_PART, "a")]})
    with pytest.raises(UserError, match="the task of an agent can contain only text"):
        load_prompts(given, qwen.tokenizer, qwen.reading(tmp_path, tasks=True))
    reading = qwen.reading(tmp_path, privileged="{prompt}", max_privileged_tokens=99)
    with pytest.raises(UserError, match=r"the prompt has images, and algorithm\.privileged\.template"):
        load_prompts(given, qwen.tokenizer, reading)


def test_sources_put_images_into_the_store_as_rows_are_read(qwen: Model, tmp_path: Path) -> None:
    rows(tmp_path)
    columns = {"question": ["a", "b"], "photo": [[{"bytes": RED, "path": None}], [{"bytes": BLUE, "path": "b.png"}]]}
    table = datasets.Dataset.from_dict(columns).cast_column("photo", datasets.List(datasets.Image()))
    table.to_parquet(str(tmp_path / "d.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    lines = [{"question": q, "photo": [name]} for q, name in (("a", "red.png"), ("b", "blue.png"))]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = {"prompt": "question", "images": "photo"}
    reading = qwen.reading(tmp_path)
    assert reading.images is not None
    for source in ("d.parquet", "saved", "d.jsonl"):
        path = str(tmp_path / source)
        read = read_rows(path, columns=names, images=reading.images)
        streamed = [row for shard in open_shards(path, columns=names, images=reading.images) for row in shard.read(1)]
        assert [row.images for row in read] == [KEYS[:1], KEYS[1:]]
        assert streamed == read[1:]
        assert [Path(path).read_bytes() for row in read for path in row.columns["images"]] == [RED, BLUE]
        assert "PNG" not in repr([row.columns for row in read])
        ids = [prompt.token_ids for prompt in load_prompts(read, qwen.tokenizer, reading).items]
        assert [image_keys(token_ids) for token_ids in ids] == [KEYS[:1], KEYS[1:]]


def test_paths_of_a_data_set_of_the_hub_are_refused(qwen: Model, tmp_path: Path) -> None:
    reading = qwen.reading(tmp_path)
    row = Row(file="org/name", line=1, columns={"prompt": "a", "image": {"bytes": None, "path": "/etc/hostname"}})
    with pytest.raises(UserError, match=r"org/name:1: image 1 of column `image`: .* only a file of this machine"):
        with_images(row, reading.images)
