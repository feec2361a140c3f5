"""How to train: what every trainer of nestvec takes, in the words of `transformers`."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nestvec.errors import DataError, MissingExtraError

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial")
EVERY = ("save_every", "validate_every", "log_every")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a training.

    Parameters
    ----------
    epochs
        Passes over the data; ``max_steps`` > 0 overrules it.
    batch_size
        Rows in a step, over all processes together: the same number trains the same way under
        ``torchrun``. Rows that do not fill a last batch wait for the next epoch's order.
    chunk_size
        Rows that are in memory together; None takes the batch. A large batch in the memory of a
        small one, at the price of a second forward pass (GradCache, arXiv:2101.06983).
    learning_rate, weight_decay, warmup, schedule
        Of AdamW: peak rate, decay, share of the steps in which the rate rises, and how it falls
        (``"linear"``, ``"cosine"``, ``"constant"``, ``"constant_with_warmup"``, ``"polynomial"``).
    head_learning_rate
        Of classifiers, which start from nothing; None takes ``learning_rate``, and 0.01 in
        `train_text`, where all else was trained before.
    max_grad_norm
        Length at which gradients are clipped.
    precision
        ``"auto"`` takes bfloat16 on an accelerator that has it and float32 elsewhere; or one of
        ``"float32"``, ``"bfloat16"``, ``"float16"``. Weights stay float32 (mixed precision).
    seed
        Of everything that is drawn.
    save_every, validate_every, log_every
        Steps between checkpoints, validations, log records; below 1 a share of all steps.
    workers
        Processes that prepare batches; 0 does it in this one.
    log_to
        Further loggers by transformers' names: ``"tensorboard"``, ``"wandb"``, ``"mlflow"``, ...
        ``log.jsonl`` in the output folder is always written.
    """

    epochs: float | int = 1
    max_steps: int = -1
    batch_size: int = 64
    chunk_size: int | None = None
    learning_rate: float | int = 5e-5
    head_learning_rate: float | int | None = None
    weight_decay: float | int = 0.0
    warmup: float | int = 0.1
    schedule: str = "linear"
    max_grad_norm: float | int = 1.0
    precision: str = "auto"
    seed: int = 0
    save_every: float | int = 0.1
    validate_every: float | int = 0.2
    log_every: float | int = 0.02
    workers: int = 0
    log_to: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise DataError(f"precision {self.precision!r} is not one of {', '.join(PRECISIONS)}.")
        wrong = [
            (name, value)
            for name in ("batch_size", "chunk_size", "learning_rate", "epochs", *EVERY)
            if (value := getattr(self, name)) is not None and not value > 0
        ]
        if wrong and not (wrong == [("epochs", self.epochs)] and self.max_steps > 0):
            name, value = wrong[0]
            raise DataError(f"{name} {value!r} must be above 0.")
        shares = {"warmup": self.warmup, "weight_decay": self.weight_decay}
        for name, value in shares.items():
            if not 0 <= value < 1:
                raise DataError(f"{name} {value!r} is not a share: 0 to below 1.")
        if self.schedule not in SCHEDULES:
            raise DataError(f"schedule {self.schedule!r} is not one of {', '.join(SCHEDULES)}.")
        if self.max_steps == 0 or self.seed < 0 or self.workers < 0:
            raise DataError("max_steps 0 trains nothing, and seed and workers are 0 or more.")
        if self.batch_size % n_processes():
            raise DataError(
                f"batch_size {self.batch_size} cannot be shared by {n_processes()} processes; give "
                f"a multiple."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return what decides the result; not where it is logged, nor how often."""
        beside = {*EVERY, "log_to", "workers"}
        return {key: value for key, value in asdict(self).items() if key not in beside}

    def check(self, *, chunks: bool = True) -> None:
        """Raise what does not fit this machine or task, before anything is written."""
        if self.chunk_size is not None and not chunks:
            raise DataError("chunk_size is for texts: batch norm would see one chunk at a time.")
        if self.precision == "float16" and not torch.cuda.is_available():
            raise DataError("float16 needs an accelerator: choose bfloat16 or float32.")
        _check_loggers(self.log_to)

    def head_rate(self, default: float | int | None = None) -> float:
        """Return the learning rate of heads that start from nothing."""
        return float(self.head_learning_rate or default or self.learning_rate)

    def arguments(
        self,
        folder: Path,
        *,
        n_rows: int,
        kind: type[Any],
        ddp_find_unused_parameters: bool = False,
        **more: Any,
    ) -> Any:
        """Return these settings as transformers' TrainingArguments (or a subclass, ``kind``)."""
        on_gpu = torch.cuda.is_available()
        precision = self.precision
        if precision == "auto":
            precision = "bfloat16" if on_gpu and torch.cuda.is_bf16_supported() else "float32"
        batch = max(n_processes(), min(self.batch_size, n_rows) // n_processes() * n_processes())
        steps = self.max_steps if self.max_steps > 0 else n_rows // batch * self.epochs
        warmup = math.ceil(self.warmup * steps)
        if "tensorboard" in self.log_to:  # beside the checkpoints, which go at the end
            os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder.parent / "runs")
        made = kind(
            output_dir=str(folder),
            num_train_epochs=self.epochs,
            max_steps=self.max_steps,
            # a batch is made once, then shared out: the same one for any number of processes
            per_device_train_batch_size=batch,
            accelerator_config={"split_batches": True},
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            warmup_steps=warmup if warmup > 1 else 0,  # the first of them has rate 0
            lr_scheduler_type=self.schedule,
            max_grad_norm=self.max_grad_norm,
            bf16=precision == "bfloat16",
            fp16=precision == "float16",
            use_cpu=not on_gpu and not torch.backends.mps.is_available(),
            ddp_backend="gloo" if n_processes() > 1 and not on_gpu else None,
            ddp_find_unused_parameters=ddp_find_unused_parameters,
            seed=self.seed,
            data_seed=self.seed,
            save_strategy="steps",
            save_steps=self.save_every,
            save_total_limit=2,
            logging_strategy="steps",
            logging_steps=self.log_every,
            logging_nan_inf_filter=False,  # a loss that is no number stops the run here
            report_to=list(self.log_to) or "none",
            disable_tqdm=True,  # progress is ours: stderr, and plain lines where there is no bar
            remove_unused_columns=False,
            dataloader_drop_last=True,
            dataloader_num_workers=self.workers,
            dataloader_pin_memory=on_gpu,
            **more,
        )
        made._n_gpu = min(made.n_gpu, 1)  # several GPUs: torchrun; DataParallel splits batches
        return made


def _check_loggers(names: Sequence[str]) -> None:
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise DataError(
                f"log_to {name!r} is not one of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}."
            )
        if name not in get_available_reporting_integrations():
            raise MissingExtraError(f"log_to {name!r} needs its package: pip install {name}")


def n_processes() -> int:
    """Return how many processes ``torchrun`` started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first_process() -> bool:
    """Return whether this process is the one that writes and speaks."""
    return int(os.environ.get("RANK", 0)) == 0
