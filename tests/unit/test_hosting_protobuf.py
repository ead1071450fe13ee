"""The messages of the official client are decoded, and the client reads our answers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tinker import types
from tinker.proto import tinker_public_pb2 as pb
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.proto.response_conv import deserialize_forward_backward_output, deserialize_sample_response

from rlhf.adapters import LossReport, SampleAnswer, SampledSequence
from rlhf.errors import UserError
from rlhf.hosting import protobuf
from rlhf.hosting.images import ClientImages

NO_IMAGES = ClientImages(Path("none"), None)


def datum(tokens: list[int], **inputs: Any) -> types.Datum:
    return types.Datum(model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs=inputs)


def message(*data: types.Datum, loss: Any = "cross_entropy", config: Any = None) -> pb.ForwardBackwardRequest:
    given = types.ForwardBackwardInput(data=list(data), loss_fn=loss, loss_fn_config=config)
    asked = types.ForwardBackwardRequest(forward_backward_input=given, model_id="s:train:0", seq_id=3)
    return protobuf.parse_loss(forward_backward_request_to_proto(asked).SerializeToString())


def call(*data: types.Datum, **options: Any) -> protobuf.LossCall:
    return protobuf.loss_call(message(*data, **options), NO_IMAGES, max_length=8)


def test_rows_follow_each_other() -> None:
    made = call(
        datum([1, 2, 3], target_tokens=[2, 3, 4], weights=[0.0, 0.5, 1.0]),
        datum([5], target_tokens=[6], weights=[2.0]),
        config={"beta": 0.25, "mode": "fast"},
    )
    assert made.rows.token_ids.tolist() == [1, 2, 3, 5]
    assert made.rows.lengths.tolist() == [3, 1]
    assert made.rows.targets.tolist() == [[2], [3], [4], [6]]
    assert made.rows.columns["weights"].tolist() == [[0.0], [0.5], [1.0], [2.0]]
    assert (made.loss.name, made.loss.settings) == ("cross_entropy", {"beta": 0.25, "mode": "fast"})
    assert (made.shapes, made.forward_only) == ((None, None), False)


def test_several_targets_a_token_may_be_sparse_and_of_different_number() -> None:
    targets = torch.zeros(3, 6, dtype=torch.int64)
    targets[1, 4] = 9
    weights = torch.zeros(3, 6)
    weights[1, 4] = 0.5
    made = call(
        datum([1, 2, 3], target_tokens=targets, weights=weights),
        datum([4], target_tokens=np.array([[7, 8]]), weights=np.array([[0.1, 0.2]], np.float32)),
    )
    assert (
        message(datum([1, 2, 3], target_tokens=targets)).data[0].loss_fn_inputs["target_tokens"].HasField("sparse_csr")
    )
    assert made.rows.targets.tolist() == [[0] * 6, [0, 0, 0, 0, 9, 0], [0] * 6, [7, 8, 0, 0, 0, 0]]
    torch.testing.assert_close(made.rows.columns["weights"][:3], weights)
    torch.testing.assert_close(made.rows.columns["weights"][3], torch.tensor([0.1, 0.2, 0, 0, 0, 0]))
    assert made.shapes == (6, 2)


def test_targets_that_fill_up_a_row_count_nothing_without_weights() -> None:
    made = call(datum([1], target_tokens=np.array([[7, 8]])), datum([2], target_tokens=[3]))
    assert made.rows.columns["weights"].tolist() == [[1.0, 1.0], [1.0, 0.0]]


def test_bfloat16_and_int32_are_decoded() -> None:
    asked = message(datum([1, 2], target_tokens=[3, 4], weights=[0.0, 0.0]))
    weights = asked.data[0].loss_fn_inputs["weights"]
    weights.dtype, weights.dense = (
        pb.DTYPE_BFLOAT16,
        torch.tensor([1.5, -2.0]).bfloat16().view(torch.int16).numpy().tobytes(),
    )
    target = asked.data[0].loss_fn_inputs["target_tokens"]
    target.dtype, target.dense = pb.DTYPE_INT32, np.array([5, 6], np.int32).tobytes()
    made = protobuf.loss_call(asked, NO_IMAGES, max_length=8)
    assert made.rows.columns["weights"].flatten().tolist() == [1.5, -2.0]
    assert made.rows.targets.flatten().tolist() == [5, 6]


@pytest.mark.parametrize(
    ("data", "loss", "text"),
    [
        ([datum([1, 2], weights=[1.0, 1.0])], "cross_entropy", "datum 0: loss_fn_inputs has no target_tokens"),
        ([datum([1, 2], target_tokens=[1])], "cross_entropy", r"target_tokens has the shape \[1\], expected \[2\]"),
        ([datum([1] * 9, target_tokens=[1] * 9)], "cross_entropy", "has 9 tokens, and this server takes 1 to 8"),
        ([datum([], target_tokens=[])], "cross_entropy", "has 0 tokens"),
        ([datum([1, 2], target_tokens=[1, 2], weights=[1.0])], "cross_entropy", r"weights has the shape \[1\]"),
        (
            [datum([1], target_tokens=[1]), datum([1], target_tokens=[1], weights=[1.0])],
            "ppo",
            "datum 1: .*same inputs",
        ),
        ([datum([1], target_tokens=[[1, 2]]), datum([1], target_tokens=[1])], "ppo", "ppo needs the same number"),
        ([], "cross_entropy", "the request has no data"),
    ],
)
def test_unusable_rows_are_named(data: list[types.Datum], loss: str, text: str) -> None:
    with pytest.raises(UserError, match=text):
        call(*data, loss=loss)


def test_broken_tensors_are_refused() -> None:
    for break_tensor, text in (
        (lambda t: setattr(t, "dense", b"123"), "no whole number of int64"),
        (lambda t: t.shape.append(7), "has 2 values, and the shape"),
        (lambda t: setattr(t, "dtype", 0), "unknown data type 0"),
        (lambda t: t.shape.extend([1 << 20, 1 << 20]), "more than"),
        (lambda t: t.sparse_csr.ParseFromString(b""), "its sparse indices do not fit"),
    ):
        asked = message(datum([1, 2], target_tokens=[3, 4]))
        tensor = asked.data[0].loss_fn_inputs["target_tokens"]
        if "sparse" in text:
            tensor.sparse_csr.values = np.array([1]).tobytes()
        break_tensor(tensor)
        with pytest.raises(UserError, match=text):
            protobuf.loss_call(asked, NO_IMAGES, max_length=8)
    with pytest.raises(UserError, match="no ForwardBackwardRequest"):
        protobuf.parse_loss(b"\xff\xff\xff")


def test_the_client_reads_log_probabilities_in_the_shapes_of_its_targets() -> None:
    made = call(
        datum([1, 2], target_tokens=[3, 4]),
        datum([5], target_tokens=np.array([[6, 7]])),
        datum([8], target_tokens=[9]),
    )
    logprobs = torch.arange(8, dtype=torch.float32).reshape(4, 2)
    report = LossReport(loss=2.5, logprobs=logprobs, metrics={"tokens": 4.0})
    answer = deserialize_forward_backward_output(protobuf.loss_answer(report, made))
    arrays = [output["logprobs"].to_numpy().tolist() for output in answer.loss_fn_outputs]
    assert arrays == [[0.0, 2.0], [[4.0, 5.0]], [6.0]]
    assert answer.metrics == {"loss:sum": 2.5, "tokens:sum": 4.0}


def test_the_client_reads_samples() -> None:
    samples = SampleAnswer(
        sequences=(
            SampledSequence(
                token_ids=(4, 5), logprobs=(-0.5, -1.5), finish_reason="stop", top=(((4, -0.5), (6, -2.0)), ())
            ),
            SampledSequence(token_ids=(), logprobs=(), finish_reason="length", top=((),)),
        ),
        prompt_logprobs=(None, -1.0, -2.0),
        top_prompt=(None, ((1, -1.0),), ((2, -0.1),)),
    )
    answer = deserialize_sample_response(protobuf.sample_answer(samples, scored_from=2))
    first, second = answer.sequences
    assert (list(first.tokens), list(first.logprobs or ()), first.stop_reason) == ([4, 5], [-0.5, -1.5], "stop")
    assert first.topk_logprobs == [[(4, -0.5), (6, -2.0)], None]
    assert (list(second.tokens), second.stop_reason) == ([], "length")
    assert answer.prompt_logprobs == [None, None, -2.0]
    ((token, logprob),) = (answer.topk_prompt_logprobs or [])[2] or []
    assert (token, round(logprob, 6)) == (2, -0.1)
    assert (answer.topk_prompt_logprobs or [])[:2] == [None, None]
    assert math.isnan(answer.prompt_logprobs_np[0])  # type: ignore[index]
