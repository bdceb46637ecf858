"""DeepSpeed's ZeRO folders are put together, or refused as a whole; tests/versions compares with DeepSpeed itself."""

import shutil
from pathlib import Path

import pytest
import torch
from states import assert_reads, one_sentence
from zero_folders import write_zero

from mymodels.checkpoints import CheckpointError, check_checkpoint, open_checkpoint
from mymodels.checkpoints.converting import convert_checkpoint


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("prefix", ["bf16_", ""])
def test_parts_are_put_together(stage: int, ranks: int, prefix: str, tmp_path: Path) -> None:
    expected = write_zero(tmp_path, stage, ranks, prefix=prefix)
    for path in (tmp_path, tmp_path / "global_step3"):
        opened = open_checkpoint(path)
        assert_reads(opened, expected)
        assert opened.aliases == {"head.weight": "embed.weight"}
        assert f"stage {stage}" in opened.format and opened.extras["global_steps"] == 3
    assert check_checkpoint(tmp_path) == []


def test_convert(tmp_path: Path) -> None:
    expected = write_zero(tmp_path / "run", 3, 2)
    convert_checkpoint(tmp_path / "run", tmp_path / "out")
    assert_reads(open_checkpoint(tmp_path / "out"), expected)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", "model.safetensors"]


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    return one_sentence(caught.value, str(folder))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_missing_rank_is_named(stage: int, tmp_path: Path) -> None:
    write_zero(tmp_path, stage, 3)
    next((tmp_path / "global_step3").glob("*rank_1_*optim*")).unlink()
    message = refusal(tmp_path)
    assert "2 *_optim_states.pt" in message and "3 ranks" in message
    with pytest.raises(CheckpointError):
        convert_checkpoint(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_stage_3_needs_the_model_states_of_all_ranks(tmp_path: Path) -> None:
    write_zero(tmp_path, 3, 2)
    (tmp_path / "global_step3" / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    assert "1 *_model_states.pt" in refusal(tmp_path)


def test_parts_of_another_save_are_noticed(tmp_path: Path) -> None:
    for stage in (2, 3):
        shapes = [{"embed.weight": torch.Size((70, 5)), "mid.weight": torch.Size((5, 5))}, {}]
        write_zero(tmp_path / str(stage), stage, 2, param_shapes=shapes)
        assert "shapes in the model states need" in refusal(tmp_path / str(stage))


def test_a_tensor_that_is_in_no_part_is_named(tmp_path: Path) -> None:
    write_zero(tmp_path, 2, 2, shared_params={})
    assert "'head.weight'" in refusal(tmp_path)


@pytest.mark.parametrize("stage", [2, 3])
def test_without_optimizer_states(stage: int, tmp_path: Path) -> None:
    """Up to stage 2 the model's own tensors are whole, in the precision of training."""
    expected = write_zero(tmp_path, stage, 2)
    for file in (tmp_path / "global_step3").glob("*optim*"):
        file.unlink()
    if stage == 3:
        assert "*_optim_states.pt" in refusal(tmp_path)
    else:
        opened = open_checkpoint(tmp_path)
        assert (
            torch.equal(opened["mid.weight"], expected["mid.weight"].bfloat16())
            and "in the precision of training" in opened.format
        )


def test_one_ranks_file_names_the_folder(tmp_path: Path) -> None:
    write_zero(tmp_path, 3, 2)
    for name in ("zero_pp_rank_0_mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        assert "name the folder" in refusal(tmp_path / "global_step3" / name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda save: (save / "zero" / "w").mkdir(parents=True), "universal"),
        (
            lambda save: shutil.copy(next(save.glob("*_model_*")), save / "mp_rank_01_model_states.pt"),
            "tensor parallelism",
        ),
        (lambda save: torch.save({}, save / "layer_0_expert_0_mp_rank_00_model_states.pt"), "experts"),
        (lambda save: next(save.glob("*_model_*")).unlink(), "model_states.pt"),
        (lambda save: shutil.rmtree(save), "'global_step3'"),
    ],
)
def test_other_layouts_are_named(change, words: str, tmp_path: Path) -> None:
    write_zero(tmp_path, 2, 2)
    (tmp_path / "zero_to_fp32.py").write_text("")
    change(tmp_path / "global_step3")
    assert words in refusal(tmp_path)
