"""A teacher behind a URL: the values of the same teacher in the run, refused tokenizers, retries and deadlines."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.config.schema.model import PolicyConfig, TeacherConfig
from rlhf.errors import RunError, UserError
from rlhf.models.files.tiny import build_tiny_llama
from rlhf.models.packed.row_check import check_rows
from rlhf.models.packed.row_layout import row_layout
from rlhf.rewards.services import client as service_module
from rlhf.rewards.services.client import ServiceSpec
from rlhf.types import ONLY_TEACHER, BatchPlan, MinibatchPlan, Rollouts, TokenValues, TopLogprobs
from rlhf.workers.frozen import served_model as served_model_module
from rlhf.workers.frozen.served_model import ServedModel
from rlhf.workers.frozen.served_teacher import ServedOnlineTeacherWorker, ServedTeacherWorker
from rlhf.workers.frozen.teacher import OnlineTeacherWorker, TeacherWorker
from rlhf.workers.frozen.top_settings import Top, top_of
from rlhf.workers.online.student import StudentWorker
from tests.byte_tokenizers import byte_bpe
from tests.fakes.services import FakeService, Handler, TeacherService, served
from tests.fixtures.configs import changed
from tests.fixtures.workers import (
    PLACE,
    assert_same_gradient,
    engine_of,
    gradient,
    make_update,
    random_examples,
    rollouts_of,
)

EXAMPLES = random_examples()
OPTIONS: dict[str, Any] = {"temperature": 1.0, "samples_per_prompt": 2, "max_tokens_per_microbatch": 64}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "FIRST_PAUSE_S", 0.01)


def teacher_service(model: Path, **given: Any) -> TeacherService:
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def logprobs_of(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            result: torch.Tensor = plain(torch.tensor([ids])).logits[0].log_softmax(-1)
        return result

    size = plain.config.vocab_size
    return TeacherService(
        **({"tokenizer": AutoTokenizer.from_pretrained(model), "size": size} | given), logprobs_of=logprobs_of
    )


@contextmanager
def model_at(handler: Handler, *, name: str = "m", **limits: Any) -> Iterator[ServedModel]:
    given = {"timeout_s": 5.0, "deadline_s": 10.0, "max_in_flight": 4} | limits
    with served(handler) as url:
        yield ServedModel(service=ServiceSpec(url=url, **given), name=name)


def batch(first: int) -> Rollouts:
    """Return two responses to a prompt, and a conversation with tokens of an environment at its end."""
    generator = torch.Generator().manual_seed(first)
    prompt, long, short = (torch.randint(0, 256, (n,), generator=generator).tolist() for n in (3, 5, 2))
    return rollouts_of(
        (first, prompt + long, range(3, 8)), (first + 1, prompt + short, []), (first + 2, prompt + long, [3, 5])
    )


def test_the_values_are_those_of_the_same_teacher_in_the_run(tiny_model: Path) -> None:
    config = TeacherConfig.model_validate({"model": str(tiny_model), "dtype": "float32"})
    held = OnlineTeacherWorker({ONLY_TEACHER: config}, PLACE, **OPTIONS)
    held.start()
    service = teacher_service(tiny_model)
    given = [batch(0), batch(3)]
    with model_at(service) as model:
        asking = ServedOnlineTeacherWorker({ONLY_TEACHER: model}, PLACE, **OPTIONS)
        asking.start()
        theirs, expected = asking.logprobs(None, {}, *given), held.logprobs(None, {}, *given)
        assert asking.mean_logprobs(1.0, 2, *given) == pytest.approx(held.mean_logprobs(1.0, 2, *given), abs=1e-5)
        asking.offload()
        asking.reload()
    assert theirs[-1] == expected[-1] == sum(len(part.token_ids) for part in given)
    for ours, column, part in zip(theirs[:-1], expected[:-1], given, strict=True):
        assert isinstance(ours, TokenValues)
        assert isinstance(column, TokenValues)
        assert ours.sequence_ids.tolist() == part.sequence_ids.tolist()
        torch.testing.assert_close(ours.values, column.values, rtol=0.0, atol=1e-5)
        assert bool((ours.values[~part.response_mask] == 0.0).all())
    # a sequence without sampled tokens is not sent, and no token after the last sampled token is sent
    assert sorted(len(body["prompt"]) for body in service.bodies) == sorted([8, 6, 8, 6] * 2)
    assert {(body["max_tokens"], body["prompt_logprobs"]) for body in service.bodies} == {(1, 0)}


def test_the_likeliest_tokens_come_with_their_log_probabilities(tiny_model: Path) -> None:
    service, ids = teacher_service(tiny_model), [5, 9, 200, 17, 3]
    rows = service.logprobs_of(ids)
    with model_at(service) as model:
        (scored,) = model.scored([ids], [[1, 3, 4]], top_k=3)
    best = rows[[0, 2, 3]].topk(3)
    assert scored.top_ids.tolist() == best.indices.tolist()
    torch.testing.assert_close(scored.top_logprobs, best.values)
    torch.testing.assert_close(scored.logprobs, rows[[0, 2, 3], [9, 17, 3]])


@pytest.mark.parametrize("online", [True, False])
def test_columns_of_the_likeliest_tokens_are_those_of_a_teacher_in_the_run(tiny_model: Path, online: bool) -> None:
    config = TeacherConfig.model_validate({"model": str(tiny_model), "dtype": "float32"})
    top = Top(k=5, temperature=1.0, student=PolicyConfig(model=str(tiny_model)))
    given, options = [batch(0), batch(3)], {**OPTIONS, "top": top} if online else {"top": top}
    service = teacher_service(tiny_model)
    held: Any = (OnlineTeacherWorker if online else TeacherWorker)(
        {ONLY_TEACHER: config}, PLACE, **{"max_tokens_per_microbatch": 64, **options}
    )
    held.start()
    with model_at(service) as model:
        asking: Any = (ServedOnlineTeacherWorker if online else ServedTeacherWorker)(
            {"other": model, ONLY_TEACHER: model}, PLACE, **options
        )
        if online:
            columns = [worker.states([(4, 0), (), (1, 5)], *given) for worker in (asking, held)]
        else:
            for worker in (asking, held):
                worker.load_data(EXAMPLES)
            columns = [worker.states(0, [(3, 0), (), (1,)]) for worker in (asking, held)]
    assert columns[0][-1] == columns[1][-1] > 0
    for ours, theirs in zip(columns[0][:-1], columns[1][:-1], strict=True):
        assert isinstance(ours, TopLogprobs)
        assert (ours.ids.dtype, ours.ids.shape) == (torch.int32, theirs.ids.shape)
        assert (ours.sequence_ids.tolist(), ours.lengths.tolist()) == (
            theirs.sequence_ids.tolist(),
            theirs.lengths.tolist(),
        )
        assert torch.equal(ours.ids, theirs.ids)
        torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=0.0, atol=1e-5)
        torch.testing.assert_close(ours.token_logprobs, theirs.token_logprobs, rtol=0.0, atol=1e-5)


def test_answers_are_read_as_they_come(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole answer takes far more memory than the values that are read from it."""
    service, sent, read = teacher_service(tiny_model), [], served_model_module._read

    def reading(*given: Any, **options: Any) -> Any:
        sent.append(len(service.bodies))
        return read(*given, **options)

    monkeypatch.setattr(served_model_module, "_read", reading)
    with model_at(service, max_in_flight=1) as model:
        scored = model.scored([[1, 2], [3, 4], [5, 6]], [[1]] * 3)
    assert [len(one.logprobs) for one in scored] == [1, 1, 1]
    assert sent[0] < 3


def test_another_temperature_is_refused(tiny_model: Path) -> None:
    with model_at(FakeService(200)) as model:
        asking = ServedOnlineTeacherWorker({ONLY_TEACHER: model}, PLACE, **OPTIONS)
        with pytest.raises(ValueError, match="temperature 1, not 2"):
            asking.mean_logprobs(2.0, 2, batch(0))


def test_the_same_tokenizer_is_accepted_and_another_is_named(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    service = teacher_service(tiny_model)
    with model_at(service) as model:
        model.refuse_unfit(tokenizer, longest_sequence=9)
    texts = [body["prompt"] for body in service.bodies if isinstance(body["prompt"], str)]
    special = [token for text in texts for token in tokenizer(text, add_special_tokens=False).input_ids[1:]]
    assert {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()} <= {*special}
    other = teacher_service(tiny_model, tokenizer=byte_bpe(300), size=10**6)
    other.logprobs_of = lambda ids: torch.zeros(len(ids), 300)
    with model_at(other) as model, pytest.raises(UserError) as refused:
        model.refuse_unfit(tokenizer, longest_sequence=9)
    text = str(refused.value)
    assert f"the tokenizer of m at {model.service.url} is not the policy's, {tokenizer.name_or_path}" in text
    assert "the server reads" in text


def test_fewer_token_ids_are_refused(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    size = max(tokenizer.get_vocab().values()) + 1
    service = teacher_service(tiny_model, size=size - 1)
    with model_at(service) as model, pytest.raises(UserError, match=rf"has {size} tokens.*out of vocabulary"):
        model.refuse_unfit(tokenizer, longest_sequence=9)


def test_a_server_that_fails_in_the_checks_is_not_said_to_have_another_tokenizer(tiny_model: Path) -> None:
    good = teacher_service(tiny_model)

    async def failing(request: web.Request) -> web.StreamResponse:
        is_good = request.method == "GET" or isinstance((await request.json())["prompt"], str)
        return await good(request) if is_good else web.Response(status=503)

    with model_at(failing, deadline_s=0.3, timeout_s=0.2) as model, pytest.raises(RunError) as failed:
        model.refuse_unfit(AutoTokenizer.from_pretrained(tiny_model), longest_sequence=9)
    assert str(failed.value).startswith(f"{model.service.url}: no answer within 0.3 s")


def test_busy_servers_are_asked_again_until_the_deadline(tiny_model: Path) -> None:
    good, asked = teacher_service(tiny_model), []

    async def busy(request: web.Request) -> web.StreamResponse:
        asked.append(request.path)
        return web.Response(status=(503, 429, 502)[len(asked) - 1]) if len(asked) <= 3 else await good(request)

    with model_at(busy) as model:
        (scored,) = model.scored([[1, 2]], [[1]])
    assert len(scored.logprobs) == 1
    assert asked == ["/v1/completions"] * 4

    begin, told = time.monotonic(), r"no answer within 0.3 s, after \d+ attempts; the last: HTTP 503"
    with (
        model_at(FakeService(503), deadline_s=0.3, timeout_s=0.2, token="s3cret") as model,
        pytest.raises(RunError, match=told) as failed,
    ):
        model.scored([[1, 2]] * 9, [[1]] * 9)
    assert time.monotonic() - begin < 5.0
    assert model.service.url in str(failed.value)
    assert "s3cret" not in str(failed.value) + repr(model)


def test_a_server_that_dies_in_the_run_is_an_error_at_the_deadline(tiny_model: Path) -> None:
    with model_at(teacher_service(tiny_model), deadline_s=0.3, timeout_s=0.2) as model:
        model.scored([[1, 2]], [[1]])
    with pytest.raises(RunError, match=r"no answer within 0.3 s.*Connect"):
        model.scored([[1, 2]], [[1]])


def test_a_refusal_is_final(tiny_model: Path) -> None:
    service = teacher_service(tiny_model, size=5)
    with model_at(service) as model, pytest.raises(RunError, match=r"HTTP 400: .*Token id 9 is out of vocabulary"):
        model.scored([[1, 9]], [[1]])
    assert len(service.bodies) == 1
    with model_at(service, name="other") as model, pytest.raises(UserError, match=r"HTTP 404: .*no model other"):
        model.refuse_unfit(AutoTokenizer.from_pretrained(tiny_model), longest_sequence=9)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ({}, "has no list `prompt_logprobs`"),
        ({"choices": [{"prompt_logprobs": None}]}, "has no list `prompt_logprobs`"),
        ({"choices": [{"prompt_logprobs": [None]}]}, "has 1 positions for 2 tokens"),
        ({"choices": [{"prompt_logprobs": [None, {"7": {"logprob": -1.0, "rank": 1}}]}]}, "lacks the token 2"),
        ({"choices": [{"prompt_logprobs": [None, {"2": {"logprob": 0.5, "rank": 1}}]}]}, "above 0"),
        ({"choices": [{"prompt_logprobs": [None, {"2": {"logprob": None, "rank": 1}}]}]}, "lacks the token 2"),
        ({"choices": [{"prompt_logprobs": [None, {"2": {"logprob": -1.0, "rank": 1}}]}]}, "fewer than 2 tokens"),
    ],
)
def test_an_answer_of_another_form_is_an_error(answer: Any, told: str) -> None:
    with model_at(FakeService(answer)) as model, pytest.raises(RunError, match=told):
        model.scored([[1, 2]], [[1]], top_k=2 if "fewer" in told else 0)


STUDENT = """\
run: {name: served}
policy: {model: some/model}
teacher: {url: "http://h/v1", model: m}
algorithm: {name: on_policy_distillation}
data: {train: prompts.jsonl, max_prompt_tokens: 4}
rollouts: {prompts_per_step: 2, samples_per_prompt: 3, max_new_tokens: 8}
train: {steps: 10, lr: 1.0e-6, sequences_per_update: 6, max_tokens_per_microbatch: 200}
"""


@pytest.mark.parametrize(("max_tokens", "top_k"), [(13, None), (200, None), (13, 3)])
def test_the_gradient_is_that_of_a_plain_loop_over_sequences(
    tiny_model: Path, tmp_path: Path, max_tokens: int, top_k: int | None
) -> None:
    folder = build_tiny_llama(tmp_path / "teacher", seed=1)
    if top_k is not None:  # a teacher far from the student: a small gradient would be a difference of large terms
        sure = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        sure.lm_head.weight.data *= 8
        sure.save_pretrained(folder)
    teacher = teacher_service(folder)
    overrides = [f"train.max_tokens_per_microbatch={max_tokens}", f"policy.model={tiny_model}"]
    if top_k is not None:
        overrides += [f"algorithm.top_k={top_k}", "algorithm.divergence=forward_kl"]
    (config,) = changed(STUDENT, overrides).runs.values()
    student = StudentWorker(config, PLACE, optimizer_steps=1)
    student.engine = engine_of(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).train())
    check_rows(student.engine.module, student.device)
    student.layout = row_layout(student.engine.module)
    given = [batch(0), batch(3)]
    masks = [mask for part in given for mask in part.response_mask.split(part.lengths.tolist())]
    count = sum(int(mask.sum()) for mask in masks)
    minibatch = MinibatchPlan(sequences_by_rank=((3, 0, 1, 2, 5, 4),), num_tokens=count, num_sequences=6)
    plan = BatchPlan(step=1, minibatches=(minibatch,), scores={}, kl_coef=0.0)
    with model_at(teacher) as model:
        asking: Any = ServedOnlineTeacherWorker({ONLY_TEACHER: model}, PLACE, top=top_of(config), **OPTIONS)
        if top_k is None:
            student.prepare(plan, *given, *asking.logprobs(None, {}, *given)[:-1])
            make_update(student, 0)
        else:
            student.prepare(plan, *given)
            make_update(student, 0, *asking.states([minibatch.sequences_by_rank[0]], *given)[:-1])

    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    sequences = [ids for part in given for ids in part.token_ids.split(part.lengths.tolist())]
    for ids, mask in zip(sequences, masks, strict=True):
        at = mask.nonzero()[:, 0]
        log_p, log_q = plain(ids[None]).logits[0].log_softmax(-1)[at - 1], teacher.logprobs_of(ids.tolist())[at - 1]
        if top_k is None:
            ours, theirs = (x.gather(-1, ids[at][:, None])[:, 0] for x in (log_p, log_q))
            loss = -((ours - ours.detach()).exp() * (theirs - ours.detach())).sum()
        else:
            best = log_q.topk(top_k).indices
            p, q = (x.exp().gather(-1, best) for x in (log_p, log_q))
            p, q = (torch.cat([x, 1.0 - x.sum(-1, keepdim=True)], dim=-1) for x in (p, q))
            loss = (q * (q.log() - p.log())).sum()
        (loss / count).backward()
    expected = gradient(plain)
    assert float(expected.abs().max()) > 0.1
    assert_same_gradient(gradient(student.engine.module), expected)


def test_a_server_with_fewer_alternatives_is_refused_before_the_run(tiny_model: Path) -> None:
    good = teacher_service(tiny_model)

    async def limited(request: web.Request) -> web.StreamResponse:
        if request.method == "POST" and (await request.json())["prompt_logprobs"] > 20:
            return web.json_response({"error": {"message": "greater than max allowed: 20"}}, status=400)
        return await good(request)

    told = r"does not return the 64 likeliest tokens \(algorithm.top_k\): HTTP 400: .*max allowed: 20"
    with model_at(limited) as model, pytest.raises(UserError, match=told):
        model.refuse_unfit(AutoTokenizer.from_pretrained(tiny_model), longest_sequence=9, top_k=64)


@pytest.mark.parametrize(("longest", "fits"), [(None, True), (10, True), (9, False)])
def test_a_server_of_shorter_sequences_is_refused_before_the_run(
    tiny_model: Path, longest: int | None, fits: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The protocol samples a token after each sequence."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    with model_at(teacher_service(tiny_model, longest=longest)) as model, caplog.at_level("INFO"):
        if fits:
            model.refuse_unfit(tokenizer, longest_sequence=9)
            assert ("does not say how long the sequences of m may be" in caplog.text) is (longest is None)
            return
        with pytest.raises(UserError) as refused:
            model.refuse_unfit(tokenizer, longest_sequence=9)
    text = f"the sequences of m at {model.service.url} have at most 9 tokens (max_model_len), and the run's longest "
    assert text + "sequence has 9 and needs room for one more. Start the server with 10 or more" in str(refused.value)


def test_a_server_without_a_list_of_models_is_accepted(tiny_model: Path) -> None:
    good = teacher_service(tiny_model)

    async def bare(request: web.Request) -> web.StreamResponse:
        return web.Response(status=404) if request.method == "GET" else await good(request)

    with model_at(bare) as model:
        model.refuse_unfit(AutoTokenizer.from_pretrained(tiny_model), longest_sequence=10**9)


def test_a_token_beyond_the_students_head_is_named_with_the_server(tiny_model: Path, tmp_path: Path) -> None:
    student = build_tiny_llama(tmp_path / "student", seed=1)
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | {"vocab_size": 256}))
    service = teacher_service(tiny_model)
    service.logprobs_of = lambda ids: torch.arange(300.0).expand(len(ids), -1).log_softmax(-1)  # 299 is likeliest
    top = Top(k=3, temperature=1.0, student=PolicyConfig(model=str(student)))
    with model_at(service) as model:
        asking = ServedOnlineTeacherWorker({ONLY_TEACHER: model}, PLACE, **OPTIONS, top=top)
        with pytest.raises(RunError) as failed:
            asking.states([(0,)], batch(0))
    told = (
        "the model m names token 299 among the 3 likeliest (algorithm.top_k), and the student's head has 256 tokens. "
    )
    assert str(failed.value).startswith(f"{model.service.url}: {told}Serve a model whose head is no larger")
