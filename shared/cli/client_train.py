"""What `lorad train` can be told, and the job's body that follows from it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from shared import limits
from shared.cli.client_usage import GroupedOption
from shared.cli.http import Json

_PRESETS = ("attention", "mlp", "all-linear")
_STEPS = click.IntRange(1, limits.MAX_STEPS)
_DATA = click.Path(exists=True, dir_okay=False, path_type=Path)


class _Number(click.FloatRange):
    """A finite number within a range; 'nan' is within none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


class _Rate(_Number):
    """A learning rate, or the word 'auto'."""

    name = "float|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "auto" else super().convert(value, param, ctx)


def _share(most: float, *, open_below: bool = False) -> _Number:
    return _Number(0, most, min_open=open_below)


def _option(group: str, *names: str, **facts: Any) -> Callable[[Any], Any]:
    return click.option(*names, cls=GroupedOption, group=group, **facts)


_LENGTH, _OPTIMIZER, _ADAPTER, _EVALUATION, _JOB = "Length", "Optimizer", "Adapter", "Validation", "Job"
_OPTIONS = (
    _option(_LENGTH, "--epochs", type=click.IntRange(1, limits.MAX_EPOCHS), help="Passes over the data."),
    _option(_LENGTH, "--max-steps", type=_STEPS, help="Optimizer steps; wins over --epochs."),
    _option(_LENGTH, "--max-seconds", type=click.IntRange(1, limits.MAX_SECONDS),
            help="End after so much training time, with the adapter so far."),
    _option(_LENGTH, "--max-seq-len", type=click.IntRange(8, limits.MAX_SEQ_LEN),
            help="Cut samples at so many tokens."),
    _option(_OPTIMIZER, "--batch-size", type=click.IntRange(1, limits.MAX_BATCH_SIZE),
            help="Samples per optimizer step."),
    _option(_OPTIMIZER, "--learning-rate", type=_Rate(0, limits.MAX_LEARNING_RATE, min_open=True),
            help="A number, or auto: chosen by the size of the model and the number of steps, as without it."),
    _option(_OPTIMIZER, "--schedule", type=click.Choice(["linear", "cosine", "constant"]),
            help="How the rate goes on after the warm-up."),
    _option(_OPTIMIZER, "--warmup-steps", type=click.IntRange(0, limits.MAX_STEPS),
            help="Steps in which the rate rises from 0."),
    _option(_OPTIMIZER, "--weight-decay", type=_share(1.0), help="AdamW's decay of A and B."),
    _option(_OPTIMIZER, "--max-grad-norm", type=_share(1000.0, open_below=True), help="Clip gradients at this norm."),
    _option(_OPTIMIZER, "--lora-plus", type=_Number(1, limits.MAX_LORA_PLUS_RATIO),
            help="B learns at so many times the rate of A (LoRA+)."),
    _option(_OPTIMIZER, "--train-on", type=click.Choice(["completion", "all"]),
            help="Learn the completions only, or the prompts too."),
    _option(_ADAPTER, "--rank", type=click.IntRange(1, limits.MAX_RANK), help="Rank r of the update."),
    _option(_ADAPTER, "--alpha", type=_share(limits.MAX_ALPHA, open_below=True),
            help="The update is scaled by alpha / r."),
    _option(_ADAPTER, "--rslora", is_flag=True, help="Scale by alpha / sqrt(r) instead."),
    _option(_ADAPTER, "--dropout", type=_share(limits.MAX_DROPOUT), help="Dropout on the adapter's input."),
    _option(_ADAPTER, "--target", "targets", multiple=True,
            help="A module name, repeatable, or attention, mlp, all-linear."),
    _option(_ADAPTER, "--init-from", metavar="NAME@VERSION", help="Start from this adapter's weights, in its shape."),
    _option(_EVALUATION, "--validation", metavar="FILE", type=_DATA, help="Samples to compute the validation loss on."),
    _option(_EVALUATION, "--validation-split", type=_share(0.5, open_below=True),
            help="Hold out this share of the training file instead."),
    _option(_EVALUATION, "--eval-every", type=_STEPS, help="Steps between evaluations; without it, one epoch."),
    _option(_EVALUATION, "--early-stopping", type=_STEPS, metavar="PATIENCE",
            help="Stop after so many evaluations in a row without a lower loss."),
    _option(_EVALUATION, "--publish", type=click.Choice(["auto", "last", "best"]),
            help="The adapter of the last step or of the lowest validation loss."),
    _option(_JOB, "--checkpoint-every", type=_STEPS, help="Steps between checkpoints, beside those by the clock."),
    _option(_JOB, "--priority", type=click.IntRange(-limits.MAX_PRIORITY, limits.MAX_PRIORITY),
            help="Higher goes first; 0 without it."),
    _option(_JOB, "--seed", type=click.IntRange(0, limits.MAX_SEED),
            help="Drawn, and kept with the job, if not given."),
)  # fmt: skip


def training_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command every option of a training, in groups."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def job_settings(settings: dict[str, Any]) -> Json:
    """The job's body as far as the options say, all but the files; what is not said is left to the service.

    Raises UsageError for options that do not go together, before anything is uploaded.
    """
    given = {name: value for name, value in settings.items() if not (value is None or value is False or value == ())}
    _check_validation(given)
    hyperparameters = _renamed(given, {"epochs": "n_epochs", "batch_size": "batch_size"})
    lora = _renamed(given, {"rank": "r", "alpha": "alpha", "dropout": "dropout", "rslora": "use_rslora"})
    training = _renamed(given, {
        "learning_rate": "learning_rate", "schedule": "lr_schedule", "lora_plus": "lora_plus_ratio",
        "warmup_steps": "warmup_steps", "weight_decay": "weight_decay", "max_grad_norm": "max_grad_norm",
        "max_steps": "max_steps", "max_seconds": "max_seconds", "max_seq_len": "max_seq_len", "train_on": "train_on",
        "checkpoint_every": "checkpoint_every", "validation_split": "validation_split", "eval_every": "eval_every",
        "early_stopping": "early_stopping_patience", "publish": "publish", "init_from": "init_from",
    })  # fmt: skip
    groups = {
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}} if hyperparameters else {},
        "lora": lora | _targets(given.get("targets", ())),
        "training": training,
    }
    return {name: group for name, group in groups.items() if group} | _renamed(
        given, {"seed": "seed", "priority": "priority"}
    )


def _renamed(given: Json, names: dict[str, str]) -> Json:
    return {there: given[here] for here, there in names.items() if here in given}


def _targets(targets: tuple[str, ...]) -> Json:
    preset = next((target for target in targets if target in _PRESETS), None)
    if preset and len(targets) > 1:
        raise click.UsageError(f"--target {preset} stands for several modules already; it cannot be combined")
    return {"target_modules": preset or list(targets)} if targets else {}


def _check_validation(given: Json) -> None:
    has_file, has_split = "validation" in given, "validation_split" in given
    if has_file and has_split:
        raise click.UsageError("--validation and --validation-split cannot be combined")
    needy = [f"--{name.replace('_', '-')}" for name in ("eval_every", "early_stopping") if name in given]
    needy += ["--publish best"] if given.get("publish") == "best" else []
    if needy and not (has_file or has_split):
        raise click.UsageError(f"{', '.join(needy)} needs --validation FILE or --validation-split SHARE")
