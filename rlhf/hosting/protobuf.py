"""Translate the protocol's protobuf messages: a client's rows and loss, and log-probabilities and samples for a client.

The classes of the messages come from the official client's package. No other module of the server imports the package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf.adapters import LossReport, LossRows, NamedLoss, SampleAnswer, TopTokens
from rlhf.deferred import torch
from rlhf.errors import UserError
from rlhf.hosting.images import ClientImages

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tinker.proto import tinker_public_pb2 as pb

_EMPTY_LOGPROB = -99999.0  # the protocol's value of a cell without a token
_TYPE = "ArrayRecord"
MOST_CELLS = 1 << 26  # limit of a client's tensor, against sparse tensors of absurd shapes


def messages() -> Any:
    """Return the module with the classes of the messages. UserError: the official client is not installed."""
    try:
        from tinker.proto import tinker_public_pb2
    except ImportError as error:
        raise UserError(
            f"rlhf tinker: needs the messages of the official client: `pip install 'ray-rlhf[tinker]'` ({error})"
        ) from error
    return tinker_public_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class LossCall:
    """The rows of a client's forward pass, and the loss. shapes: K of each row's targets; None: the row has a target
    at each place, and the client did not write the last axis."""

    rows: LossRows
    loss: NamedLoss
    shapes: tuple[int | None, ...]
    forward_only: bool


def parse_loss(body: bytes) -> pb.ForwardBackwardRequest:
    """Return the message in a body. UserError: the body is not such a message."""
    message: pb.ForwardBackwardRequest = messages().ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except Exception as error:  # protobuf's DecodeError, whose module differs by implementation
        if type(error).__name__ != "DecodeError":
            raise
        raise UserError(f"the body is no ForwardBackwardRequest: {error}") from error
    return message


def store_images(message: pb.ForwardBackwardRequest, images: ClientImages) -> None:
    """Replace the bytes of each image by the name of the kept image."""
    for datum in message.data:
        for chunk in datum.model_input:
            if chunk.WhichOneof("chunk") == "image":
                chunk.image.data = images.keep(chunk.image.data).encode()


def is_forward_only(body: bytes) -> bool:
    return bool(parse_loss(body).forward_only)


def loss_call(message: pb.ForwardBackwardRequest, images: ClientImages, *, max_length: int) -> LossCall:
    """Return the rows and the loss of a message with kept images. UserError names the first unusable datum."""
    settings = message.loss_fn_config_v2.items()
    written = {name: value.text if value.HasField("text") else value.number for name, value in settings}
    loss = NamedLoss(name=message.loss_fn, settings=written or dict(message.loss_fn_config))
    if not message.data:
        raise UserError("the request has no data")
    tokens: list[NDArray[Any]] = []
    targets: list[NDArray[Any]] = []
    columns: list[dict[str, NDArray[Any]]] = []
    shapes: list[int | None] = []
    for index, datum in enumerate(message.data):
        place = f"datum {index}"
        row = _tokens(datum.model_input, images, place)
        if not 0 < len(row) <= max_length:
            raise UserError(
                f"{place}: has {len(row)} tokens, and this server takes 1 to {max_length} (service.max_length)"
            )
        inputs = {name: _array(tensor, f"{place}: {name}") for name, tensor in datum.loss_fn_inputs.items()}
        target = inputs.pop("target_tokens", None)
        if target is None:
            raise UserError(f"{place}: loss_fn_inputs has no target_tokens")
        if target.ndim not in (1, 2) or len(target) != len(row) or target.size == 0:
            raise UserError(
                f"{place}: target_tokens has the shape {list(target.shape)}, expected [{len(row)}] or "
                f"[{len(row)}, K], a row for each token of model_input"
            )
        for name, column in inputs.items():
            if column.shape != target.shape:
                raise UserError(
                    f"{place}: {name} has the shape {list(column.shape)}, and target_tokens {list(target.shape)}"
                )
        shapes.append(None if target.ndim == 1 else target.shape[1])
        tokens.append(row)
        targets.append(target.reshape(len(row), -1))
        columns.append({name: column.reshape(len(row), -1).astype(np.float32) for name, column in inputs.items()})
    rows = LossRows(
        token_ids=torch.from_numpy(np.concatenate(tokens).astype(np.int64)),
        lengths=torch.tensor([len(row) for row in tokens]),
        targets=torch.from_numpy(_stacked(targets).astype(np.int64)),
        columns=_columns(columns, targets, message.loss_fn),
    )
    return LossCall(rows=rows, loss=loss, shapes=tuple(shapes), forward_only=message.forward_only)


def _columns(columns: Sequence[Mapping[str, Any]], targets: Sequence[Any], loss: str) -> dict[str, Any]:
    """Return the stacked columns. Targets beyond the width of a narrower row get the weight 0."""
    names = set(columns[0])
    for index, given in enumerate(columns):
        if set(given) != names:
            raise UserError(
                f"datum {index}: loss_fn_inputs has {sorted(given)}, and datum 0 has {sorted(names)}; all rows of a "
                "request need the same inputs"
            )
    widths = {target.shape[1] for target in targets}
    if len(widths) > 1:
        if loss != "cross_entropy":
            raise UserError(f"target_tokens have {sorted(widths)} columns, and {loss} needs the same number in all")
        columns = [{"weights": np.ones(t.shape, np.float32)} | dict(c) for t, c in zip(targets, columns, strict=True)]
        names = set(columns[0])
    return {name: torch.from_numpy(_stacked([given[name] for given in columns])) for name in sorted(names)}


def _stacked(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    width = max(part.shape[1] for part in parts)
    padded = [np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in parts]
    return np.ascontiguousarray(np.concatenate(padded))


def _tokens(chunks: Any, images: ClientImages, place: str) -> NDArray[Any]:
    """Return the token ids of a row, with images as in rlhf.vision.keys."""
    parts: list[NDArray[Any]] = [np.zeros(0, np.int32)]
    kinds = [chunk.WhichOneof("chunk") for chunk in chunks]
    images.refuse_many(kinds.count("image"), place=place)
    for kind, chunk in zip(kinds, chunks, strict=True):
        if kind == "image":
            parts.append(np.array(_image(chunk.image, images, place), np.int64))
            continue
        if kind != "encoded_text":
            raise UserError(f"{place}: has a chunk of the kind {kind}; this server takes encoded_text and image")
        tokens = _numbers(chunk.encoded_text.tokens, np.dtype(np.int32), place)
        if tokens.size and tokens.min() < 0:
            raise UserError(f"{place}: has the token {tokens.min()}, expected 0 or more")
        parts.append(tokens)
    return np.concatenate(parts)


def _image(image: pb.ImageChunk, images: ClientImages, place: str) -> list[int]:
    if image.HasField("override_dimensions"):
        raise UserError(f"{place}: has an image with override_dimensions, which this server does not support")
    expected = image.expected_tokens if image.HasField("expected_tokens") else None
    return images.token_ids(image.data.decode(), image.format, expected, place=place)


def _numbers(content: bytes, dtype: np.dtype[Any], place: str) -> NDArray[Any]:
    if len(content) % dtype.itemsize:
        raise UserError(f"{place}: has {len(content)} bytes, no whole number of {dtype} values")
    return np.frombuffer(content, dtype)


def _array(tensor: pb.Tensor, place: str) -> NDArray[Any]:
    """Return a dense array of a tensor in any encoding of the protocol. Unlisted cells are 0."""
    pb = messages()
    kinds: dict[int, Any] = {pb.DTYPE_FLOAT32: np.float32, pb.DTYPE_INT64: np.int64, pb.DTYPE_INT32: np.int32}
    kinds[pb.DTYPE_BFLOAT16] = np.uint16  # the upper half of a float32
    if tensor.dtype not in kinds:
        raise UserError(f"{place}: has the unknown data type {tensor.dtype}")
    dtype: np.dtype[Any] = np.dtype(kinds[tensor.dtype])
    shape = list(tensor.shape)
    if any(size < 0 for size in shape) or np.prod(shape, dtype=object) > MOST_CELLS:
        raise UserError(f"{place}: has the shape {shape}, more than {MOST_CELLS} values")
    is_sparse = tensor.WhichOneof("encoding") == "sparse_csr"
    flat = _numbers(tensor.sparse_csr.values if is_sparse else tensor.dense, dtype, place)
    if tensor.dtype == pb.DTYPE_BFLOAT16:
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
    if is_sparse:
        return _dense(tensor.sparse_csr, flat, shape, place)
    if shape and np.prod(shape) != flat.size:
        raise UserError(f"{place}: has {flat.size} values, and the shape {shape}")
    return flat.reshape(shape or [-1])


def _dense(csr: pb.SparseCsr, values: NDArray[Any], shape: list[int], place: str) -> NDArray[Any]:
    starts = _numbers(csr.crow_indices, np.dtype(np.int64), place)
    columns = _numbers(csr.col_indices, np.dtype(np.int64), place)
    counts = np.diff(starts)
    is_valid = (
        len(shape) == 2
        and len(starts) == shape[0] + 1
        and starts[0] == 0
        and (counts >= 0).all()
        and starts[-1] == len(columns) == len(values)
        and ((columns >= 0) & (columns < shape[1])).all()
    )
    if not is_valid:
        raise UserError(f"{place}: its sparse indices do not fit the shape {shape}")
    dense = np.zeros(shape, values.dtype)
    dense[np.repeat(np.arange(shape[0]), counts), columns] = values
    return dense


def loss_answer(report: LossReport, call: LossCall) -> bytes:
    """Return the log-probabilities of a report, in the shapes of the client's targets, and the sums."""
    pb = messages()
    answer = pb.ForwardBackwardOutput(loss_fn_output_type=_TYPE)
    logprobs = report.logprobs.numpy().astype(np.float32)
    ends = np.cumsum(call.rows.lengths.numpy())
    rows = np.split(logprobs, ends[:-1])
    parts = [row[:, 0] if width is None else row[:, :width] for row, width in zip(rows, call.shapes, strict=True)]
    for width, group in groupby(zip(call.shapes, parts, strict=True), key=lambda pair: pair[0]):
        arrays = [array for _, array in group]
        record = answer.loss_fn_outputs.add(num_datums=len(arrays), type_tag=_TYPE)
        column = record.fields["logprobs"]
        column.dtype, column.data = pb.DTYPE_FLOAT32, b"".join(array.tobytes() for array in arrays)
        column.offsets = np.cumsum([0, *(array.nbytes for array in arrays)]).astype(np.int64).tobytes()
        if width is not None:
            column.trailing_shape.append(width)
    answer.metrics["loss:sum"] = report.loss
    for name, value in report.metrics.items():
        answer.metrics[f"{name}:sum"] = value
    return bytes(answer.SerializeToString(deterministic=True))


def sample_answer(samples: SampleAnswer, *, scored_from: int = 0) -> bytes:
    """Return the message of an answer. scored_from: earlier tokens of the prompt get no log-probability."""
    pb = messages()
    answer = pb.SampleResponse()
    if samples.prompt_logprobs is not None:
        numbers = np.array([np.nan if value is None else value for value in samples.prompt_logprobs], np.float32)
        numbers[:scored_from] = np.nan
        answer.prompt_logprobs = numbers.tobytes()
    if samples.top_prompt is not None:
        top = [None if at < scored_from else tokens for at, tokens in enumerate(samples.top_prompt)]
        _write_top(answer.topk_prompt_logprobs, top)
    for sequence in samples.sequences:
        written = answer.sequences.add(
            stop_reason=pb.STOP_REASON_STOP if sequence.finish_reason == "stop" else pb.STOP_REASON_LENGTH,
            tokens=np.array(sequence.token_ids, np.int32).tobytes(),
            logprobs=np.array(sequence.logprobs, np.float32).tobytes(),
        )
        if sequence.top is not None:
            _write_top(written.topk_sampled_logprobs, sequence.top)
    return bytes(answer.SerializeToString(deterministic=True))


def _write_top(matrix: pb.TopkLogprobs, rows: Sequence[TopTokens | None]) -> None:
    width = max((len(row) for row in rows if row is not None), default=0)
    ids = np.zeros((len(rows), width), np.int32)
    logprobs = np.full((len(rows), width), _EMPTY_LOGPROB, np.float32)
    for at, row in enumerate(rows):
        for rank, (token, logprob) in enumerate(row or ()):
            ids[at, rank], logprobs[at, rank] = token, logprob
    matrix.token_ids, matrix.logprobs, matrix.k, matrix.length = ids.tobytes(), logprobs.tobytes(), width, len(rows)
