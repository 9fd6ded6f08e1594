"""Naive masking and cropping: one loop a sequence, given the random numbers."""


def corrupt(ids, mask_probability, span_ratio, mask_token_id, cls_token_id, draws, words=None):
    """(masked ids, crop) of one sequence of token ids.

    draws: numbers in [0, 1): one to round the number of masks, one to place the crop, one a word; the masks are the
        words with the lowest of these, which the positions 0, 1, ... have (the first, position 0, has none in use).
    words: the words after the first token, each a list of positions; None: each position is one.
    """
    count_draw, start_draw, _, *scores = draws
    n = len(ids)
    if words is None:
        words = [[position] for position in range(1, n)]
    candidates = sorted(range(len(words)), key=lambda number: scores[number])
    masked = list(ids)
    for number in candidates[: int(mask_probability * n * (len(words) / max(n - 1, 1)) + count_draw)]:
        for position in words[number]:
            masked[position] = mask_token_id
    length = max(int(span_ratio * n), 1)
    start = int(start_draw * (n - length + 1))
    span = list(ids[start : start + length])
    return masked, span if span[0] == cls_token_id else [cls_token_id, *span]


def words(tokens, begins, whole=(), ends=()):
    """The words of a list of tokens, but the first, each a list of positions.

    begins: function of a token, whether it begins a word.
    whole: the tokens that are a word by themselves.
    ends: suffixes of the tokens that end a word.
    """
    groups = []
    for position in range(1, len(tokens)):
        token, before = tokens[position], tokens[position - 1]
        first = position == 1 or token in whole or before in whole or before.endswith(tuple(ends)) or begins(token)
        if first:
            groups.append([])
        groups[-1].append(position)
    return groups
