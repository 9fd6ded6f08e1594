"""Questions with windows of their contexts as inputs of a model, and the answers that its logits point to."""

import numpy as np
from datasets import Dataset

# What a window has beside the model's inputs: the number of its question, the position of [CLS], that of the context's
# first token, and the characters of the context at which each of its tokens starts and ends.
WINDOW_COLUMNS = ["question", "cls_position", "context_position", "starts", "ends"]


def make_windows(
    examples: dict[str, list], rows: list[int], tokenizer, max_length: int, doc_stride: int, training: bool
) -> dict[str, list]:
    """Inputs of the model, one or more for each question, so that every token of its context is in one of them.

    Where answers are known there are `start_positions` and `end_positions`: those of the first and the last token of
    the first answer, or of [CLS] in a window that does not hold it whole.

    Args:
        examples: the columns `context`, `question` and, of the right answers, `texts` and `start` (of the first one, in
            characters of the context).
        rows: the numbers of the questions.
        tokenizer: a fast one that pads and truncates on the right.
        max_length: most tokens of a window with its question.
        doc_stride: tokens that two successive windows share.
        training: leaves out `WINDOW_COLUMNS`.
    """
    windows = tokenizer(
        examples["question"],
        examples["context"],
        truncation="only_second",
        max_length=max_length,
        stride=doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    sources, offsets = windows.pop("overflow_to_sample_mapping"), windows.pop("offset_mapping")
    columns = {name: [] for name in WINDOW_COLUMNS + ["start_positions", "end_positions"] * ("texts" in examples)}
    for i, (source, ids) in enumerate(zip(sources, windows["input_ids"], strict=True)):
        # Of each token: 0 if it is in the question, 1 if it is in the context, None if it is a special one.
        parts = windows.sequence_ids(i)
        cls_position = ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0
        length = parts.count(1)
        position = parts.index(1) if length else 0
        starts, ends = np.array(offsets[i][position : position + length], dtype=np.int32).reshape(-1, 2).T
        values = [rows[source], cls_position, position, starts, ends]
        if "texts" in examples:
            tokens = None
            if texts := examples["texts"][source]:
                is_first = i == 0 or sources[i - 1] != source
                is_last = i == len(sources) - 1 or sources[i + 1] != source
                tokens = answer_tokens(texts[0], examples["start"][source], starts, ends, is_first, is_last)
            values += [cls_position] * 2 if tokens is None else [position + tokens[0], position + tokens[1]]
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return {**windows, **{name: columns[name] for name in columns if not (training and name in WINDOW_COLUMNS)}}


def answer_tokens(
    text: str, start: int, starts: np.ndarray, ends: np.ndarray, is_first: bool, is_last: bool
) -> tuple[int, int] | None:
    """The first and the last token of an answer, counted from the first token of the context in this window.

    Args:
        text: the answer; white space around it does not count.
        start: the character of the context at which it starts.
        starts, ends: `(tokens,)`, the characters at which each token of the context starts and ends, never falling.
        is_first, is_last: whether the context begins and ends in this window: what is in no token there is in none.

    Returns:
        None if the window does not hold the whole answer.
    """
    left, right = start + len(text) - len(text.lstrip()), start + len(text.rstrip())
    first, last = int(np.searchsorted(ends, left, side="right")), int(np.searchsorted(starts, right)) - 1
    if first > last:
        return None
    begins = is_first or first > 0 or starts[0] <= left
    return (first, last) if begins and (is_last or last < len(ends) - 1 or ends[-1] >= right) else None


def best_spans(
    start_logits: np.ndarray, end_logits: np.ndarray, n_best_size: int, max_answer_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The spans of at most `max_answer_length` tokens whose start and end logit have the highest sums.

    Args:
        start_logits, end_logits: `(tokens,)`, float; -inf where no answer may start or end.

    Returns:
        Sum, first and last token of at most `n_best_size` spans, the best first.
    """
    padded = np.pad(end_logits, (0, max_answer_length - 1), constant_values=-np.inf)
    # (tokens, max_answer_length): row i has the spans that start at token i, the shortest first.
    sums = (start_logits[:, None] + np.lib.stride_tricks.sliding_window_view(padded, max_answer_length)).ravel()
    best = np.argpartition(-sums, min(n_best_size, len(sums)) - 1)[:n_best_size]
    best = best[np.isfinite(sums[best])]
    best = best[np.argsort(-sums[best], kind="stable")]
    first, length = np.divmod(best, max_answer_length)
    return sums[best], first, first + length


def find_answers(
    contexts: list[str], windows: Dataset, logits: tuple, n_best_size: int, max_answer_length: int
) -> tuple[list[list[tuple[str, float]]], list[float]]:
    """The best answers to each question, over all windows of its context.

    All spans are compared. (The scripts that came with BERT combine only the `n_best_size` best starts and ends of a
    window, which may leave no span at all.)

    Args:
        contexts: that of each question.
        windows: made by `make_windows` from these questions, in any order.
        logits: start and end logits, `(windows, positions)` each, float, padded on the right.

    Returns:
        For each question at most `n_best_size` different texts with their scores, the best first, and its null odds:
        the score of [CLS] (the lowest of all windows) minus that of the best text. A score is the sum of a start and an
        end logit. The only text is the empty one and the odds are 0 where the tokenizer leaves nothing of a context.

    Raises:
        ValueError: a logit is NaN.
    """
    if np.isnan(logits[0]).any() or np.isnan(logits[1]).any():
        raise ValueError(
            "The model's logits are NaN, which point to no answer. Its training diverged or its weights are damaged."
        )
    scores, nulls = [{} for _ in contexts], [np.inf] * len(contexts)
    windows = windows.select_columns(WINDOW_COLUMNS).with_format("numpy")
    for window, start, end in zip(windows, *logits, strict=True):
        row, cls_position, position, starts, ends = (window[name] for name in WINDOW_COLUMNS)
        nulls[row] = min(nulls[row], float(start[cls_position] + end[cls_position]))
        if not len(starts):
            continue
        # A token of no character, such as the space before a word, neither begins nor ends an answer.
        start, end = (np.where(ends > starts, x[position : position + len(starts)], -np.inf) for x in (start, end))
        for score, first, last in zip(*best_spans(start, end, n_best_size, max_answer_length), strict=True):
            if text := contexts[row][starts[first] : ends[last]].strip():
                scores[row][text] = max(float(score), scores[row].get(text, -np.inf))
    answers = [sorted(texts.items(), key=lambda item: -item[1])[:n_best_size] for texts in scores]
    answers = [texts or [("", null)] for texts, null in zip(answers, nulls, strict=True)]
    return answers, [null - texts[0][1] for texts, null in zip(answers, nulls, strict=True)]
