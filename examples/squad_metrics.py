"""Exact match and F1 of extracted answers, as the official evaluation of SQuAD defines them.

Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text", 2016, section 6.1 (version 1.1), and
Rajpurkar et al., "Know What You Don't Know: Unanswerable Questions for SQuAD", 2018 (version 2.0).
"""

import re
import string
from collections import Counter

import numpy as np

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Lower case without ASCII punctuation and English articles; words are apart by one space."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def word_f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the words of two normalised texts; 0 if they share none."""
    predicted, right = prediction.split(), answer.split()
    common = (Counter(predicted) & Counter(right)).total()
    return 2 * common / (len(predicted) + len(right)) if common else 0.0


def question_scores(predictions: list[str], answers: list[list[str]], version_2: bool) -> np.ndarray:
    """Exact match and F1 of each question: the best over its right answers.

    In version 2 a question without any answer, and one whose answers are all empty after normalisation, counts as
    right for an empty prediction, and an empty prediction is wrong for all others.

    Args:
        predictions: one text for each question; in version 2 an empty one says that there is no answer.
        answers: the right ones of each question.
        version_2: whether questions may have no answer.

    Returns:
        `(questions, 2)`, float64, from 0 to 1.

    Raises:
        ValueError: the numbers differ, or a question has no answer in version 1.
    """
    if len(predictions) != len(answers):
        raise ValueError(
            f"There must be one prediction for each question, but got {len(predictions)} for {len(answers)}."
        )
    scores = np.zeros((len(predictions), 2))
    for row, prediction, right in zip(scores, predictions, answers, strict=True):
        prediction, right = normalize_answer(prediction), [normalize_answer(answer) for answer in right]
        if version_2:
            right = [answer for answer in right if answer]
        elif not right:
            raise ValueError("A question has no answer. This is known in version 2 of SQuAD only.")
        if right:
            row[:] = prediction in right, max(word_f1(prediction, answer) for answer in right)
        else:
            row[:] = not prediction
    return scores


def squad_metrics(predictions: list[str], answers: list[list[str]], version_2: bool = False) -> dict[str, float]:
    """Means over the questions, in percent, under the names of the official evaluation.

    Args:
        predictions, answers, version_2: see `question_scores`.

    Returns:
        Version 1: `exact_match`, `f1`. Version 2: `exact`, `f1`, `total` (the number of questions), and the same with
        the prefixes `HasAns_` and `NoAns_` for the questions with and without an answer, as far as there are any.
    """
    scores = 100 * question_scores(predictions, answers, version_2)
    if not version_2:
        return dict(zip(("exact_match", "f1"), scores.mean(0).tolist(), strict=True))
    answerable = np.array([bool(right) for right in answers])
    metrics = {}
    for prefix, chosen in (("", answerable | True), ("HasAns_", answerable), ("NoAns_", ~answerable)):
        if chosen.any():
            exact, overlap = scores[chosen].mean(0).tolist()
            metrics |= {f"{prefix}exact": exact, f"{prefix}f1": overlap, f"{prefix}total": int(chosen.sum())}
    return metrics


def best_thresholds(predictions: list[str], null_odds: list[float], answers: list[list[str]]) -> dict[str, float]:
    """The best means that any threshold reaches if questions with greater null odds are left unanswered (version 2).

    Args:
        predictions: the best answer to each question that is not empty.
        null_odds: of each question, any number that grows with the probability that it has no answer.
        answers: the right ones of each question; none if it has no answer.

    Returns:
        `best_exact` and `best_f1`, in percent, and the thresholds that reach them, `best_exact_thresh` and
        `best_f1_thresh`: questions up to and including it are answered.
    """
    odds = np.array(null_odds)
    order = np.argsort(odds, kind="stable")
    answerable = np.array([[bool(right)] for right in answers])
    answered = np.array([[bool(prediction)] for prediction in predictions])
    gains = np.where(answerable, question_scores(predictions, answers, version_2=True), -1.0 * answered)
    # Row n: the sums if the n questions with the lowest odds are answered.
    sums = (~answerable).sum() + np.vstack([np.zeros(2), gains[order].cumsum(0)])
    thresholds = np.append(min(0.0, np.nextafter(odds.min(), -np.inf)), odds[order])
    # Among questions of the same odds no threshold tells: only all or none of them can be answered.
    possible = np.append(thresholds[1:] != thresholds[:-1], True)
    sums[~possible] = -np.inf
    metrics = {}
    for name, column in zip(("exact", "f1"), sums.T, strict=True):
        best = int(column.argmax())
        metrics |= {
            f"best_{name}": 100 * float(column[best]) / len(odds),
            f"best_{name}_thresh": float(thresholds[best]),
        }
    return metrics
