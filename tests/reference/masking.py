"""Naive masking and cropping: one loop a sequence, given the random numbers."""


def corrupt(ids, mask_probability, span_ratio, mask_token_id, cls_token_id, draws):
    """(masked ids, crop) of one sequence of token ids.

    draws: numbers in [0, 1): one to round the number of masks, one to place the crop, one a position; the masks are the
    positions after the first with the lowest of these.
    """
    count_draw, start_draw, *scores = draws
    n = len(ids)
    candidates = sorted(range(1, n), key=lambda position: scores[position])
    masked = list(ids)
    for position in candidates[: int(mask_probability * n + count_draw)]:
        masked[position] = mask_token_id
    length = max(int(span_ratio * n), 1)
    start = int(start_draw * (n - length + 1))
    span = list(ids[start : start + length])
    return masked, span if span[0] == cls_token_id else [cls_token_id, *span]
