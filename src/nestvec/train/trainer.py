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
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from nestvec._extras import require
from nestvec._progress import progress
from nestvec.encoders._quiet import quiet
from nestvec.errors import StorageError, TrainingError
from nestvec.train.result import Trained
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
    #: The step of the newest validation, and what it found.
    validated: tuple[int, dict[str, float]] = (-1, {})

    def be_careful(self: Any, run: Run, *, settings: Settings, validate: Validate | None) -> None:
        """Take the run's folder and its validation; call it once, after ``__init__``."""
        self.run, self.validate = run, validate
        self.remove_callback(PrinterCallback)  # it writes to stdout, which is for results
        self.reporter = _Reporter(run, settings, validate is not None)
        self.add_callback(self.reporter)

    def go(self: Any) -> None:
        """Train from the last checkpoint, or from the start."""
        if is_first_process():
            self.run.drop_torn()
        self.wait()  # so that no process looks at what is being removed
        checkpoint = self.run.last_checkpoint()
        step = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
        if is_first_process():
            self.run.keep_log_until(step)
            if step:
                sys.stderr.write(f"going on from step {step:,}\n")
        if n_processes() > 1:  # shifts and dropout differ between processes, as within a batch
            torch.manual_seed(self.args.seed + torch.distributed.get_rank())
        try:
            with quiet():
                self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            self.reporter.close()

    def final_metrics(self: Any) -> dict[str, float]:
        """Return the validation of the model as it stands; the log has it too."""
        step, found = self.validated
        if step != self.state.global_step:
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

    def _clip_grad_norm(self: Any, model: nn.Module) -> Any:
        return self._norm(model, self.args.max_grad_norm)

    def _get_grad_norm(self: Any, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = self._norm(model, math.inf) if grad_norm is None else grad_norm
        # float16 expects gradients that overflow: its scaler leaves the step out.
        if not self.args.fp16 and not math.isfinite(float(norm)):
            self._stop(f"the gradient's length is {float(norm)}")
        return norm

    def _norm(self: Any, model: nn.Module, most: float | int) -> Any:
        """Clip the gradients of the model and of what is beside it together, and say how long."""
        others = [parameter for module in self.beside for parameter in module.parameters()]
        if n_processes() > 1:  # what DistributedDataParallel does for the model
            for parameter in others:
                if parameter.grad is not None:
                    torch.distributed.all_reduce(parameter.grad)
                    parameter.grad /= n_processes()
        return self.accelerator.clip_grad_norm_([*model.parameters(), *others], most)

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
        self.validated = self.state.global_step, found
        self.log(dict(found))  # which adds the epoch to it
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics=found
        )
        return found

    def _save_checkpoint(self: Any, model: nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)  # pyright: ignore[reportAttributeAccessIssue]
        except Exception as error:
            # torch's words for a full disk are riddles ("unexpected pos"), so the disk is asked
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
        self._save_beside(Path(output_dir or ""))

    def _save_beside(self: Any, folder: Path) -> None:
        for number, module in enumerate(self.beside):
            save_model(module, str(folder / f"beside-{number}.safetensors"))
        drawn = {name: one.get_state() for name, one in self._generators().items()}
        if drawn:
            save_file(drawn, folder / "generators.safetensors")

    def _load_from_checkpoint(self: Any, checkpoint: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(checkpoint, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        for number, module in enumerate(self.beside):
            load_model(module, str(Path(checkpoint) / f"beside-{number}.safetensors"))
        if generators := self._generators():
            drawn = load_file(Path(checkpoint) / "generators.safetensors")
            for name, generator in generators.items():
                generator.set_state(drawn[name])

    def _generators(self: Any) -> dict[str, torch.Generator]:
        """Return the random generators that modules own, which no state_dict holds."""
        modules = (
            (f"{number}.{name}", module)
            for number, root in enumerate((self.model, *self.beside))
            for name, module in root.named_modules()
        )
        found = ((name, getattr(module, "generator", None)) for name, module in modules)
        return {name: one for name, one in found if isinstance(one, torch.Generator)}


class AdapterAlone:
    """Checkpoints that hold the LoRA of a model alone: ``class T(Careful, AdapterAlone, Trainer)``.

    What it adapts is frozen, and is there when the training goes on.
    """

    #: The modules with LoRA layers; None saves the whole model.
    adapted: nn.Module | None = None

    def _save(self: Any, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.adapted is None:
            super()._save(output_dir, state_dict=state_dict)  # pyright: ignore[reportAttributeAccessIssue]
            return
        Path(output_dir or "").mkdir(parents=True, exist_ok=True)
        save_file(self._trained(), Path(output_dir or "") / "adapter.safetensors")

    def _load_from_checkpoint(self: Any, checkpoint: str, *args: Any, **kwargs: Any) -> None:
        if self.adapted is None:
            super()._load_from_checkpoint(checkpoint, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
            return
        stored = load_file(Path(checkpoint) / "adapter.safetensors")
        with torch.no_grad():
            for name, parameter in self._trained().items():
                parameter.copy_(stored[name])

    def _trained(self: Any) -> dict[str, Tensor]:
        named = self.adapted.named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad}


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
        arguments = settings.arguments(
            run.checkpoints,
            n_rows=len(dataset),
            kind=TrainingArguments,
            # else a pooler that nothing uses stops DistributedDataParallel with a riddle
            ddp_find_unused_parameters=n_processes() > 1,
        )
        super().__init__(model=module, args=arguments, train_dataset=dataset, data_collator=collate)
        self.be_careful(run, settings=settings, validate=validate)
        self.model_accepts_loss_kwargs = False  # **kwargs of a forward are its inputs, no counts
        self.head, self.head_rate = head, settings.head_rate()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # Not the Trainer's own: tied weights would be refused.
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        assert isinstance(self.model, nn.Module)
        save_model(self.model, str(folder / "model.safetensors"))
        self._save_beside(folder)

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

    def close(self) -> None:
        """Take the bar away, also after an error."""
        self.stack.close()


def carry_out(
    trainer: Any,
    run: Run,
    dims: tuple[int, ...],
    save: Callable[[dict[str, float]], None],
    layers: tuple[int, ...] = (),
) -> Trained:
    """Train, validate a last time, let the first process ``save(metrics)``, and finish the run."""
    trainer.go()
    if is_first_process():
        metrics = trainer.final_metrics()
        save(metrics)
        run.finish(metrics=metrics)
    trainer.wait()
    return Trained.of(run, dims, layers)
