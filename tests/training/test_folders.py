"""Checkpoints are whole or passed over, old ones go, and whatever goes wrong is said in a sentence and loses nothing."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from killable_runs import examples, model, pad
from transformers import AutoModelForCausalLM, TrainingArguments

from mymodels.checkpoints import CheckpointError
from mymodels.training import checkpoint_dirs
from mymodels.training.loop import train
from mymodels.training.trainer import Trainer

OPTIONS = {"per_device_train_batch_size": 6, "save_steps": 2, "num_train_epochs": 2}


def by_loop(output_dir: Path, dataset=None, trained=None, **options) -> list[float]:
    options = {**OPTIONS, **options}
    return train(trained or model(), dataset or examples(), output_dir=str(output_dir), data_collator=pad, **options)


def by_trainer(output_dir: Path, dataset=None, trained=None, resume_from_checkpoint=None, **options) -> list[float]:
    options = {**OPTIONS, "logging_steps": 1, "report_to": [], "use_cpu": True, **options}
    settings = TrainingArguments(str(output_dir), remove_unused_columns=False, **options)
    trainer = Trainer(trained or model(), settings, data_collator=pad, train_dataset=dataset or examples())
    trainer.train(resume_from_checkpoint)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


either = pytest.mark.parametrize("run", [by_loop, by_trainer])


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("run", "file"),
    [
        (by_loop, "model.safetensors"),
        (by_loop, "optimizer.pt"),
        (by_loop, "rng_state.pth"),
        (by_loop, "trainer_state.json"),
        (by_trainer, "model.safetensors"),
        *(
            pytest.param(by_trainer, f, marks=pytest.mark.slow)
            for f in ("optimizer.pt", "rng_state.pth", "trainer_state.json")
        ),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(run, file, tmp_path, caplog) -> None:
    whole = run(tmp_path)
    damage(tmp_path / "checkpoint-8" / file)
    (tmp_path / "checkpoint-6" / file).unlink()
    assert run(tmp_path, resume_from_checkpoint=True) == whole
    said = [record.getMessage() for record in caplog.records if record.name == checkpoint_dirs.__name__]
    assert len(said) == 2 and file in said[0] and file in said[1]
    assert said[0].startswith(f"{tmp_path / 'checkpoint-8'} is damaged and was skipped: ")
    damage(tmp_path / "checkpoint-4" / file)
    with pytest.raises(
        CheckpointError, match=f"{file}.*resume_from_checkpoint=True uses the newest complete checkpoint"
    ):
        run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@either
def test_nothing_to_resume_from(run, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"away (has no checkpoint )?to resume from: start without"):
        run(tmp_path / "away", resume_from_checkpoint=True)
    with pytest.raises(FileNotFoundError, match="has no checkpoint to resume from: start without"):
        run(tmp_path, resume_from_checkpoint=True)
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint folder .*checkpoint-3"):
        run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    run(tmp_path)
    for folder in checkpoint_dirs.list_checkpoints(tmp_path):
        (folder / "trainer_state.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no complete checkpoint: .*checkpoint-2 has no trainer_state\.json"):
        run(tmp_path, resume_from_checkpoint=True)


@either
def test_a_full_disk_stops_the_run_and_keeps_what_there_was(run, tmp_path, monkeypatch) -> None:
    whole = run(tmp_path / "whole")
    import mymodels.checkpoints.atomic_write as replacing

    sync, calls = replacing._sync, []

    def full(path: Path) -> None:
        calls.append(path)
        if "checkpoint-4" in str(path):
            raise OSError(28, "No space left on device", str(path))
        sync(path)

    monkeypatch.setattr(replacing, "_sync", full)
    with pytest.raises(OSError, match="checkpoint-4 was not written, and what was there is unchanged: no space left"):
        run(tmp_path / "run")
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-2"]
    assert run(tmp_path / "run", resume_from_checkpoint=True) == whole


@either
def test_a_bad_loss_names_the_examples_and_keeps_the_checkpoints(run, tmp_path) -> None:
    dataset, spoiled = examples(), model()
    dataset[13]["input_ids"][0] = 96  # a token that no other example has
    spoiled.model.embed_tokens.register_forward_hook(
        lambda module, ids, embedded: embedded * math.nan if (ids[0] == 96).any() else embedded
    )
    with pytest.raises(FloatingPointError) as error:
        run(tmp_path, dataset, spoiled)
    found = str(error.value)
    assert "the loss is nan at step " in found and " of 8: lower learning_rate=" in found
    named = [int(i) for i in re.findall(r"\d+", found.split("dataset[i] for i in ")[1].split(";")[0])]
    assert 13 in named and len(named) in (5, 6)
    assert all(tensor.isfinite().all() for tensor in spoiled.state_dict().values())
    for folder in checkpoint_dirs.list_checkpoints(tmp_path):
        assert checkpoint_dirs.check_training_checkpoint(folder) is None


def test_old_checkpoints_go_and_the_best_stays(tmp_path) -> None:
    by_loop(tmp_path, save_total_limit=2, eval_dataset=examples(5), learning_rate=0.3, num_train_epochs=4)
    state = json.loads((tmp_path / "checkpoint-16" / "trainer_state.json").read_text())
    best = f"checkpoint-{state['best_global_step']}"
    assert state["best_global_step"] < 14 and state["best_metric"] < state["metric"]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-16", best}
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(tmp_path / best)(**pad(examples(5))).loss.item()
    assert abs(loss - state["best_metric"]) < 1e-6


@either
def test_a_folder_that_vanished_comes_back(run, tmp_path) -> None:
    out, calls = tmp_path / "run", iter(range(100))
    trained = model()
    trained.register_forward_pre_hook(  # the trial before training is in eval mode
        lambda module, _: shutil.rmtree(out, ignore_errors=True) if module.training and next(calls) == 4 else None
    )
    run(out, trained=trained)
    assert [path.name for path in checkpoint_dirs.list_checkpoints(out)] == ["checkpoint-6", "checkpoint-8"]


@either
def test_no_file_is_a_pickle_that_runs_code(run, tmp_path) -> None:
    run(tmp_path, max_steps=2)
    files = {file.name: file for file in (tmp_path / "checkpoint-2").iterdir()}
    for file in files.values():
        if file.suffix in (".pt", ".pth", ".bin"):
            torch.load(file, weights_only=True)
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "manifest.json"} < files.keys()
    assert "training_args.bin" not in files


@either
def test_two_runs_do_not_mix(run, tmp_path) -> None:
    run(tmp_path, max_steps=2)
    with pytest.raises(FileExistsError, match="holds checkpoint-2 of an earlier run"):
        run(tmp_path)
    with pytest.raises(ValueError, match="was made with examples per step 6, this run has 12: choose batch size"):
        run(tmp_path, resume_from_checkpoint=True, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="was made with num examples 23, this run has 22"):
        run(tmp_path, examples(22), resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="was made with seed "):
        run(tmp_path, resume_from_checkpoint=True, seed=7)


def test_the_loop_tries_its_folder_first(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file/run cannot be written to: not a directory"):
        by_loop(tmp_path / "file" / "run")


def test_changed_arguments_are_used_and_reported(tmp_path, caplog, monkeypatch) -> None:
    """Also the advice to lower the learning rate after a bad loss would be vain otherwise."""
    used, step = [], torch.optim.AdamW.step

    def noting(self, *args, **kwargs):
        if self.param_groups[0]["lr"]:  # else torch, which makes room for the state that is to be loaded
            used.append([(group["lr"], group["weight_decay"]) for group in self.param_groups])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    by_loop(tmp_path, max_steps=2, lr_scheduler_type="constant")
    options = {"lr_scheduler_type": "constant", "resume_from_checkpoint": True}
    by_loop(tmp_path, max_steps=4, learning_rate=1e-6, weight_decay=0.5, **options)
    assert used == [[(1e-3, 0.1), (1e-3, 0.0)]] * 2 + [[(pytest.approx(1e-6), 0.5), (pytest.approx(1e-6), 0.0)]] * 2
    (said,) = [record.getMessage() for record in caplog.records if "was made with" in record.getMessage()]
    assert "learning_rate=0.001 (now 1e-06)" in said and "weight_decay=0.1 (now 0.5)" in said


def test_a_checkpoint_of_the_model_alone_is_incomplete(tmp_path, caplog) -> None:
    by_trainer(tmp_path, max_steps=2)
    by_trainer(tmp_path, max_steps=4, save_only_model=True, resume_from_checkpoint=True)
    assert checkpoint_dirs.newest_checkpoint(tmp_path).name == "checkpoint-2"
    assert "checkpoint-4 has no optimizer state (optimizer.pt), so it cannot be resumed" in caplog.text
    with pytest.raises(CheckpointError, match="save_only_model=True"):
        by_trainer(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@either
def test_versions(run, tmp_path) -> None:
    import accelerate
    import transformers

    run(tmp_path, max_steps=2)
    name = "trainer_state.json" if run is by_loop else "run.json"
    expected = {"torch": torch, "transformers": transformers, "accelerate": accelerate}
    said = json.loads((tmp_path / "checkpoint-2" / name).read_text())["versions"]
    assert said.pop("mymodels")
    assert said == {package: module.__version__.split("+")[0] for package, module in expected.items()} | {
        "torch": said["torch"]
    }
    assert said["torch"].startswith(torch.__version__.split("+")[0])


@either
@pytest.mark.parametrize("limit", [1.0, 0.0])
def test_an_infinite_gradient_stops_the_run_before_the_weights_move(run, limit, tmp_path) -> None:
    spoiled = model(dropout=0.0)
    forward = spoiled.forward

    def huge(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        outputs.loss = outputs.loss * 1e25  # finite, as are the gradients; the squares in their norm are not
        return outputs

    spoiled.forward = huge
    before = {name: tensor.clone() for name, tensor in spoiled.state_dict().items()}
    with pytest.raises(FloatingPointError, match=r"the gradient's norm is inf at step 1 of 8: .*dataset\[i\] for i in"):
        run(tmp_path, trained=spoiled, max_grad_norm=limit)
    assert all(torch.equal(tensor, before[name]) for name, tensor in spoiled.state_dict().items())


def test_stock_trainers_checkpoints_are_taken(tmp_path) -> None:
    import transformers

    settings = TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, remove_unused_columns=False, max_steps=4, **OPTIONS
    )
    transformers.Trainer(model(), settings, data_collator=pad, train_dataset=examples()).train()
    shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "checkpoint-9")
    damage(tmp_path / "checkpoint-9" / "trainer_state.json")
    (tmp_path / "checkpoint-9" / "model.safetensors").write_bytes(b"{}")
    assert checkpoint_dirs.newest_checkpoint(tmp_path).name == "checkpoint-4"
