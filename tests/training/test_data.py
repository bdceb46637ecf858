"""Data for fine-tuning: every format gives the same rows, labels keep their names and order, bad rows get one sentence."""

import csv
import json
from collections import Counter
from pathlib import Path

import datasets
import pandas
import pytest

from mymodels.training.data import load_data
from mymodels.training.datasets_io import DataError

ROWS = [(f"text number {i}, with a comma", "good" if i % 3 else "bad") for i in range(30)]


def write(path: Path, rows: list[tuple], columns: tuple[str, ...] = ("text", "label")) -> str:
    """Rows as a file of the kind that the name ends in."""
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t").writerows([columns, *rows])
    elif path.suffix == ".parquet":
        pandas.DataFrame(rows, columns=list(columns)).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps([dict(zip(columns, row)) for row in rows]))
    else:
        path.write_text("".join(json.dumps(dict(zip(columns, row))) + "\n" for row in rows))
    return str(path)


def pairs(data) -> list[tuple[str, str]]:
    return [(row["text"], data.labels[row["label"]]) for split in (data.train, data.validation) for row in split]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_every_format_gives_the_same_rows(suffix: str, tmp_path: Path) -> None:
    data = load_data(write(tmp_path / f"reviews.{suffix}", ROWS), task="classification")
    assert sorted(pairs(data)) == sorted(ROWS) and data.labels == ["bad", "good"]
    assert (len(data.train), len(data.validation)) == (27, 3)


def test_a_folder_with_splits(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", ROWS[:20])
    write(tmp_path / "dev.jsonl", ROWS[20:25])
    write(tmp_path / "test.parquet", ROWS[25:])
    data = load_data(tmp_path, task="classification")
    assert [list(split["text"]) for split in (data.train, data.validation, data.test)] == [
        [text for text, _ in part] for part in (ROWS[:20], ROWS[20:25], ROWS[25:])
    ]


def test_a_data_set_in_memory_keeps_its_class_names() -> None:
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["zebra", "ant"])}
    )
    rows = {"sentence": [f"animal {i}" for i in range(20)], "label": [i % 2 for i in range(20)]}
    data = load_data(datasets.Dataset.from_dict(rows, features=features), task="classification")
    assert data.labels == ["zebra", "ant"]
    assert all(label == ("zebra", "ant")[int(text.split()[1]) % 2] for text, label in pairs(data))


@pytest.mark.parametrize(
    "values, known, labels",
    [
        ([10, 9, 2], [], ["2", "9", "10"]),  # numbers by number, not by alphabet
        (["b", "a", "NA"], [], ["NA", "a", "b"]),  # a name that pandas would take for a gap
        (["yes", "no", "yes"], ["yes", "no"], ["yes", "no"]),  # the model's own order
        (["yes", "no", "yes"], ["yes", "maybe"], ["no", "yes"]),
        ([True, False, True], [], ["False", "True"]),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_names_and_order_of_labels(values: list, known: list[str], labels: list[str], suffix: str, tmp_path) -> None:
    rows = [(f"text {i}", values[i % 3]) for i in range(30)]
    data = load_data(write(tmp_path / f"d.{suffix}", rows), task="classification", known_labels=known)
    assert data.labels == labels
    assert sorted(pairs(data)) == sorted((text, str(label)) for text, label in rows)


def test_the_hold_out_has_the_labels_shares_and_depends_on_the_seed_only(tmp_path: Path) -> None:
    rows = [(f"text {i}", "rare" if i % 10 == 0 else "common") for i in range(200)]
    path = write(tmp_path / "d.csv", rows)
    first, again, other = (load_data(path, task="classification", validation=0.2, seed=seed) for seed in (1, 1, 2))
    held_out = Counter(label for _, label in pairs(first)[-40:])
    assert held_out == {"rare": 4, "common": 36}
    assert pairs(first) == pairs(again) != pairs(other)


def test_every_label_is_trained_and_measured_on(tmp_path: Path) -> None:
    rows = [(f"text {i}", "rare" if i < 2 else "often") for i in range(60)]
    path = write(tmp_path / "d.csv", rows)
    for share, seed in ((0.1, 0), (0.1, 1), (0.95, 0)):
        data = load_data(path, task="classification", validation=share, seed=seed)
        assert set(data.train["label"]) == set(data.validation["label"]) == {0, 1}
        assert sorted(pairs(data)) == sorted(rows) and not data.notes


def test_a_label_that_nothing_measures_is_reported(tmp_path: Path) -> None:
    data = load_data(
        write(tmp_path / "d.csv", ROWS), task="classification", validation=write(tmp_path / "v.csv", [("new", "good")])
    )
    assert data.notes == ["the validation data have no example of 'bad': the metrics do not cover it"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_blanks_around_labels_make_no_other_labels(suffix: str, tmp_path: Path) -> None:
    rows = [(text, label + " " * (i % 2)) for i, (text, label) in enumerate(ROWS)]
    data = load_data(write(tmp_path / f"d.{suffix}", rows), task="classification")
    assert data.labels == ["bad", "good"] and sorted(pairs(data)) == sorted(ROWS)


def test_columns_are_guessed_where_there_is_no_doubt(tmp_path: Path) -> None:
    columns = ("id", "topic", "review")
    path = write(tmp_path / "d.csv", [(i, label, text) for i, (text, label) in enumerate(ROWS)], columns)
    with pytest.raises(DataError, match=r"has the columns 'id', 'topic', 'review': name .* --label-column"):
        load_data(path, task="classification")
    data = load_data(path, task="classification", label_column="topic")  # one column of texts is left
    assert sorted(pairs(data)) == sorted(ROWS)
    two = write(tmp_path / "two.csv", [(label, text) for text, label in ROWS], ("mood", "sentence"))
    assert sorted(pairs(load_data(two, task="classification"))) == sorted(ROWS)


def test_running_text_is_held_out_at_its_end(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("\n\n".join(f"Paragraph {i},\nof two lines." for i in range(20)))
    data = load_data(tmp_path / "book.txt", task="lm")
    assert data.is_running_text and len(data.train) == 18
    assert [text.split(",")[0] for text in data.validation["text"]] == ["Paragraph 18", "Paragraph 19"]


def test_the_sample_text_needs_no_file() -> None:
    data = load_data("sample_text", task="classification")
    assert data.labels == ["adult", "children"] and not set(data.train["text"]) & set(data.validation["text"])


BAD = {  # what is in the file → a part of the sentence
    "empty text": ([*ROWS[:6], ("  ", "good"), *ROWS[6:], ("", "bad")], r"row 7 \(and 1 more\), column 'text': the text is empty"),
    "missing label": ([*ROWS, ("text", "")], "row 31, column 'label': the label is missing"),
    "single class": ([(text, "good") for text, _ in ROWS], "every row has the label 'good'"),
    "as many labels as rows": ([(text, text) for text, _ in ROWS], "each of 30 rows has a different label"),
    "a label once": ([*ROWS, ("text", "odd")], "row 31 is the only one with the label 'odd'"),
    "fractions": ([(text, 0.5) for text, _ in ROWS], "row 1, column 'label': the label is 0.5"),
    "numbers for texts": ([(i, label) for i, (_, label) in enumerate(ROWS)], r"row 1 \(and 29 more\), column 'text': 0 is not a text: .* --text-column"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_bad_rows_get_one_sentence(case: str, suffix: str, tmp_path: Path) -> None:
    rows, sentence = BAD[case]
    with pytest.raises(DataError, match=sentence) as caught:
        load_data(write(tmp_path / f"bad.{suffix}", rows), task="classification")
    assert f"bad.{suffix}" in str(caught.value) and "\n" not in str(caught.value)


def test_bad_files_get_one_sentence(tmp_path: Path) -> None:
    good = write(tmp_path / "good.csv", ROWS)
    (tmp_path / "latin.csv").write_bytes("text,label\nnaïve,a\n".encode("latin-1"))
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "head.csv").write_text("text,label\n")
    (tmp_path / "ragged.csv").write_text("text,label\na,b\nc,d,e\n")
    (tmp_path / "broken.jsonl").write_text('{"text": "a", "label": "b"}\n{"text": \n')
    (tmp_path / "data.xlsx").write_bytes(b"PK")
    (tmp_path / "prose.txt").write_text("a\n\nb")
    (tmp_path / "one.txt").write_text("one paragraph")
    (tmp_path / "folder").mkdir()
    write(tmp_path / "other.csv", [*ROWS[:5], ("text", "unheard")])
    write(tmp_path / "many.jsonl", [("text", ["a", "b"]), ("text", ["a"])])
    for how, sentence in (
        ({"data": "latin.csv"}, "latin.csv line 2 is not UTF-8 .*: save the file as UTF-8"),
        ({"data": "empty.csv"}, "empty.csv is empty"),
        ({"data": "head.csv"}, "head.csv has no rows"),
        ({"data": "ragged.csv"}, "ragged.csv cannot be read as csv: .*line 3"),
        ({"data": "broken.jsonl"}, "broken.jsonl cannot be read as json"),
        ({"data": "data.xlsx"}, "data.xlsx is none of .csv, .tsv, .json"),
        ({"data": "missing.csv"}, "there is no file or folder .*missing.csv"),
        ({"data": "folder"}, "folder has no train.csv"),
        ({"data": "prose.txt"}, "is a text file, which has no labels"),
        ({"data": "one.txt", "task": "lm"}, "has 1 paragraphs, separated by empty lines, too few"),
        ({"data": "many.jsonl"}, r"row 1, column 'label': the label is \['a', 'b'\]"),
        ({"data": "good.csv", "text_column": "review"}, "has no column 'review', but 'text', 'label': correct --text-column"),
        ({"data": "good.csv", "label_column": "class"}, "has no column 'class', but .* correct --label-column"),
        ({"data": "good.csv", "validation": 1.5}, "validation=1.5 is not between 0 and 1"),
        ({"data": "good.csv", "validation": tmp_path / "none.csv"}, "there is no file .*none.csv"),
        ({"data": "good.csv", "validation": tmp_path / "other.csv"}, "other.csv row 6, column 'label': the label 'unheard' does not occur in"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=sentence) as caught:
            load_data(tmp_path / how.pop("data"), **{"task": "classification", **how})
        assert "\n" not in str(caught.value), caught.value
    with pytest.raises(DataError, match="no Hub data set could be fetched"):
        load_data("nobody/nothing", task="classification")
    assert Path(good).exists()


def test_validation_texts_that_were_trained_on_are_reported(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", ROWS)
    data = load_data(path, task="classification", validation=write(tmp_path / "v.csv", ROWS[:5]))
    assert data.notes == ["5 of the validation texts are also training texts: the metrics are too good"]
