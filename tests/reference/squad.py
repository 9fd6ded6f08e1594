"""Naive search for answers, and naive thresholds: one loop a token, one a question."""


def search(contexts, windows, start_logits, end_logits, n_best_size, max_answer_length):
    """For each question its best texts with their scores, and its null odds.

    windows: dictionaries with question, cls_position, context_position, starts and ends.
    """
    texts, nulls = [{} for _ in contexts], [[] for _ in contexts]
    for window, start_row, end_row in zip(windows, start_logits, end_logits, strict=True):
        question, cls, position = window["question"], window["cls_position"], window["context_position"]
        nulls[question].append(float(start_row[cls] + end_row[cls]))
        spans = []
        for first, (begin, stop) in enumerate(zip(window["starts"], window["ends"], strict=True)):
            for last in range(first, min(first + max_answer_length, len(window["starts"]))):
                if begin < stop and window["starts"][last] < window["ends"][last]:
                    score = float(start_row[position + first] + end_row[position + last])
                    spans.append((score, contexts[question][begin : window["ends"][last]].strip()))
        for score, text in sorted(spans, reverse=True)[:n_best_size]:
            if text and score > texts[question].get(text, float("-inf")):
                texts[question][text] = score
    answers = [sorted(found.items(), key=lambda item: -item[1])[:n_best_size] for found in texts]
    return answers, [min(null) - best[0][1] for null, best in zip(nulls, answers, strict=True)]


def best_mean(answered, unanswered, odds):
    """The best mean in percent that any threshold reaches, and all thresholds among `odds` that reach it.

    answered, unanswered: the score of each question if it is answered and if not.
    """
    means = {}
    for threshold in [min(odds) - 1, *odds]:
        scores = [yes if odd <= threshold else no for yes, no, odd in zip(answered, unanswered, odds, strict=True)]
        means[threshold] = 100 * sum(scores) / len(scores)
    best = max(means.values())
    return best, [threshold for threshold in means if abs(means[threshold] - best) < 1e-9]
