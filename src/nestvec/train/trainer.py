"""transformers' Trainer, made careful: it stops at NaN, resumes exactly, validates every size."""

from __future__ import annotations

import contextlib
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nestvec._extras import require
from nestvec._progress import progress
from nestvec.encoders._quiet import quiet
from nestvec.errors import StorageError, TrainingError
from nestvec.train.run import Run
from nestvec.train.settings import Settings, is_first_process, n_processes
from nestvec.train.validation import Validate

for _module in ("transformers", "accelerate"):
    require(_module, extra="train", why="training")

from transformers import (  # noqa: E402  # behind the checks above
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

_FULL = 1 << 18  # bytes: a disk with less is full, whatever the error was


class Careful:
    """What is added to a Trainer class; put it first: ``class T(Careful, Trainer)``."""

    #: Modules that are trained but are not part of ``model``.
    beside: tuple[nn.Module, ...] = ()

    def be_careful(self: Any, run: Run, *, settings: Settings, validate: Validate | None) -> None:
        """Take the run's folder and its validation; call it once, after ``__init__``."""
        self.run, self.validate = run, validate
        self.remove_callback(PrinterCallback)  # it writes to stdout, which is for results
        self.add_callback(_Reporter(run, settings, validate is not None))

    def go(self: Any) -> None:
        """Train from the last checkpoint, or from the start."""
        checkpoint = self.run.last_checkpoint()
        if is_first_process():
            self.run.drop_torn()
        step = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
        if is_first_process():
            self.run.keep_log_until(step)
            if step:
                sys.stderr.write(f"going on from step {step:,}\n")
        with quiet():
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def final_metrics(self: Any) -> dict[str, float]:
        """Return the validation of the model as it stands; the log has it too."""
        found = self.evaluate()
        return {name.removeprefix("eval_"): value for name, value in found.items()}

    def wait(self) -> None:
        """Wait for the other processes."""
        if n_processes() > 1:
            torch.distributed.barrier()

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if not math.isfinite(loss.item()):
            self._stop(f"the loss is {loss.item()}")
        return loss

    def _get_grad_norm(self: Any, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # pyright: ignore[reportAttributeAccessIssue]
        if n_processes() > 1:
            self._average_beside()
        # float16 expects gradients that overflow: its scaler leaves the step out.
        if not self.args.fp16 and not math.isfinite(float(norm)):
            self._stop(f"the gradient's length is {float(norm)}")
        return norm

    def _average_beside(self) -> None:
        """Do for the modules beside the model what DistributedDataParallel does for the model."""
        for module in self.beside:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    torch.distributed.all_reduce(parameter.grad)
                    parameter.grad /= n_processes()

    def _stop(self: Any, why: str) -> None:
        step = self.state.global_step + 1
        checkpoint = self.run.last_checkpoint()
        kept = f"The last good checkpoint is {checkpoint}" if checkpoint else "No checkpoint yet"
        raise TrainingError(
            f"training stopped at step {step:,}: {why}. {kept}. Lower the learning rate or the "
            f"loss's scale, or train in float32, in another folder."
        )

    def evaluate(self: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        found: dict[str, float] = {}
        if self.validate is not None and is_first_process():
            training = self.model.training
            self.model.eval()
            with torch.no_grad():
                found = {f"eval_{name}": value for name, value in self.validate().items()}
            self.model.train(training)
        self.log(dict(found))  # which adds the epoch to it
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics=found
        )
        return found

    def _save_checkpoint(self: Any, model: nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)  # pyright: ignore[reportAttributeAccessIssue]
        except (
            Exception
        ) as error:  # torch's own are riddles ("unexpected pos"), so the disk is asked
            full = shutil.disk_usage(self.run.folder).free < _FULL
            if not full and not isinstance(error, OSError):
                raise
            reason = "no space left on the device" if full else str(error)
            self.run.drop_torn()
            raise StorageError(
                f"cannot write a checkpoint into {self.run.checkpoints}: {reason}. Free some "
                f"space; the same command goes on from {self.run.last_checkpoint() or 'the start'}."
            ) from error
        self.wait()  # until every process has written its random state
        if is_first_process():
            self.run.mark_complete(self.state.global_step)

    def _save(self: Any, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict=state_dict)  # pyright: ignore[reportAttributeAccessIssue]
        for number, module in enumerate(self.beside):
            state = {name: value.contiguous() for name, value in module.state_dict().items()}
            for name, generator in _generators(module).items():
                state[name] = generator.get_state()
            save_file(state, Path(output_dir or "") / f"beside-{number}.safetensors")

    def _load_from_checkpoint(self: Any, checkpoint: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(checkpoint, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        for number, module in enumerate(self.beside):
            path = Path(checkpoint) / f"beside-{number}.safetensors"
            state = load_file(path)
            for name, generator in _generators(module).items():
                generator.set_state(state.pop(name))
            module.load_state_dict(state)


def _generators(module: nn.Module) -> dict[str, torch.Generator]:
    """Return the random generators that modules own, which no state_dict holds."""
    found = {f"{n}.generator": getattr(m, "generator", None) for n, m in module.named_modules()}
    return {name: one for name, one in found.items() if isinstance(one, torch.Generator)}


class ModuleTrainer(Careful, Trainer):
    """Train a module whose ``forward(**batch)`` returns ``{"loss": scalar}``.

    ``head`` is the part of it that has ``settings.head_learning_rate``.
    """

    def __init__(
        self,
        module: nn.Module,
        dataset: Any,
        run: Run,
        *,
        settings: Settings,
        collate: Callable[[list[Any]], dict[str, Any]] | None = None,
        validate: Validate | None = None,
        head: nn.Module | None = None,
    ) -> None:
        arguments = settings.arguments(run.checkpoints, n_rows=len(dataset), kind=TrainingArguments)
        super().__init__(model=module, args=arguments, train_dataset=dataset, data_collator=collate)
        self.be_careful(run, settings=settings, validate=validate)
        self.model_accepts_loss_kwargs = False  # **kwargs of a forward are its inputs, no counts
        self.head, self.head_rate = head, settings.head_rate()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        made = super().create_optimizer(model)
        if self.head is not None:  # what starts from nothing has a rate of its own
            fresh = {id(parameter) for parameter in self.head.parameters()}
            for group in list(made.param_groups):
                heads = [p for p in group["params"] if id(p) in fresh]
                if heads:
                    group["params"] = [p for p in group["params"] if id(p) not in fresh]
                    made.add_param_group({**group, "params": heads, "lr": self.head_rate})
        return made


class _Reporter(TrainerCallback):
    """Progress on stderr, records into the log, validation at its steps."""

    def __init__(self, run: Run, settings: Settings, validates: bool) -> None:
        self.run, self.settings, self.validates = run, settings, validates
        self.every = 0
        self.advance: Callable[[int], None] = lambda n: None
        self.stack = contextlib.ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        share = self.settings.validate_every
        self.every = max(1, math.ceil(state.max_steps * share if share < 1 else share))
        self.advance = self.stack.enter_context(
            progress("training", state.max_steps, show=is_first_process(), unit="steps")
        )
        self.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(1)
        if self.validates and state.global_step % self.every == 0:
            control.should_evaluate = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if is_first_process() and logs:
            self.run.log({"step": state.global_step, **logs})

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        if is_first_process() and metrics:
            words = " ".join(f"{k.removeprefix('eval_')} {v:.3f}" for k, v in metrics.items())
            sys.stderr.write(f"step {state.global_step:,}: {words}\n")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stack.close()
