"""`--inputs`: arguments of `forward` from a file, for models whose inputs cannot be made up."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from own_models.series import SeriesConfig, SeriesForPrediction
from safetensors.torch import load_file, save_file

from mymodels import build_repo
from mymodels.checkpoints import CheckpointError
from mymodels.hub.clean_process import clean_process
from mymodels.hub.given_inputs import read_inputs, write_inputs

INPUTS = {
    "past_values": torch.arange(18.0).reshape(2, 9) / 18,
    "kind": torch.tensor([1, 4]),
    "observed": torch.ones(2, 9),
}


def test_every_format_gives_the_same_tensors(tmp_path: Path) -> None:
    save_file(INPUTS, tmp_path / "x.safetensors")
    np.savez(
        tmp_path / "x.npz", **{n: x.double().numpy() if x.is_floating_point() else x.numpy() for n, x in INPUTS.items()}
    )
    (tmp_path / "x.json").write_text(json.dumps({name: tensor.tolist() for name, tensor in INPUTS.items()}))
    for source in (tmp_path / "x.safetensors", str(tmp_path / "x.npz"), tmp_path / "x.json", INPUTS):
        found = read_inputs(source)
        assert found.keys() == INPUTS.keys()
        for name, tensor in INPUTS.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), (source, name)


def test_each_fault_of_a_file_is_one_sentence(tmp_path: Path) -> None:
    np.savez(tmp_path / "objects.npz", past_values=np.array([{"a": 1}], dtype=object))
    np.save(tmp_path / "bare.npy", np.ones(3))
    (tmp_path / "bare.npy").rename(tmp_path / "bare.npz")
    for name, text in {
        "nan.json": '{"x": [[NaN, 1.0]]}',
        "ragged.json": '{"x": [[1, 2], [3]]}',
        "text.json": '{"x": ["a", "b"]}',
        "list.json": "[1, 2]",
        "broken.json": '{"x": ',
        "none.json": "{}",
        "scalar.json": '{"x": 3}',
        "empty.json": '{"x": [[]]}',
        "broken.safetensors": "no header",
        "x.pt": "x",
    }.items():
        (tmp_path / name).write_text(text)
    for name, message in {
        "objects.npz": "'past_values' is pickled Python objects, which are not loaded",
        "bare.npz": "is not an .npz archive",
        "nan.json": "'x' holds NaN or infinite values",
        "ragged.json": "'x' is ragged",
        "text.json": "'x' is not an array of numbers",
        "list.json": "is not a JSON object",
        "broken.json": "cannot be read as .json",
        "none.json": "holds no array",
        "scalar.json": r"'x' has the shape \(\)",
        "empty.json": r"'x' has the shape \(1, 0\)",
        "broken.safetensors": "cannot be read as .safetensors",
        "x.pt": "inputs are read from .safetensors, .npz, .json files",
    }.items():
        with pytest.raises(CheckpointError, match=message) as caught:
            read_inputs(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_inputs(tmp_path / "absent.npz")


@pytest.mark.slow
def test_given_inputs_are_what_is_recorded_and_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SeriesForPrediction(SeriesConfig()).eval()
    with pytest.raises(
        CheckpointError, match=r"given inputs have 'foo', which forward of SeriesForPrediction does not"
    ) as e:
        build_repo(model, None, tmp_path / "repo", card="# x", inputs={**INPUTS, "foo": torch.ones(2)})
    assert str(e.value).startswith(str(tmp_path / "repo")) and not (tmp_path / "repo").exists()
    folder = build_repo(model, None, tmp_path / "repo", card="# x", golden=False)

    def forward_check(**job: str) -> tuple[str, str]:
        with clean_process(folder, ["outputs", "reload"], **job) as run:
            checks = {event["check"]: (event["status"], event["what"]) for event in run.events if "check" in event}
            if (run.scratch / "outputs.safetensors").is_file():
                seen.update(load_file(run.scratch / "outputs.safetensors"))
            assert "inputs" not in job or checks["reload"][0] == "ok"
            return checks["forward"]

    seen: dict[str, torch.Tensor] = {}
    status, what = forward_check()
    assert status == "skipped" and "pass --inputs FILE" in what and not seen
    assert forward_check(inputs=write_inputs(INPUTS, tmp_path)) == ("ok", "")
    torch.testing.assert_close(seen["prediction"], model(**INPUTS).prediction.detach().flatten())
