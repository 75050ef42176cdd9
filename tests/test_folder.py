"""Which files of a folder are data, and of which split."""

import pytest

from tuner.folder import Folder, named_split_remark, sort_folder, sort_matches, split_of


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train.jsonl", "train"),
        ("test.csv.gz", "test"),
        ("data/train-00000-of-00002.parquet", "train"),
        ("data/test-00000-of-00001.parquet", "test"),
        ("data/train_sft-00000-of-00001.parquet", "train"),
        ("data/test_sft-00000-of-00001.parquet", "test"),
        ("validation/data-00000-of-00001.arrow", "validation"),
        ("my-dev.jsonl", "validation"),
        ("en.valid.jsonl", "validation"),
        ("VAL.jsonl", "validation"),
        ("evaluation_2.json", "test"),
        ("en/test/part-0.parquet", "test"),
        ("test/train-0.parquet", "test"),  # as on the Hub, folders go first
        ("train/dev/x.parquet", "validation"),  # the innermost
        ("train_test.jsonl", "train"),
        ("contest.jsonl", None),
        ("devices.jsonl", None),
        ("latest.jsonl", None),
        ("a/rows.jsonl", None),
    ],
)
def test_splits_are_named_as_on_the_hub(path: str, split: str | None) -> None:
    assert split_of(path) == split


def test_the_test_split_is_left_out_and_the_validation_split_is_for_evaluation() -> None:
    folder = sort_folder(["data/train-0.parquet", "data/test-0.parquet", "data/validation-0.parquet", "more.csv"])
    assert folder.files == (
        ("data/train-0.parquet", "training"),
        ("data/validation-0.parquet", "validation"),
        ("more.csv", "training"),
    )
    assert list(folder.remarks()) == [
        "data/validation-0.parquet is evaluated on and not trained on (a validation split)",
        "data/test-0.parquet is not read (a test split)",
    ]


def test_a_word_within_a_name_tells_only_beside_a_train_split() -> None:
    assert sort_folder(["unit-test-questions.jsonl", "other.jsonl"]).training == (
        "other.jsonl",
        "unit-test-questions.jsonl",
    )
    assert sort_folder(["math-test.jsonl", "math-train.jsonl"]).training == ("math-train.jsonl",)
    assert sort_folder(["test.jsonl", "other.jsonl"]).training == ("other.jsonl",)


@pytest.mark.parametrize(
    ("mark", "what"),
    [
        ("adapter_config.json", "an adapter"),
        ("fetched.json", "a work directory of tuner"),
        ("trainer_state.json", "a checkpoint"),
        ("tokenizer.json", "a model"),
        ("oci-layout", "an OCI image layout"),
    ],
)
def test_folders_of_something_else_are_no_data_with_all_below_them(mark: str, what: str) -> None:
    folder = sort_folder(["rows.jsonl", f"other/{mark}", "other/rows.jsonl", "other/deep/rows.jsonl"])
    assert folder.training == ("rows.jsonl",)
    assert list(folder.remarks()) == [f"other is not read ({what})"]


def test_what_describes_data_or_is_hidden_is_none_and_nobody_is_told() -> None:
    names = ["_SUCCESS", ".git/a.json", "README.md", "dataset_info.json", "state.json", "cache-0123456789abcdef.arrow"]
    assert sort_folder(["a.jsonl", *names]) == Folder(("a.jsonl",), (), ())


def test_files_of_other_kinds_beside_data_are_named() -> None:
    assert list(sort_folder(["a.jsonl", "b.xlsx"]).remarks()) == ["b.xlsx is not read (no ending of data)"]
    assert sort_folder(["part-00000", "part-00001"]).training == ("part-00000", "part-00001")


def test_the_splits_of_a_saved_datasetdict_are_told_by_their_folders() -> None:
    paths = ["dataset_dict.json"]
    for split in ("train", "test"):
        paths += [f"{split}/{name}" for name in ("data-00000-of-00001.arrow", "dataset_info.json", "state.json")]
    assert sort_folder(paths).files == (("train/data-00000-of-00001.arrow", "training"),)


def test_a_pattern_that_matches_nothing_but_a_test_split_means_it() -> None:
    assert sort_matches(["data/test-1.parquet", "data/test-0.parquet"]).training == (
        "data/test-0.parquet",
        "data/test-1.parquet",
    )
    assert sort_matches(["data/test-0.parquet", "data/train-0.parquet"]).training == ("data/train-0.parquet",)


def test_a_file_that_is_named_itself_is_trained_on_with_a_word() -> None:
    assert named_split_remark("test.jsonl") == ("is named as a test split, and is trained on, as it was named itself")
    assert named_split_remark("train.jsonl") is None
    assert named_split_remark("latest.jsonl") is None
