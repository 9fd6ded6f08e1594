"""Texts and labels: read from a data set, checked, and encoded as a model learns them."""

import logging
import math

from datasets import ClassLabel, Dataset
from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


def check_columns(rows: Dataset, split: str, columns: list[str]):
    """Raises a ValueError if one of the columns is missing."""
    for column in columns:
        if column not in rows.column_names:
            has = ", ".join(map(repr, rows.column_names))
            raise ValueError(f"The {split} data has no column {column!r}. Its columns are {has}.")


def read_texts(rows: Dataset, split: str, columns: list[str]) -> Dataset:
    """The columns of texts.

    Raises:
        ValueError: there is no row, no such column, or a value that is not text.
    """
    if len(rows) == 0:
        raise ValueError(f"The {split} data is empty.")
    check_columns(rows, split, columns)
    for column in columns:
        for row, text in enumerate(rows[column][:]):
            if not isinstance(text, str):
                raise ValueError(
                    f"Row {row} of the {split} data must have a text in column {column!r}, but has {text!r}."
                )
    return rows.select_columns(columns)


def labelled_rows(rows: Dataset, split: str, column: str) -> list[int]:
    """The numbers of the rows to read: not of those whose class is -1, as where annotators of SNLI did not agree.

    How many are left out is logged. A test split whose classes are all -1, which are held back, is read whole.
    """
    labels = rows[column][:] if class_label(rows, column) else []
    if split.startswith("test") and all(label == -1 for label in labels):
        return list(range(len(rows)))
    if left := labels.count(-1):
        logger.warning("%d of %d rows of the %s data are left out: their label is -1.", left, len(rows), split)
    return [row for row in range(len(rows)) if not labels or labels[row] != -1]


def read_labels(rows: Dataset, split: str, column: str) -> list | None:
    """The labels of all rows as they stand there, but classes that have names by their names.

    In a test split they may be missing: there is no such column, or nothing but None or -1 in it, as in data sets of
    the Hub whose labels are held back. Then the result is None.

    Raises:
        ValueError: there is no such column, or a row without label.
    """
    is_test = split.startswith("test")
    if is_test and column not in rows.column_names:
        return None
    check_columns(rows, split, [column])
    labels = rows[column][:]
    if is_test and all(label is None or label == -1 for label in labels):
        return None
    classes = class_label(rows, column)
    for row, label in enumerate(labels):
        if label is None or (classes is not None and label == -1):
            raise ValueError(f"Row {row} of the {split} data has no label in column {column!r}. Leave such rows out.")
    # int2str takes the list of a row with several labels too.
    return labels if classes is None else [classes.int2str(label) for label in labels]


def class_label(rows: Dataset, column: str) -> ClassLabel | None:
    """The feature that names the classes in a column, or in its lists."""
    feature = rows.features.get(column)
    feature = getattr(feature, "feature", feature)
    return feature if isinstance(feature, ClassLabel) else None


def tell_problem(labels: list | None) -> str:
    """The problem type that goes with labels."""
    return {list: MULTI, float: REGRESSION}.get(type(labels[0]), SINGLE) if labels else SINGLE


def class_names(rows: Dataset, column: str, labels: list) -> list[str]:
    """The names of all classes: in the order of the data set, else sorted, numbers by their value.

    Raises:
        ValueError: there is only one.
    """
    if classes := class_label(rows, column):
        return classes.names
    names = sorted({str(name) for label in labels for name in (label if isinstance(label, list) else [label])})
    if len(names) < 2:
        raise ValueError(
            f"The train data must have two different labels or more in column {column!r}, but has {names}."
        )
    try:
        return sorted(names, key=int)
    except ValueError:
        return names


def set_names(config: PreTrainedConfig, problem: str, names: list[str], trained: bool) -> list[str]:
    """Makes a configuration that of a model which tells these classes apart, or scores by the one name that is given.

    A checkpoint that knows the same classes keeps its order of them (and so its head), in small letters or capitals.
    One that is not `trained` keeps its classes in any case, unless they are as many and have no names.

    Returns:
        the names in the order of the model's outputs.
    """
    known = [config.id2label[i] for i in range(config.num_labels)]
    given = {name.lower(): name for name in names}
    if set(given) == {name.lower() for name in known} and len(given) == len(known):
        names = [given[name.lower()] for name in known]
    elif (
        problem != REGRESSION
        and not trained
        and (len(known) != len(names) or known != [f"LABEL_{i}" for i in range(len(known))])
    ):
        names = known
    config.problem_type = problem
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    return names


def encode_labels(labels: list, split: str, problem: str, names: list[str]) -> list:
    """Labels as the model learns them: the index of a class, a 0 or 1 for each class, or a number.

    Raises:
        ValueError: a label does not suit the problem type, or is no class that the model knows.
    """
    for row, label in enumerate(labels):
        if problem == REGRESSION:
            suits, words = isinstance(label, int | float) and math.isfinite(label), "a number as label"
        elif problem == SINGLE:
            suits, words = not isinstance(label, list), "one label"
        else:
            # Not a 0 or 1 for each class, in which one of the two comes twice.
            suits, words = isinstance(label, list) and len(set(label)) == len(label), "a list of different labels"
        if not suits:
            raise ValueError(f"Row {row} of the {split} data must have {words} for {problem}, but has {label!r}.")
    if problem == REGRESSION:
        return [float(label) for label in labels]
    chosen = [[str(name) for name in label] if problem == MULTI else [str(label)] for label in labels]
    for row, several in enumerate(chosen):
        for name in several:
            if name not in names:
                raise ValueError(
                    f"Row {row} of the {split} data has the label {name!r}, but the model only knows "
                    f"{', '.join(map(repr, names))}."
                )
    if problem == SINGLE:
        ids = {name: i for i, name in enumerate(names)}
        return [ids[name] for (name,) in chosen]
    return [[float(name in several) for name in names] for several in chosen]
