"""COCO-LM's equations with one loop an index: a head, a query, a token, an anchor at a time, nothing batched.

The equations are those of Meng et al. 2021 and of the authors' code, in the order a reader would write them down.
"""

import math

import torch
from torch.nn import functional as F


def relative_position_bucket(distance, num_buckets, max_distance):
    """Signed bucket of one distance in tokens (authors' code)."""
    one_direction = num_buckets // 2
    exact = one_direction // 2
    if abs(distance) < exact:
        return distance
    share = math.log(abs(distance) / exact) / math.log((max_distance - 1) / exact)
    # One part in a million keeps the rounding of the logarithms out of the ceiling.
    bucket = exact + math.ceil(share * (one_direction - 1 - exact) * (1 - 1e-6))
    return int(math.copysign(min(bucket, one_direction - 1), distance))


def relative_bias(table, length, max_positions, max_distance):
    """(heads, query, key): the bias of each pair, buckets counted from the lowest in the whole position table."""
    num_buckets, heads = table.shape
    lowest = min(
        relative_position_bucket(key - query, num_buckets, max_distance)
        for query in range(max_positions)
        for key in range(max_positions)
    )
    bias = torch.zeros(heads, length, length)
    for head in range(heads):
        for query in range(length):
            for key in range(length):
                bucket = relative_position_bucket(key - query, num_buckets, max_distance) - lowest
                bias[head, query, key] = table[bucket, head]
    return bias


def attend(module, states, bias, num_heads):
    """softmax(q k / sqrt(head size) + bias) v of one text without padding: (length, hidden) -> (length, hidden)."""
    length, hidden_size = states.shape
    size = hidden_size // num_heads
    projected = states @ module.in_proj.weight.T + module.in_proj.bias
    q, k, v = projected[:, :hidden_size], projected[:, hidden_size : 2 * hidden_size], projected[:, 2 * hidden_size :]
    rows = []
    for query in range(length):
        heads = []
        for head in range(num_heads):
            part = slice(head * size, (head + 1) * size)
            scores = [q[query, part] @ k[key, part] / math.sqrt(size) + bias[head, query, key] for key in range(length)]
            weights = torch.stack(scores).exp()
            weights = weights / weights.sum()
            heads.append(sum(weights[key] * v[key, part] for key in range(length)))
        rows.append(torch.cat(heads) @ module.out_proj.weight.T + module.out_proj.bias)
    return torch.stack(rows)


def encode(model, ids):
    """Last hidden state of one text without padding, dropout off: list of ids -> (length, hidden)."""
    embeddings = model.embeddings
    states = torch.stack(
        [embeddings.word_embeddings.weight[t] + embeddings.position_embeddings.weight[i] for i, t in enumerate(ids)]
    )
    states = norm(states, embeddings.LayerNorm)
    config = model.config
    table = model.relative_attention_bias.weight
    bias = relative_bias(table, len(ids), config.max_position_embeddings, config.max_rel_pos)
    for layer in model.encoder.layer:
        attended = attend(layer.attention.self_attn, states, bias, config.num_attention_heads)
        states = norm(states + attended, layer.attention.LayerNorm)
        inner = states @ layer.intermediate.dense.weight.T + layer.intermediate.dense.bias
        # The exact GELU: x times the normal distribution function of x.
        inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
        states = norm(states + inner @ layer.output.dense.weight.T + layer.output.dense.bias, layer.output.LayerNorm)
    return states


def norm(states, layer_norm):
    return F.layer_norm(states, states.shape[-1:], layer_norm.weight, layer_norm.bias, layer_norm.eps)


def masked_lm_loss(logits, labels):
    losses = [-math.log(row.exp()[label] / row.exp().sum()) for row, label in zip(logits, labels, strict=True)]
    return sum(losses) / len(losses)


def copy_loss(copy_logits, is_original):
    total = 0.0
    for logit, original in zip(copy_logits.tolist(), is_original.tolist(), strict=True):
        p_copy = 1 / (1 + math.exp(-logit))
        total -= math.log(p_copy) if original else math.log(1 - p_copy)
    return total / len(copy_logits)


def corrective_lm_loss(logits, copy_logits, labels, sampled, form):
    total = 0.0
    for row, copy_logit, label, sample in zip(logits, copy_logits, labels, sampled, strict=True):
        p_copy = 1 / (1 + math.exp(-copy_logit.item()))  # a plain number: no gradient
        p_lm = row.exp()[label] / row.exp().sum()
        if form == "released":
            total = total - (1 - p_copy) * p_lm.log()
        else:
            total = total - ((p_copy if sample == label else 0.0) + (1 - p_copy) * p_lm).log()
    return total / len(labels)


def contrastive_loss(embeddings, span_embeddings, temperature):
    views = [*embeddings, *span_embeddings]
    texts = len(embeddings)

    def similarity(a, b):
        return math.exp((views[a] @ views[b] / (views[a].norm() * views[b].norm())).item() / temperature)

    total = 0.0
    for anchor in range(2 * texts):
        positive = anchor + texts if anchor < texts else anchor - texts
        others = sum(similarity(anchor, other) for other in range(2 * texts) if other != anchor)
        total -= math.log(similarity(anchor, positive) / others)
    return total / (2 * texts)


def pretraining_losses(model, batch):
    """The four losses, a pass for each network and view and all logits at once: `corrupted_input_ids`, no dropout."""
    is_token = batch["attention_mask"].bool()
    is_masked = is_token & (batch["input_ids"] != batch["labels"])
    originals, corrupted = batch["labels"][is_masked], batch["corrupted_input_ids"]
    states = model.auxiliary(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    mlm_loss = F.cross_entropy(model.auxiliary_lm_head(states[is_masked]), originals)
    states = model.cocolm(corrupted, attention_mask=batch["attention_mask"]).last_hidden_state
    spans = model.cocolm(batch["span_input_ids"], attention_mask=batch["span_attention_mask"]).last_hidden_state
    copy_logits = model.copy_head(states).squeeze(-1)
    is_original = (corrupted == batch["labels"]).float()
    detection_loss = F.binary_cross_entropy_with_logits(copy_logits[is_token], is_original[is_token])
    logits = model.corrective_lm_head(model.corrective_lm_projection(states[is_masked]))
    correction_loss = corrective_lm_loss(logits, copy_logits[is_masked], originals, corrupted[is_masked], "released")
    views = F.normalize(model.contrastive_head(torch.cat([states[:, 0], spans[:, 0]])), dim=-1)
    scores = (views @ views.T).masked_fill(torch.eye(len(views)).bool(), -math.inf)
    sequence_loss = F.cross_entropy(scores, torch.arange(len(views)).roll(len(states)))
    return mlm_loss, detection_loss, correction_loss, sequence_loss
