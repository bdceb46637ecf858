"""`mymodels.Trainer` under DeepSpeed's ZeRO-3 or in one process: `zero3_run.py OUTPUT_DIR STEPS BATCH_SIZE OUT`."""

import os
import sys
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import TrainingArguments

ZERO_3 = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
if ZERO_3 and not torch.accelerator.is_available():
    # accelerate looks for a GPU to run DeepSpeed on, and takes the processes for one each where it finds none
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)

from killable_runs import examples, model, pad  # noqa: E402

from mymodels import Trainer  # noqa: E402


def main(output_dir: str, steps: str, size: str, out: str) -> None:
    torch.set_num_threads(1)
    settings = {"per_device_train_batch_size": int(size), "max_steps": int(steps), "save_steps": 4, "logging_steps": 1}
    settings |= {
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "remove_unused_columns": False,
    }
    arguments = TrainingArguments(output_dir, use_cpu=not ZERO_3, **settings)
    trainer = Trainer(model(dropout=0.0), arguments, data_collator=pad, train_dataset=examples(24))
    trainer.train(resume_from_checkpoint=any(Path(output_dir).glob("checkpoint-*")))
    assert (trainer.accelerator.distributed_type == DistributedType.DEEPSPEED) == ZERO_3
    if trainer.is_world_process_zero():
        torch.save([entry["loss"] for entry in trainer.state.log_history if "loss" in entry], out)


if __name__ == "__main__":
    main(*sys.argv[1:])
