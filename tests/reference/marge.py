"""MARGE with one loop an index: a target, a document, a head, a query at a time, nothing batched, nothing padded.

The equations are those of Lewis et al. 2020, section 2, in the order a reader would write them down.
"""

import math

import torch
from torch.nn import functional as F


def norm(x, layer_norm):
    return F.layer_norm(x, x.shape[-1:], layer_norm.weight, layer_norm.bias, layer_norm.eps)


def attend(module, queries, keys, bias=None, causal=False):
    """softmax(q k / sqrt(head_dim) + bias of the key) v: (n, hidden) on (m, hidden) -> (n, hidden)."""
    q, k, v = module.q_proj(queries), module.k_proj(keys), module.v_proj(keys)
    size = module.head_dim
    rows = []
    for i in range(len(q)):
        heads = []
        for h in range(module.num_heads):
            part = slice(h * size, (h + 1) * size)
            visible = range(i + 1) if causal else range(len(k))
            scores = torch.stack(
                [q[i, part] @ k[j, part] / math.sqrt(size) + (bias[j] if bias else 0) for j in visible]
            )
            weights = scores.exp() / scores.exp().sum()
            heads.append(sum(w * v[j, part] for w, j in zip(weights, visible, strict=True)))
        rows.append(torch.cat(heads))
    return module.out_proj(torch.stack(rows))


def feed_forward(layer, x):
    return layer.mlp.fc2(F.gelu(layer.mlp.fc1(norm(x, layer.mlp_layer_norm))))


def embed_tokens(stack, ids):
    return torch.stack([stack.embed_tokens.weight[t] + stack.embed_positions.weight[i] for i, t in enumerate(ids)])


def layer_states(encoder, ids, number):
    """(length,) ids -> (length, hidden) states after `number` layers of the encoder."""
    x = embed_tokens(encoder, ids)
    for layer in encoder.layers[:number]:
        y = norm(x, layer.self_attn_layer_norm)
        x = x + attend(layer.self_attn, y, y)
        x = x + feed_forward(layer, x)
    return x


def encode(encoder, ids):
    """(length,) ids -> (length, hidden) states and the (hidden,) document embedding g."""
    first = layer_states(encoder, ids, encoder.config.retrieval_layers)[0]
    states = layer_states(encoder, ids, encoder.config.encoder_layers)
    return norm(states, encoder.final_layer_norm), first / first.norm()


def decode(decoder, ids, documents, relevance):
    """(length,) ids, a list of (length, hidden) documents and one f(x, z) for each -> (length, hidden) states."""
    x = embed_tokens(decoder, ids)
    for layer in decoder.layers:
        y = norm(x, layer.self_attn_layer_norm)
        x = x + attend(layer.self_attn, y, y, causal=True)
        if layer.cross_attn is not None:
            beta = layer.cross_attn.relevance_weight[0]
            bias = [beta * f for f, document in zip(relevance, documents, strict=True) for _ in document]
            y = norm(x, layer.cross_attn_layer_norm)
            x = x + attend(layer.cross_attn, y, torch.cat(documents), bias=bias)
        x = x + feed_forward(layer, x)
    return norm(x, decoder.final_layer_norm)


def reconstruct(model, evidence, target):
    """Log-probabilities (length, vocab), summed loss and relevance of one target given lists of unpadded ids."""
    documents, gz = zip(*[encode(model.model.encoder, z) for z in evidence], strict=True)
    _, gx = encode(model.model.encoder, target)
    relevance = [sum(a * b for a, b in zip(gx, g, strict=True)) for g in gz]
    decoder_input = [model.config.decoder_start_token_id, *target[:-1]]
    states = decode(model.model.decoder, decoder_input, list(documents), relevance)
    scores = states @ model.model.shared.weight.T
    log_probs = scores - scores.exp().sum(-1, keepdim=True).log()
    return log_probs, -sum(log_probs[i, t] for i, t in enumerate(target)), torch.stack(relevance)


def separate_passes(model, input_ids, attention_mask, labels, **inputs):
    """The whole model, but evidence `(groups, num_evidence, length)` and targets through the encoder one by one."""
    encoded = model.get_encoder()(input_ids, attention_mask)
    return model(input_ids, attention_mask=attention_mask, labels=labels, encoder_outputs=encoded, **inputs)


def classify(model, ids):
    """(length,) ids, in the encoder and, not shifted, in the decoder -> (num_labels,) scores of its last state."""
    document, _ = encode(model.model.encoder, ids)
    return model.classifier(decode(model.model.decoder, ids, [document], [1.0])[-1])


def distillation(evidence_logits, relevance, evidence_mask, num_tokens):
    """Token-weighted mean of KL(softmax(evidence_logits) || softmax(relevance)) over the visible documents."""
    total = 0.0
    for logits, f, visible, n in zip(evidence_logits, relevance, evidence_mask, num_tokens, strict=True):
        seen = [j for j in range(len(f)) if visible[j]]
        teacher = [math.exp(logits[j]) / sum(math.exp(logits[i]) for i in seen) for j in seen]
        student = [math.exp(f[j]) / sum(math.exp(f[i]) for i in seen) for j in seen]
        total += n * sum(t * math.log(t / s) for t, s in zip(teacher, student, strict=True))
    return total / sum(num_tokens)


def contrastive(relevance, evidence, targets, groups, evidence_mask, num_tokens, temperature):
    """-log(own / all) in exp(f / temperature), over what belongs to a text and texts of other groups, both ways.

    `relevance[i][g][j]` is f of target i and document j of group g; `evidence[g][j]` and `targets[i]` are lists of ids,
    an empty list no document; `groups[i]` is the group of target i and `evidence_mask[i]` for the documents there. The
    mean over targets and the mean over evidence are weighted by tokens; the result is the mean of both.
    """
    places = [(g, j) for g, texts in enumerate(evidence) for j, text in enumerate(texts) if text]

    def belong(i, g, j):
        return bool(targets[i]) and groups[i] == g and evidence_mask[i][j]

    def is_negative(i, g, j):
        known = [
            evidence[h][k]
            for m in range(len(targets))
            if targets[m] == targets[i]
            for h, k in places
            if belong(m, h, k)
        ]
        return bool(targets[i]) and groups[i] != g and evidence[g][j] not in [targets[i], *known]

    def loss(pairs):
        scores = {pair: math.exp(relevance[pair[0]][pair[1]][pair[2]] / temperature) for pair in pairs}
        own = sum(score for pair, score in scores.items() if belong(*pair))
        return math.log(1 + sum(score for pair, score in scores.items() if is_negative(*pair)) / own) if own else 0.0

    to_evidence = [n * loss([(i, *place) for place in places]) for i, n in enumerate(num_tokens)]
    to_targets = [len(evidence[g][j]) * loss([(i, g, j) for i in range(len(targets))]) for g, j in places]
    lengths = [len(evidence[g][j]) for g, j in places]
    return (sum(to_evidence) / sum(num_tokens) + sum(to_targets) / sum(lengths)) / 2
