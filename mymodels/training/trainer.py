"""transformers' Trainer with atomic checkpoints, exact resume, and a stop at NaN."""

import contextlib
import inspect
import json
import math
from collections.abc import Iterator, Sized
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from ..checkpoints import replace_folder, write_manifest
from ..checkpoints.safetensors_files import read_json
from ..checkpoints.torch_files import load_plain
from ..checkpoints.writing import torch_save
from ..models.losses import LOSS_FIELDS
from .checkpoint_dirs import STATE, find_checkpoint, remove_old_checkpoints
from .sampling import SeededCollator, non_finite_error
from .training_state import check_same_run, versions

RUN = "run.json"


class Trainer(transformers.Trainer):
    """`transformers.Trainer`, its arguments and methods, with these differences:

    - Checkpoints are atomic: a folder `checkpoint-N` is complete, with a `manifest.json` of hashes, or does not exist, also
      after a kill or with a full disk. Older checkpoints are removed only afterwards.
    - `train(resume_from_checkpoint=True)` uses the newest complete checkpoint, and warns of damaged ones that it skips.
      It raises if the size of the data, the seed, or the number of examples per step differ.
    - Without resuming, `output_dir` must have no checkpoints, so that runs do not mix (unless `save_strategy="no"`). This
      also applies to a second `train()` of the same trainer.
    - Each checkpoint has a `run.json` with the versions of the packages it depends on.
    - Resuming is exact also with a collator that draws random numbers, such as masking (without data loader workers).
    - All files can be read with `torch.load(weights_only=True)`; `training_args.bin`, a pickle, becomes
      `training_args.json`.
    - A loss or gradient that is NaN or infinite raises a `FloatingPointError` that names step and examples, before the
      weights are updated.

    DeepSpeed adds its own files to a checkpoint (`global_step…`, pickles), and updates the weights within `backward`, so
    there the `FloatingPointError` is raised after the update.

    The averages between two `logging_steps` restart after a resume: save on a logging step to log the same values.
    """

    _staging: str | None = None  # the temporary folder of the checkpoint that is being written
    _batches_done = 0  # in the current epoch, by this process

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._check_label_smoothing()
        self.add_callback(_EpochStart(self))

    def _check_label_smoothing(self) -> None:
        """Raise a `ValueError` if `label_smoothing_factor` would be ignored, or would replace the model's own loss."""
        factor = self.args.label_smoothing_factor
        if not factor:
            return
        model: Any = self.model
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        given = f"label_smoothing_factor={factor}"
        if self.compute_loss_func is not None:
            raise ValueError(f"{given} has no effect with compute_loss_func or class weights: leave one of them out")
        if "labels" not in inspect.signature(model.forward).parameters:
            raise ValueError(f"{given} has no effect: {type(model).__name__} takes no labels to smooth")
        config = getattr(model, "config", None)
        own_loss = all(hasattr(config, name) for name in LOSS_FIELDS)  # MyBert's, also when loaded as remote code
        on = [
            f"{name}={getattr(config, name)}" for name, off in LOSS_FIELDS.items() if getattr(config, name, off) != off
        ]
        if own_loss and on:
            raise ValueError(
                f"{given} would replace the loss that this model's config sets by {', '.join(on)}: "
                "set config.label_smoothing instead"
            )

    def train(self, resume_from_checkpoint: bool | str | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Trainer.train`.

        Raises:
            FileNotFoundError: there is no checkpoint to resume from.
            FileExistsError: the run is not resumed, but `output_dir` has checkpoints of an earlier run.
            CheckpointError: the given checkpoint, or every checkpoint, is damaged.
            ValueError: the checkpoint is of another run.
            FloatingPointError: a loss or gradient is NaN or infinite.
            OSError: a checkpoint could not be written; earlier ones are kept.
        """
        if resume_from_checkpoint or self.args.save_strategy != "no":
            checkpoint = find_checkpoint(self.args.output_dir, resume_from_checkpoint)
            if checkpoint and (checkpoint / RUN).is_file():  # the stock Trainer writes none
                check_same_run(checkpoint, read_json(checkpoint / RUN), self._invariants())
            resume_from_checkpoint = str(checkpoint) if checkpoint else None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _invariants(self) -> dict[str, Any]:
        """The settings that must be the same in a resumed run."""
        size, accumulate = self.args.train_batch_size, self.args.gradient_accumulation_steps
        known = isinstance(self.train_dataset, Sized)  # a stream has no length
        return {
            "examples_per_step": size * accumulate * self.args.world_size,
            "num_examples": len(self.train_dataset) if known else None,  # type: ignore[arg-type]
            "seed": self.args.seed,
        }

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        plain: Any = getattr(loader, "base_dataloader", loader)  # accelerate wraps it
        plain.collate_fn = SeededCollator(plain.collate_fn, self.args.seed, self.args.process_index)
        return loader

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss).all():
            self._raise_non_finite(f"loss is {loss.sum().item()}", self._batches_done)
        self._batches_done += 1
        if self.accelerator.sync_gradients and self.accelerator.scaler is None:  # fp16 overflows until its scale fits
            self._check_gradient(model)  # here, because clipping by an infinite norm leaves zeros
        return loss

    def _check_gradient(self, model: torch.nn.Module) -> None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if not math.isfinite(float(norm)):
            accumulated = (self._batches_done - 1) % self.args.gradient_accumulation_steps + 1
            self._raise_non_finite(f"gradient's norm is {float(norm)}", self._batches_done - accumulated)

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        with self._staged(folder) as staging:
            self._staging = str(staging)
            try:
                super()._save_checkpoint(model, trial, *args, **kwargs)
            finally:
                self._staging = None
            self.accelerator.wait_for_everyone()
            best = self.state.best_global_step and folder.with_name(f"checkpoint-{self.state.best_global_step}")
            if best and (best == folder or best.is_dir()):
                self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                written = staging / folder.name
                self.state.save_to_json(str(written / STATE))
                run = {**self._invariants(), "num_processes": self.args.world_size, "versions": versions()}
                (written / RUN).write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
                for path in list(written.iterdir()):
                    path.rename(staging / path.name)
                written.rmdir()
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            kept = Path(self.state.best_model_checkpoint) if self.state.best_model_checkpoint else None
            remove_old_checkpoints(folder.parent, folder, kept, self.args.save_total_limit)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    @contextlib.contextmanager
    def _staged(self, folder: Path) -> Iterator[Path]:
        """The main process's `replace_folder`, in which all processes write."""
        if self.args.should_save:
            with replace_folder(folder, finish=write_manifest) as staging:
                yield broadcast_object_list([staging])[0]
        else:
            yield broadcast_object_list([None])[0]

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # otherwise `_save_checkpoint` pushes the finished folder
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        super()._save(output_dir, *args, **kwargs)
        pickle = Path(output_dir or str(self.args.output_dir)) / "training_args.bin"
        if self.args.should_save and pickle.is_file():
            pickle.with_suffix(".json").write_text(self.args.to_json_string() + "\n", encoding="utf-8")
            pickle.unlink()

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        index = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        path = Path(output_dir) / f"rng_state{index}.pth"
        with path.open("rb") as file:  # not memory-mapped, because it is overwritten
            state = load_plain(file, path)
        name, keys, *rest = state["numpy"]
        torch_save({**state, "numpy": (name, keys.tolist(), *rest)}, path)  # an array is more than plain data

    def _raise_non_finite(self, what: str, first_batch: int) -> None:
        """Raise for a value that is not finite, with the examples of this process's batches since `first_batch`."""
        loader: Any = self.callback_handler.train_dataloader
        examples: list[int] = []
        with contextlib.suppress(Exception):  # other samplers may not be repeatable
            loader.set_epoch(int(self.state.epoch or 0))
            batches = islice(loader.batch_sampler, first_batch, max(self._batches_done, first_batch + 1))
            examples = [example for batch in batches for example in batch]
        raise non_finite_error(
            what, self.state.global_step + 1, self.state.max_steps, self.args.learning_rate, examples
        )


class _EpochStart(TrainerCallback):
    """Numbers a trainer's batches."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loader: Any = self.trainer.callback_handler.train_dataloader
        with contextlib.suppress(TypeError):  # a stream has no length
            epoch, steps = divmod(state.global_step, math.ceil(len(loader) / args.gradient_accumulation_steps))
            self.trainer._batches_done = steps * args.gradient_accumulation_steps
            if isinstance(loader.collate_fn, SeededCollator):
                loader.collate_fn.count = epoch * len(loader) + self.trainer._batches_done
