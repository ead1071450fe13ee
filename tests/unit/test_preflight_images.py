"""The checks before a run read the images of all sets into the run's folder, once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.files.load import load
from rlhf.errors import UserError
from rlhf.evaluation.results import Marks
from rlhf.preflight.eval_inputs import inputs_of_run
from rlhf.preflight.inputs import load_inputs
from rlhf.preflight.training_data import OfflineInputs, OnlineInputs
from rlhf.tracking.run_folder.folder import RunFolder, images_folder, refuse_to_overwrite, remove_run
from rlhf.vision.keys import image_key, image_keys, image_name
from tests.vision_models import drawn, encoded

RUN = """\
run: {name: demo, dir: DIR}
policy: {model: "tiny:qwen2_5_vl", dtype: float32}
train: {steps: 1, lr: 1e-3, sequences_per_update: 2, max_tokens_per_microbatch: 256}
data: {train: DIR/train.jsonl, eval: DIR/eval.jsonl}
"""
SFT = RUN + "algorithm: {name: sft}\n"
GRPO = (
    RUN
    + """\
algorithm: {name: grpo}
rollouts: {prompts_per_step: 2, samples_per_prompt: 2, max_new_tokens: 8}
rewards: {seen: {function: "DIR/reward.py:seen"}}
"""
)
RED, BLUE = encoded(drawn("red")), encoded(drawn("blue"))
NAMES = [image_name(image_key(data)) for data in (RED, BLUE)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "red.png").write_bytes(RED)
    (tmp_path / "blue.png").write_bytes(BLUE)
    for name, image in (("train", "red.png"), ("eval", "blue.png")):
        rows = [{"prompt": f"Colour {i}?", "completion": "red", "images": [image]} for i in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "reward.py").write_text("def seen(prompt, response, images):\n    return float(len(images))\n")
    return tmp_path


def _loaded(folder: Path, text: str, *overrides: str) -> Any:
    (folder / "run.yaml").write_text(text.replace("DIR", str(folder)))
    return load(folder / "run.yaml", overrides)


def test_the_images_of_all_sets_are_in_the_run_folder(folder: Path) -> None:
    (stage,) = load_inputs(_loaded(folder, SFT))
    inputs = stage.inputs
    assert isinstance(inputs, OfflineInputs)
    assert sorted(path.name for path in (folder / "demo" / "images").iterdir()) == sorted(NAMES)
    assert stage.images is not None
    assert stage.images.reader.store.folder == images_folder(folder / "demo")
    assert {image_keys(row.token_ids) for row in inputs.rows} == {(image_key(RED),)}
    (streamed,) = load_inputs(_loaded(folder, SFT, "data.stream_window=3"))
    assert {row.token_ids for row in streamed.inputs.rows} <= {row.token_ids for row in inputs.rows}
    evaluated = inputs_of_run(_loaded(folder, SFT), model=stage.config.policy.model, against=None, marks=Marks())
    (examples,) = evaluated.candidates[0].examples.values()
    assert {image_keys(example.token_ids) for example in examples} == {(image_key(BLUE),)}
    assert evaluated.images == images_folder(folder / "demo")


def test_rewards_get_the_files_of_the_images(folder: Path) -> None:
    (stage,) = load_inputs(_loaded(folder, GRPO, "data.max_prompt_tokens=128"))
    inputs = stage.inputs
    assert isinstance(inputs, OnlineInputs)
    assert [Path(path).read_bytes() for path in inputs.prompts[0].columns["images"]] == [RED]


def test_checks_alone_write_nothing_into_the_run_folder(folder: Path) -> None:
    load_inputs(replace(_loaded(folder, SFT), folder=folder / "aside"), only_checks=True)
    assert not (folder / "demo").exists()


def test_a_run_begins_and_is_replaced_with_its_images(folder: Path) -> None:
    load_inputs(_loaded(folder, SFT))
    with RunFolder.open(folder, "demo", resume=False) as run:
        assert sorted(path.name for path in (run.path / "images").iterdir()) == sorted(NAMES)
        run.config.write_text("run: {}\n")
    refuse_to_overwrite(folder / "demo")
    remove_run(folder / "demo")
    refuse_to_overwrite(folder / "demo")
    assert sorted(path.name for path in (folder / "demo" / "images").iterdir()) == sorted(NAMES)


def test_keys_of_images_are_refused_without_a_tower(folder: Path) -> None:
    for name in ("train", "eval"):
        (folder / f"{name}.jsonl").write_text(4 * '{"prompt": "a", "completion": "b"}\n')
    text_alone = "policy.model=tiny:llama"
    load_inputs(_loaded(folder, SFT, text_alone, "data.max_images=8"))
    for override in ("data.max_images=2", "data.max_image_pixels=1000", "data.image_hosts=[a.org]"):
        key = override.partition("=")[0]
        with pytest.raises(UserError, match=rf"^{key}: has no effect here: tiny:llama reads only text\. Remove"):
            load_inputs(_loaded(folder, SFT, text_alone, override))
        with pytest.raises(UserError, match=rf"^{key}: has no effect here: .* reads only text\. Remove"):
            inputs_of_run(_loaded(folder, SFT, text_alone, override), model=None, against=None, marks=Marks())
        load_inputs(_loaded(folder, SFT, override.replace("1000", "10000")))


def test_the_limits_of_the_configuration_hold(folder: Path) -> None:
    for override, words in (
        ("data.max_image_pixels=1000", "48 x 32 pixels, more than 1,000"),
        ("policy.model=tiny:llama", "holds an image, and the model reads only text"),
    ):
        with pytest.raises(UserError, match=rf"^data\.train: .*train\.jsonl:1: .*{words}"):
            load_inputs(_loaded(folder, SFT, override))
    rows = [{"prompt": "a", "completion": "b", "images": ["red.png", "blue.png"]}]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"the row has 2 images, more than 1\. Raise data\.max_images"):
        load_inputs(_loaded(folder, SFT, "data.max_images=1"))
    for host in ("https://a.example.org", "localhost", "a b.org"):
        with pytest.raises(UserError, match=r"data\.image_hosts"):
            _loaded(folder, SFT, f"data.image_hosts=[{host}]")
