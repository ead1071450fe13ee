"""Define optimization, checkpoints and evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from rlhf.evaluation.voting import AnswerForm
from rlhf.limits import MAX_TEMPERATURE, MIN_TEMPERATURE
from rlhf.sections import NotWith, OnlyIn, OnlyWith, Section

Schedule = Literal["constant", "linear", "cosine", "cosine_with_restarts", "wsd"]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Ks = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
OF_MOMENTS = NotWith("optimizer", "adafactor", because="it has no moments")
OF_SUITES = NotWith("suites", ())
SAMPLED = NotWith("temperature", 0.0, because="greedy responses to one prompt are all equal")


def _greedy_or_sampled(value: float) -> float:
    if 0.0 < value < MIN_TEMPERATURE:
        span = f"{MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}"
        raise ValueError(f"got {value:g}, expected 0 (greedy) or a number from {span}")
    return value


EvalTemperature = Annotated[float, Field(ge=0.0, le=MAX_TEMPERATURE), AfterValidator(_greedy_or_sampled)]


class EarlyStopping(Section):
    """Stop a run when the evaluation no longer improves. final/ is then the model of the best checkpoint."""

    patience: int = Field(default=3, ge=1)
    """Number of consecutive evaluations without improvement before the run stops."""
    min_delta: float = Field(default=0.0, ge=0.0)
    """Smallest counted improvement over the best evaluation."""


class TrainConfig(Section):
    """The optimizer and the batch. `steps` counts controller steps: for RL, a step is one batch of rollouts."""

    steps: int | None = Field(default=None, ge=1)
    """Steps of the whole run, resumed or not. Give either `steps` or `epochs`."""
    epochs: float | None = Field(default=None, gt=0.0, le=1_000_000)
    """Passes over data.train, instead of `steps`. Rows are prompts for RL. With several sets, a pass has as many rows
    as all sets together, whatever their weights."""
    optimizer: Literal["adamw", "adamw_8bit", "adafactor", "muon"] = "adamw"
    """adamw_8bit keeps the moments in 8 bits and needs bitsandbytes. adafactor keeps a row and a column of each matrix
    instead of moments. muon orthogonalises the matrices of the transformer blocks and uses adamw for the rest.
    adafactor and muon need zero_stage 0."""
    lr: float = Field(gt=0.0)
    """Peak learning rate."""
    lr_schedule: Schedule = "constant"
    """Schedule after the warm-up, over all optimizer steps of the run. cosine_with_restarts decays `lr_cycles` times.
    wsd (warmup-stable-decay) is constant, then decays linearly in the last `lr_decay_ratio` of the steps."""
    lr_cycles: Annotated[int, OnlyWith("lr_schedule", "cosine_with_restarts")] = Field(default=2, ge=2)
    """Number of decays from the full rate in cosine_with_restarts."""
    lr_decay_ratio: Annotated[float, OnlyWith("lr_schedule", "wsd")] = Field(default=0.1, gt=0.0, le=1.0)
    """Fraction of the run's optimizer steps with decay by wsd."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps with a learning rate rising linearly from 0."""
    warmup_ratio: Annotated[float, OnlyWith("warmup_steps", 0)] = Field(default=0.0, ge=0.0, lt=1.0)
    """Fraction of the run's optimizer steps for warm-up, rounded up, instead of `warmup_steps`."""
    min_lr_ratio: Annotated[float, NotWith("lr_schedule", "constant")] = Field(default=0.0, ge=0.0, le=1.0)
    """Learning rate one step after the end of the decay, as a fraction of lr. The last step still has a higher rate."""
    betas: Annotated[tuple[Beta, Beta], OF_MOMENTS] = (0.9, 0.999)
    """Decay rates of AdamW's moments."""
    eps: Annotated[float, OF_MOMENTS] = Field(default=1e-8, gt=0.0)
    """AdamW's epsilon."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decoupled weight decay of matrices. Norms and biases do not decay."""
    grad_clip: float = Field(default=1.0, gt=0.0)
    """Largest norm of a gradient. Longer gradients are scaled down."""
    sequences_per_update: int = Field(ge=1, le=1_000_000)
    """Sequences per optimizer step, over all ranks."""
    epochs_per_batch: Annotated[int, OnlyIn("rollouts")] = Field(default=1, ge=1, le=1000)
    """Passes over each batch of rollouts."""
    streamed: Annotated[bool, OnlyIn("rollouts")] = False
    """Compute the gradient of finished groups while later groups are still sampled. The update is the same up to
    rounding, and stays on-policy. false: wait for the whole batch. Engines need separate devices."""
    max_tokens_per_microbatch: int = Field(default=8192, ge=2)
    """Largest number of tokens in one forward and backward pass. No sequence may be longer."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Steps between checkpoints. The last step always has a checkpoint."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Number of newest checkpoints to keep. The best checkpoint is kept too."""
    preemption_grace_s: float = Field(default=25.0, gt=0.0, le=86_400)
    """Seconds after SIGTERM, SIGHUP or SIGUSR1 for finishing the step and its checkpoint, before the run ends with exit
    code 75. Kubernetes allows 30 s by default, a spot machine 30 to 120 s."""
    best_metric: Annotated[str | None, OnlyIn("data.eval")] = None
    """Evaluation metric for choosing the best checkpoint. A leading `-` means lower is better. null: the first
    evaluation set's score, or its `-kl_teacher` without rewards (its `-loss` for runs without rollouts)."""
    early_stopping: Annotated[EarlyStopping | None, OnlyIn("data.eval", "enough evaluations")] = None
    """Stop when evaluations no longer improve. null: the run does all steps."""

    @property
    def num_steps(self) -> int:
        """Return the steps of the run, known from `epochs` only after the data has been read."""
        if self.steps is None:
            raise ValueError("train.epochs has not been turned into steps: call rlhf.config.derive.with_steps first")
        return self.steps


class Grading(Section):
    """How responses are sampled for an evaluation, and graded beyond the scores."""

    temperature: Annotated[EvalTemperature, OnlyIn("responses")] = 0.0
    """0 is greedy; otherwise at least 0.01."""
    samples_per_prompt: Annotated[int, OnlyIn("responses"), SAMPLED] = Field(default=1, ge=1, le=10_000)
    """Responses to each held-out prompt; several responses need a temperature above 0."""
    k: Annotated[Ks | None, OnlyIn("responses", "passing scores")] = None
    """Values of k in pass@k and maj@k. null: 1, 2, 4, ... up to samples_per_prompt."""
    pass_score: Annotated[float | None, OnlyIn("responses")] = None
    """Lowest score with which a response passes. null: a response passes with a value of 1 of the reward function with
    the largest weight, before weighting. Functions for length and repetition never decide."""
    answer: Annotated[AnswerForm | None, OnlyIn("responses", "passing scores")] = None
    """Answer extracted from responses for majority votes (maj@k). null: as the rewards compare answers."""
    by: Annotated[str | None, OnlyIn("responses")] = Field(default=None, min_length=1)
    """A column whose values split each set. Each subset is reported in addition to the whole, as `SET.VALUE`. null: no
    split."""
    exchange_images: bool = False
    """Measure each set with images once more, as `SET.exchanged`, where each row has the image of another row. A model
    that uses the images scores lower there."""
    suites: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], OnlyIn("engines")] = ()
    """Suites of questions by name: `reasoning-basic`, or tasks and groups of lm-evaluation-harness, such as `gsm8k`."""
    suite_limit: Annotated[int | None, OnlyIn("engines"), OF_SUITES] = Field(default=None, ge=1)
    """Questions of each task in a suite. null: all."""
    suite_data: Annotated[str | None, OnlyIn("engines"), OF_SUITES] = Field(default=None, min_length=1)
    """A folder with copies of the suites' data sets, by their names on the hub. null: the hub, or the hub's local
    cache."""


class EvalConfig(Grading):
    """Evaluation on data.eval: greedy responses scored by the training rewards, or the loss for supervised runs."""

    every: int = Field(default=10, ge=1)
    """Steps between evaluations. The last step always has an evaluation."""
    at_start: bool = True
    """Also evaluate before training, as step 0."""
    greedy: Annotated[bool, OnlyIn("responses"), SAMPLED] = False
    """Sample one greedy response to each prompt in addition to the sampled responses. The score is `eval/<set>/greedy`.
    """
