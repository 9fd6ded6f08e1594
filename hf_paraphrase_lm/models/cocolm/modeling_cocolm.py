"""COCO-LM model.

Meng et al., "COCO-LM: Correcting and Contrasting Text Sequences for Language Model Pretraining", 2021 (arXiv
2102.08473). An auxiliary network fills the masks of a text; the main network tells which tokens were replaced (copy
loss), restores the original ones (corrective language model) and brings the two views of a text together (contrastive
loss). "Authors' code" is what they published at github.com/microsoft/COCO-LM: the encoders in two forms and, in its
issue 2, the pre-training losses.

Modules of the encoder have the names of the released checkpoints.
"""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from .configuration_cocolm import CocoLMConfig

# Tokens whose logits are held at a time (our choice): on a CPU as many as fit into its cache.
TOKENS_PER_CHUNK, TOKENS_PER_CPU_CHUNK = 2048, 256
# Attention pads a text to at most its length divided by this (our choice).
LEAST_FILLED = 0.5
# Share of the texts that is enough to leave a batch of one length without padding (our choice).
LEAST_FULL = 0.25

logger = logging.get_logger(__name__)

# Added to the scores of padding: softmax makes it an exact zero, and unlike the minimum of float32 it stays finite
# when autocast turns it into float16 or bfloat16, so a row of nothing but padding gives no NaN. Half of the minimum of
# float16, so that the sum with a negative score is finite too.
PADDING_SCORE = torch.finfo(torch.float16).min / 2

# Pattern of the weights of CocoLMForPretraining besides the encoder.
PRETRAINING_ONLY = r"^(auxiliary(_lm_head)?|copy_head|corrective_lm_(head|projection)|contrastive_head)\."


def relative_position_bucket(distance: torch.Tensor, num_buckets: int, max_distance: int) -> torch.Tensor:
    r"""Signed bucket of the distance between two tokens (authors' code; not T5's buckets).

    With b = num_buckets // 2 and e = b // 2, distances below e have a bucket each and the others share
    ceil(log(|d| / e) / log((max_distance - 1) / e) * (b - 1 - e)) + e, at most b - 1; the sign is kept.

    Args:
        distance: Key position minus query position, in tokens, int64 of any shape.
        num_buckets: Buckets for both directions together.
        max_distance: Distance from which all pairs share the outermost bucket.

    Returns:
        Buckets from -(b - 1) to b - 1, int64 in the shape of `distance`.
    """
    num_buckets //= 2
    num_exact = num_buckets // 2
    magnitude = distance.abs()
    scale = math.log((max_distance - 1) / num_exact)
    # The logarithm of distance 0 is computed but not used, so it only has to be finite.
    logarithm = torch.log(magnitude.clamp(min=1).float() / num_exact)
    bucket = num_exact + torch.ceil(logarithm / scale * (num_buckets - 1 - num_exact)).long()
    return torch.where(magnitude < num_exact, magnitude, bucket.clamp(max=num_buckets - 1)) * distance.sign()


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None, **kwargs
) -> torch.Tensor:
    r"""Cross entropy in float32: the sum over the labels that are not -100, divided by their number.

    Args:
        logits: `(n, classes)`, any float.
        labels: `(n,)`, int64; -100 where there is nothing to predict. If all are -100 the loss is 0.
        num_items_in_batch: Divides instead of the number of labels, to normalise over more than this batch.
        kwargs: Not read.

    Returns:
        Scalar, float32, in nats.
    """
    if num_items_in_batch is None:
        num_items_in_batch = (labels != -100).sum().clamp(min=1)
    return F.cross_entropy(logits.float(), labels, reduction="sum") / num_items_in_batch


def copy_loss(
    copy_logits: torch.Tensor, is_original: torch.Tensor, num_tokens: torch.Tensor | int | None = None
) -> torch.Tensor:
    r"""Binary cross entropy of telling original tokens from replaced ones.

        L_copy = -mean_i( y_i log p_copy_i + (1 - y_i) log(1 - p_copy_i) ),   p_copy_i = sigmoid(copy_logits_i)

    Args:
        copy_logits: `(n,)`, any float: the tokens of the batch that are not padding, [CLS] and [SEP] included.
        is_original: `(n,)`, bool. A sampled token that happens to equal the original one is original.
        num_tokens: Divides instead of n, to normalise over more than this batch.

    Returns:
        Scalar, float32, in nats; 0 if n is 0.
    """
    if num_tokens is None:
        num_tokens = max(copy_logits.shape[0], 1)
    loss = F.binary_cross_entropy_with_logits(copy_logits.float(), is_original.float(), reduction="sum")
    return loss / num_tokens


def filling(rows: int) -> int:
    """How many rows to add to a matrix, at most a sixteenth, so that there are 16 sizes between one and its double.

    Our choice: a CPU compiles kernels for every size that it multiplies, and keeps them, which costs time and memory.
    """
    return -rows % (1 << max(rows.bit_length() - 5, 0))


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call is nothing but that of its class: no adapter, no hook, no offloading."""
    hooks = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return type(module) is kind and "forward" not in vars(module) and not any(getattr(module, name) for name in hooks)


def sum_of_losses(
    lm_head: nn.Module,
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    loss_of: Callable[[torch.Tensor, slice], torch.Tensor] | None = None,
    draws: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    r"""Sum over the tokens of -log p_i[x_i] or of what becomes of it, with p_i = softmax(lm_head(h_i)).

    Chunk by chunk: the logits of all tokens never exist at once.

    Args:
        lm_head: Maps `(n, hidden_size)` to `(n, vocab_size)`. Unless it is a plain linear layer or [`CocoLMLMHead`],
            without adapters and hooks, and where it is compiled, logits are computed once more in the backward pass.
        hidden_states: `(n, hidden_size)`, any float.
        labels: `(n,)`, int64, the tokens x_i.
        loss_of: Gives a loss, scalar, for the -log p_i[x_i] of a chunk, float32, and its place among all tokens.
        draws: Whether to draw a token of each distribution.

    Returns:
        The sum, scalar, float32, in nats, and the tokens drawn, `(n,)`, int64, or `None`.
    """
    if loss_of is None:
        loss_of = _sum
    device = hidden_states.device.type
    size = TOKENS_PER_CPU_CHUNK if device == "cpu" else TOKENS_PER_CHUNK
    decoder = lm_head.decoder if is_plain(lm_head, CocoLMLMHead) else lm_head
    if is_plain(decoder, nn.Linear) and not torch.compiler.is_compiling():
        hidden_states = F.pad(hidden_states, (0, 0, 0, filling(len(labels))))
        if decoder is not lm_head:
            hidden_states = lm_head.transform(hidden_states)
        tensors, dtype = (hidden_states, decoder.weight, decoder.bias, labels), product_dtype(hidden_states)
        if torch.is_grad_enabled():
            return _SumOfLosses.apply(*tensors, loss_of, size, dtype, draws)
        return _linear_losses(*tensors, loss_of, size, dtype, draws, is_trained=False)[:2]

    autocast = {"dtype": torch.get_autocast_dtype(device), "enabled": torch.is_autocast_enabled(device)}

    def chunk_losses(hidden_states, labels):
        # Without its cache, each chunk casts the weights for itself, and their gradients add up in float32.
        with torch.autocast(device, **autocast, cache_enabled=False):
            logits = lm_head(hidden_states)
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        return losses, _draw(F.softmax(logits.detach(), dim=-1, dtype=torch.float32)) if draws else None

    chunks = zip(hidden_states.split(size), labels.split(size), strict=True)
    found = [checkpoint(chunk_losses, *chunk, use_reentrant=False, preserve_rng_state=draws) for chunk in chunks]
    losses, drawn = zip(*found, strict=True)
    return loss_of(torch.cat(losses), slice(None)), torch.cat(drawn) if draws else None


def _sum(losses: torch.Tensor, rows: slice) -> torch.Tensor:
    return losses.sum()


class _SumOfLosses(torch.autograd.Function):
    """`sum_of_losses` of a linear layer. Gradients are computed along with it, so that logits are computed once."""

    @staticmethod
    def forward(ctx, states, weight, bias, labels, loss_of, size, dtype, draws):
        ctx.save_for_backward(states, weight, bias, labels)
        ctx.settings, is_trained = (loss_of, size, dtype), any(ctx.needs_input_grad)
        tensors = states, weight, bias, labels
        loss, drawn, ctx.gradients = _linear_losses(*tensors, *ctx.settings, draws, is_trained)
        if draws:
            ctx.mark_non_differentiable(drawn)
        return loss, drawn

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, _):
        # They are given away, as large as they are, and computed again for another pass through a retained graph.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            gradients = _linear_losses(*ctx.saved_tensors, *ctx.settings, draws=False, is_trained=True)[2]
        pairs = zip(gradients, ctx.saved_tensors, strict=False)
        return *(part.mul_(gradient).to(tensor.dtype) for part, tensor in pairs), *[None] * 5


def _linear_losses(states, weight, bias, labels, loss_of, size, dtype, draws, is_trained):
    """The sum of the losses, what is drawn, and the gradients for states, weight and bias.

    Products are of type `dtype`. Losses and the gradients of weight and bias add up in float32.

    Args:
        states, weight, bias: `(rows, hidden)`, `(vocab, hidden)`, `(vocab,)`.
        labels: `(tokens,)`: of the first rows; what else there is has no loss.
    """
    states, weight, bias = (tensor.to(dtype) for tensor in (states, weight, bias))
    of_states, of_weight, of_bias = torch.empty_like(states) if is_trained else None, None, 0.0
    loss, drawn = torch.zeros((), dtype=torch.float32, device=states.device), []
    filled = F.pad(labels, (0, len(states) - len(labels)))[:, None]
    for first in range(0, max(len(states), 1), size):
        rows = slice(first, first + size)
        part, chosen = states[rows], filled[rows]
        # In place, because there is no larger tensor.
        scores = F.linear(part, weight, bias).float()
        highest, own = scores.amax(dim=-1, keepdim=True), scores.gather(1, chosen)
        total = scores.sub_(highest).exp_().sum(dim=-1, keepdim=True)
        own = (highest + total.log() - own).squeeze(1)[: max(len(labels) - first, 0)]
        with torch.set_grad_enabled(is_trained):
            own.requires_grad_(is_trained)
            change = loss_of(own, rows)
        loss += change.detach()
        if draws or is_trained:
            scores.div_(total)
        if draws:
            drawn.append(_draw(scores))
        if is_trained:
            # Of the softmax: the probabilities, less 1 at the label.
            (share,) = torch.autograd.grad(change, own)
            share = F.pad(share, (0, len(part) - len(share)))
            change = scores.scatter_add_(1, chosen, scores.new_full(chosen.shape, -1.0)).mul_(share[:, None])
            of_bias = of_bias + change.sum(0)
            change = change.to(dtype)
            torch.mm(change, weight, out=of_states[rows])
            product = change.T @ part
            of_weight = product.float() if of_weight is None else of_weight.add_(product)
    drawn = torch.cat(drawn)[: len(labels)] if draws else None
    return loss, drawn, (of_states, of_weight, of_bias) if is_trained else None


def corrective_lm_loss(
    negative_log_likelihood: torch.Tensor,
    copy_logits: torch.Tensor,
    labels: torch.Tensor,
    sampled: torch.Tensor,
    form: str,
    num_masked: torch.Tensor | int | None = None,
) -> torch.Tensor:
    r"""Loss of restoring the original token x_i at the masked positions.

    With p_copy_i = sigmoid(copy_logits_i), p_i the distribution of the language model head and sg for no gradient:

        "released" (authors' code):   mean_i( sg[1 - p_copy_i] * -log p_i[x_i] )
        "paper":   -mean_i( log( 1[x_i = sampled_i] * sg[p_copy_i] + sg[1 - p_copy_i] * p_i[x_i] ) )

    Args:
        negative_log_likelihood: `(masked,)`, float32, -log p_i[x_i]; see [`sum_of_losses`].
        copy_logits: `(masked,)`, any float; no gradient flows into them.
        labels: `(masked,)`, int64, the original tokens.
        sampled: `(masked,)`, int64, the tokens that the main network read; only `"paper"` uses them.
        form: `"released"` or `"paper"`.
        num_masked: Divides instead of the number of rows, to normalise over more than this batch.

    Returns:
        Scalar, float32, in nats; 0 if nothing is masked.
    """
    if num_masked is None:
        num_masked = max(labels.shape[0], 1)
    copy_logits = copy_logits.detach().float()
    if form == "released":
        losses = torch.sigmoid(-copy_logits) * negative_log_likelihood
    else:
        corrected = F.logsigmoid(-copy_logits) - negative_log_likelihood
        copied = torch.logaddexp(F.logsigmoid(copy_logits), corrected)
        losses = -torch.where(sampled == labels, copied, corrected)
    return losses.sum() / num_masked


class _AllGather(torch.autograd.Function):
    """Concatenates the equally long tensors of all ranks; the gradient is summed over the ranks that used them."""

    @staticmethod
    def forward(ctx, tensor):
        gathered = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(gathered, tensor.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(gradient)
        return gradient.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


def contrastive_loss(
    embeddings: torch.Tensor,
    span_embeddings: torch.Tensor,
    is_text: torch.Tensor,
    temperature: float = 1.0,
    all_ranks: bool = False,
    num_anchors: torch.Tensor | int | None = None,
    other_embeddings: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""Sequence contrastive loss: NT-Xent over the two views of every text (Chen et al. 2020, equation 1).

        L_SCL = -mean_a log( exp(cos(a, a+) / T) / sum_{b != a} exp(cos(a, b) / T) )

    a runs over both views of every text, a+ is its other view, b over all views: one positive, 2 texts - 2 negatives.

    Args:
        embeddings: `(texts, size)`, any float: the corrupted texts.
        span_embeddings: `(texts, size)`: the crops of the same texts, in the same order.
        is_text: `(texts,)`, bool. A row that is only padding is no anchor and no negative.
        temperature: Divisor of the cosines.
        all_ranks: Whether b also runs over the texts of all other ranks, with gradient. Every rank must have the same
            number of rows. The mean stays over this rank's anchors, so that the mean over the ranks, which
            data-parallel training takes, is the loss of the whole batch.
        num_anchors: Divides instead of this rank's number of anchors, to normalise over more than this batch.
        other_embeddings: `(2, others, size)`: both views of the texts in the other batches of this update, computed
            beforehand without gradient (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory
            Limited Setup"). The value is still that of this batch's anchors; the gradient is that of all anchors with
            respect to this batch's embeddings, so that the batches' sum is the gradient of the whole update.

    Returns:
        Scalar, float32, in nats; 0 if there is only one text.
    """
    if other_embeddings is not None:
        num_own = len(embeddings)
        if num_anchors is None:
            num_anchors = 2 * is_text.sum().clamp(min=1)
        embeddings = torch.cat([embeddings, other_embeddings[0]])
        span_embeddings = torch.cat([span_embeddings, other_embeddings[1]])
        is_text = F.pad(is_text, (0, other_embeddings.shape[1]), value=True)
    anchors = F.normalize(torch.cat([embeddings, span_embeddings]).float(), dim=-1)
    is_text = is_text.repeat(2)
    candidates, is_candidate, first = anchors, is_text, 0
    if all_ranks:
        candidates = _AllGather.apply(anchors)
        is_candidate = _AllGather.apply(is_text.to(torch.uint8)).bool()
        first = torch.distributed.get_rank() * len(anchors)
    itself = torch.arange(len(anchors), device=anchors.device)
    positive = first + (itself + len(embeddings)) % len(anchors)
    scores = anchors @ candidates.T / temperature
    scores = scores.masked_fill(~is_candidate, PADDING_SCORE)
    scores = scores.scatter(1, (first + itself)[:, None], -torch.inf)
    positive = positive.masked_fill(~is_text, -100)
    loss = cross_entropy(scores, positive, num_anchors)
    if other_embeddings is None:
        return loss
    is_own = itself % len(embeddings) < num_own
    return loss + (cross_entropy(scores[is_own], positive[is_own], num_anchors) - loss).detach()


def _draw(probabilities: torch.Tensor) -> torch.Tensor:
    """One of each row's classes by their probabilities, `(rows,)`, int64, for float32 `(rows, classes)`.

    A row takes one random number. `torch.multinomial` takes one for each class: on a CPU, 9% of the time of an update.
    """
    cumulative = probabilities.cumsum(dim=-1)
    drawn = torch.rand_like(cumulative[:, :1]) * cumulative[:, -1:]
    # The product may be rounded up to the sum.
    return torch.searchsorted(cumulative, drawn, right=True).squeeze(-1).clamp(max=probabilities.shape[-1] - 1)


@dataclass
class Batches:
    """Texts of like length in batches for attention, where all else takes the tokens of all texts: `(rows, size)`.

    Args:
        tokens: Where each token stands in the padded texts, all one after the other, `(rows,)`, int64. Longer texts
            come first. Rows beyond them are copies of the first token, which nothing reads; see `filling`.
        shapes: Rows and length of each batch.
        masks: Of each batch, where it has tokens, `(rows, length)`, bool; `None` for one without padding.
        places: Where each token stands in the rows of all batches, `(rows,)`, int64; the other places are padding.
        num_tokens: Tokens, without those that fill up.
    """

    tokens: torch.Tensor
    shapes: list[tuple[int, int]]
    masks: list[torch.Tensor | None]
    places: torch.Tensor
    num_tokens: int

    @classmethod
    def of(cls, attention_mask: torch.Tensor) -> "Batches | None":
        """Those of texts padded on the right, `(texts, length)`; `None` without padding, or if it is elsewhere.

        A text of padding only keeps its first place.
        """
        width, device = attention_mask.shape[1], attention_mask.device
        is_token = attention_mask.bool()
        is_right = (is_token[:, :-1] >= is_token[:, 1:]).all()[None]
        *lengths, is_right = torch.cat([is_token.sum(1).clamp(min=1), is_right]).tolist()
        if not is_right or sum(lengths) == len(lengths) * width:
            return None
        order = sorted(range(len(lengths)), key=lambda text: -lengths[text])
        lengths = [lengths[text] for text in order]
        shapes = cls._shapes(lengths)
        counts, row_lengths = torch.tensor(lengths), torch.tensor([n for rows, n in shapes for _ in range(rows)])
        in_text = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        tokens = in_text + (width * torch.tensor(order)).repeat_interleave(counts)
        places = in_text + (row_lengths.cumsum(0) - row_lengths).repeat_interleave(counts)
        masks = []
        for part, (_, length) in zip(counts.split([rows for rows, _ in shapes]), shapes, strict=True):
            is_full = part.min() == length
            masks.append(None if is_full else (torch.arange(length) < part[:, None]).to(device))
        tokens, places = (F.pad(x, (0, filling(len(x))), value=int(x[0])).to(device) for x in (tokens, places))
        return cls(tokens, shapes, masks, places, len(in_text))

    @staticmethod
    def _shapes(lengths: list[int]) -> list[tuple[int, int]]:
        """Rows and length of the batches of texts from the longest to the shortest."""
        shapes, is_full = [], True
        for length in lengths:
            rows, longest = shapes[-1] if shapes else (0, 0)
            # Many texts of one length keep a batch, and so an attention bias, without padding.
            is_apart = is_full and length < longest and rows >= LEAST_FULL * len(lengths)
            if length < LEAST_FILLED * longest or is_apart or not shapes:
                shapes.append((1, length))
                is_full = True
            else:
                shapes[-1] = rows + 1, longest
                is_full = is_full and length == longest
        return shapes

    def take(self, padded: torch.Tensor) -> torch.Tensor:
        """`(texts, length, size)` -> `(rows, size)`."""
        return padded.flatten(0, 1).index_select(0, self.tokens)

    def put(self, states: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The reverse of `take`, to `(texts, length)`; 0 where padded."""
        padded = states.new_zeros(shape.numel(), states.shape[-1])
        return self._copy(states, self.tokens, padded).unflatten(0, shape)

    def split(self, states: torch.Tensor) -> list[torch.Tensor]:
        """`(rows, size)` -> of each batch `(rows, length, size)`, 0 where padded."""
        sizes = [rows * length for rows, length in self.shapes]
        padded = self._copy(states, self.places, states.new_zeros(sum(sizes), states.shape[-1]))
        return [part.unflatten(0, shape) for part, shape in zip(padded.split(sizes), self.shapes, strict=True)]

    def join(self, batches: list[torch.Tensor]) -> torch.Tensor:
        """The reverse of `split`."""
        states = torch.cat([batch.flatten(0, 1) for batch in batches])
        return states.index_select(0, self.places.to(states.device))

    def _copy(self, states: torch.Tensor, places: torch.Tensor, padded: torch.Tensor) -> torch.Tensor:
        # Layers may be on other devices than the mask.
        return padded.index_copy_(0, places[: self.num_tokens].to(states.device), states[: self.num_tokens])


def product_dtype(states: torch.Tensor) -> torch.dtype:
    """The type of a matrix product with `states`: that of autocast, or their own."""
    device = states.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return states.dtype


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""softmax(scaling * Q K^T + mask + bias) V; query, key and value are `(batch, heads, length, head size)`."""
    scores = query * scaling @ key.transpose(2, 3)
    for bias in (attention_mask, position_bias):
        scores = scores if bias is None else scores + bias
    # Computes in float32 whatever the type of the scores, to which they are rounded.
    weights = F.softmax(scores, dim=-1).to(query.dtype)
    output = F.dropout(weights, p=dropout, training=module.training) @ value
    return output.transpose(1, 2).contiguous(), weights


class CocoLMSelfAttention(nn.Module):
    """Multi-head attention with one projection for query, key and value, biased by position."""

    def __init__(self, config: CocoLMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.in_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,  # (batch, length, hidden_size), or with `batches` (rows, hidden_size)
        *attention_biases: torch.Tensor | None,  # with `batches` one of each
        batches: Batches | None = None,
        **kwargs,
    ):
        projected = self.in_proj(hidden_states)
        if batches is None:
            output, weights = self.attend(projected, *attention_biases, **kwargs)
        else:
            parts = zip(batches.split(projected), attention_biases, strict=True)
            output, weights = batches.join([self.attend(*part, **kwargs)[0] for part in parts]), None
        return self.out_proj(output), weights

    def attend(self, projected: torch.Tensor, attention_bias: torch.Tensor | None, **kwargs):
        """Attention on `(batch, length, 3 * hidden_size)`; its output `(batch, length, hidden_size)`, and weights."""
        batch_size, length, _ = projected.shape
        query, key, value = projected.view(batch_size, length, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        # The other implementations return no weights, so a call that asks for them gets the eager one.
        implementation = "eager" if kwargs.get("output_attentions") else self.config._attn_implementation
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        # Padding is part of the bias, so there is no mask besides.
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            None,
            position_bias=attention_bias,
            scaling=self.scaling,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
            **kwargs,
        )
        return output.flatten(2), weights


class CocoLMAttention(nn.Module):
    def __init__(self, config: CocoLMConfig, layer_idx: int):
        super().__init__()
        self.self_attn = CocoLMSelfAttention(config, layer_idx)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor, *attention_biases: torch.Tensor | None, **kwargs) -> torch.Tensor:
        attention_output, _ = self.self_attn(hidden_states, *attention_biases, **kwargs)
        return self.LayerNorm(hidden_states + self.dropout(attention_output))


class CocoLMIntermediate(nn.Module):
    def __init__(self, config: CocoLMConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.activation(self.dense(hidden_states))


class CocoLMOutput(nn.Module):
    def __init__(self, config: CocoLMConfig):
        super().__init__()
        self.dense = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(residual + self.dropout(self.dense(hidden_states)))


class CocoLMLayer(GradientCheckpointingLayer):
    def __init__(self, config: CocoLMConfig, layer_idx: int):
        super().__init__()
        self.attention = CocoLMAttention(config, layer_idx)
        self.intermediate = CocoLMIntermediate(config)
        self.output = CocoLMOutput(config)

    # Biases stand alone, because reentrant gradient checkpointing passes no gradient to the tensors of a list.
    def forward(self, hidden_states: torch.Tensor, *attention_biases: torch.Tensor | None, **kwargs) -> torch.Tensor:
        hidden_states = self.attention(hidden_states, *attention_biases, **kwargs)
        return self.output(self.intermediate(hidden_states), hidden_states)


class CocoLMEncoder(nn.Module):
    def __init__(self, config: CocoLMConfig):
        super().__init__()
        self.layer = nn.ModuleList(CocoLMLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers))

    def forward(self, hidden_states: torch.Tensor, *attention_biases: torch.Tensor | None, **kwargs) -> torch.Tensor:
        for layer in self.layer:
            hidden_states = layer(hidden_states, *attention_biases, **kwargs)
        return hidden_states


class CocoLMEmbeddings(nn.Module):
    """LayerNorm(word + position), then dropout; padding becomes zero."""

    def __init__(self, config: CocoLMConfig):
        super().__init__()
        # No padding_idx: padding is zeroed below, so its row gets no gradient from here anyway.
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of input_ids and inputs_embeds must be given, but got both or neither.")
        shape = input_ids.shape if input_ids is not None else inputs_embeds.shape[:-1]
        if len(shape) != 2:
            raise ValueError(f"The input must have the dimensions batch and length, but its shape is {tuple(shape)}.")
        _check_length("The input", shape[1], self.position_embeddings.num_embeddings)
        if attention_mask is not None:
            _check_shape("attention_mask", attention_mask, shape)
        if inputs_embeds is None:
            _check_token_ids(input_ids, self.word_embeddings.weight.shape[0])
            inputs_embeds = self.word_embeddings(input_ids)
        embeddings = self.LayerNorm(inputs_embeds + self.position_embeddings.weight[: shape[1]])
        embeddings = self.dropout(embeddings)
        if attention_mask is not None:
            embeddings = embeddings * attention_mask[:, :, None].to(embeddings.dtype)
        return embeddings


def _check_token_ids(input_ids: torch.Tensor, vocab_size: int, name: str = "input_ids"):
    """Names a token outside the vocabulary. Only on the CPU: elsewhere the check would wait for the device."""
    if input_ids.device.type != "cpu" or torch.compiler.is_compiling() or input_ids.numel() == 0:
        return
    lowest, highest = (int(value) for value in input_ids.aminmax())
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"{name} must be between 0 and {vocab_size - 1}, but got {lowest if lowest < 0 else highest}. The "
            "tokenizer has another vocabulary than the model; if you added tokens, call resize_token_embeddings."
        )


def _check_length(name: str, length: int, num_positions: int | float):
    if length > num_positions:
        raise ValueError(
            f"{name} must have at most {num_positions} tokens, for which there are position embeddings, but has "
            f"{length}. Truncate it when you tokenize."
        )


def _check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]):
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have the shape {tuple(shape)}, but got {tuple(tensor.shape)}.")


def _labels_loss(logits: torch.Tensor, labels: torch.Tensor, **kwargs) -> torch.Tensor:
    """Cross entropy of a head, `(..., classes)`, with labels `(...)`."""
    _check_shape("labels", labels, logits.shape[:-1])
    return cross_entropy(logits.flatten(0, -2), labels.flatten(), **kwargs)


class CocoLMPreTrainedModel(PreTrainedModel):
    """Weight initialisation and loading, for all COCO-LM models; weights start from N(0, initializer_range)."""

    config: CocoLMConfig
    config_class = CocoLMConfig
    base_model_prefix = "cocolm"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CocoLMLayer"]
    _input_embed_layer = "word_embeddings"
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_record_outputs = {"hidden_states": CocoLMLayer, "attentions": CocoLMSelfAttention}
    # Buffer that encoders of transformers 4 wrote into their checkpoints, and what is left behind after pre-training.
    _keys_to_ignore_on_load_unexpected = [r"embeddings\.position_ids$", PRETRAINING_ONLY]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs,
    ):
        r"""Loads a checkpoint as `PreTrainedModel.from_pretrained` does, but refuses one that does not fit the model.

        The encoder must be complete, and so must a head or auxiliary network that the checkpoint has. Those that it
        does not have at all are initialised, which one line of the log says. Only weights are read, even with
        `weights_only=False`: no code in a checkpoint runs.

        Args:
            pretrained_model_name_or_path, model_args, kwargs: See `PreTrainedModel.from_pretrained`.
            output_loading_info: Whether to return also which weights were missing, unexpected or of another shape.
            ignore_mismatched_sizes: Whether weights of another shape are initialised, and not refused.

        Raises:
            RuntimeError: If a file of weights cannot be read; or if a weight is missing, not part of the model, of
                another shape, NaN or infinite.
        """
        try:
            model, loading = super().from_pretrained(
                pretrained_model_name_or_path,
                *model_args,
                output_loading_info=True,
                # Refused below instead, with their names and shapes.
                ignore_mismatched_sizes=True,
                **kwargs | {"weights_only": True},
            )
        # Raised again, whatever it is, unless a file of weights turns out to be its cause.
        except Exception as error:
            if pretrained_model_name_or_path is not None:
                folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
                _check_files(_weight_files(folder, kwargs.get("variant")), error)
            raise
        mismatched = {name: shapes for name, *shapes in loading["mismatched_keys"]}
        source = pretrained_model_name_or_path or "the state dict"
        _check_weights(model, loading, {} if ignore_mismatched_sizes else mismatched, source)
        if fresh := {name.split(".")[0] for name in loading["missing_keys"]} | mismatched.keys():
            logger.warning(
                f"{cls.__name__} from {source}: initialised anew, because the checkpoint does not have them in this "
                f"form: {', '.join(sorted(fresh))}. Train them before use."
            )
        return (model, loading) if output_loading_info else model


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The files of weights that loading reads: the first kind that the folder has."""
    variant = f".{variant}" if variant else ""
    for name, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        if (file := folder / f"{name}{variant}.{suffix}").is_file():
            return [file]
        if (index := folder / f"{name}.{suffix}.index{variant}.json").is_file():
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return [folder / shard for shard in sorted(shards) if (folder / shard).is_file()]
    return []


def _check_files(files: list[Path], error: Exception):
    """Names the file of weights that cannot be read, if that is why loading ended with `error`."""
    for file in files:
        try:
            if file.suffix == ".safetensors":
                safe_open(file, "pt")
            elif not any(map(torch.is_tensor, torch.load(file, "meta", weights_only=True).values())):
                raise TypeError("no tensors")
        # A damaged file ends in any error.
        except Exception:
            raise RuntimeError(
                f"{file} ({file.stat().st_size} bytes) cannot be read as weights. It may be cut off: compare its size "
                "and copy it again, as a whole. Or it holds more than tensors by their names, which could run code and "
                "is not loaded: convert_microsoft_cocolm.py converts checkpoints of fairseq."
            ) from error


def _check_weights(model: PreTrainedModel, loading: dict, mismatched: dict, source):
    """Refuses weights that do not fit the model, all at once."""
    missing = set(loading["missing_keys"])
    # Besides the encoder, by its names alone and in a model with a head, what the checkpoint has a part of. Weights
    # tied to another one are loaded with that.
    loaded = model.state_dict().keys() - missing - model.all_tied_weights_keys.keys()
    complete = {name.split(".")[0] for name in loaded}
    complete |= {model.base_model_prefix, "embeddings", "encoder", "relative_attention_bias"}
    # Plain ones: not quantised, sharded or left on the disk.
    plain = {
        name: weight.detach()
        for name, weight in model.named_parameters()
        if type(weight) is nn.Parameter and not weight.is_meta and weight.dtype.itemsize > 1
    }
    problems = {
        "missing": [name for name in missing if name.split(".")[0] in complete],
        "not in the model": [name for name in loading["unexpected_keys"] if name.split(".")[0] in complete],
        "of another shape, which ignore_mismatched_sizes=True would initialise": [
            f"{name} {tuple(given)} instead of {tuple(expected)}" for name, (given, expected) in mismatched.items()
        ],
        # A sum takes no memory, and is finite only if all are; but one of finite values may overflow.
        "NaN or infinite": [
            name
            for name, weight in plain.items()
            if not weight.sum(dtype=torch.float32).isfinite() and not weight.isfinite().all()
        ],
    }
    found = [
        f"{len(names)} {problem}: {', '.join(sorted(names)[:5])}{', ...' if len(names) > 5 else ''}"
        for problem, names in problems.items()
        if names
    ]
    if found:
        raise RuntimeError(
            f"The weights of {source} do not fit {type(model).__name__}. {'; '.join(found)}. Either the checkpoint is "
            "damaged, or its config.json is missing or of another model."
        )


class CocoLMModel(CocoLMPreTrainedModel):
    """The COCO-LM encoder: a post-norm Transformer with absolute positions and a relative position bias.

    The bias is one value for each bucket of distances and head, shared by all layers. The auxiliary network is an
    encoder of this kind too.
    """

    def __init__(self, config: CocoLMConfig):
        super().__init__(config)
        if config.main_config is not None:
            raise ValueError(
                f"This configuration is of two networks in pre-training (the main one: {config.main_config.model_type}"
                "), not of one encoder. Load it with CocoLMForPretraining; base_model.save_pretrained writes its main "
                f"encoder as a {config.main_config.model_type} checkpoint."
            )
        self.embeddings = CocoLMEmbeddings(config)
        self.encoder = CocoLMEncoder(config)
        if config.rel_pos_bins:
            self.relative_attention_bias = nn.Embedding(config.rel_pos_bins, config.num_attention_heads)
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        r"""
        Args:
            input_ids: `(batch, length)`, int64; positions count from 0 at the left, so pad on the right.
            attention_mask: `(batch, length)`, int64 or bool: 1 for tokens, 0 for padding. All are tokens if `None`.
            inputs_embeds: `(batch, length, hidden_size)`, float: word embeddings to use instead of `input_ids`.
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            `last_hidden_state` `(batch, length, hidden_size)`; on demand `hidden_states`, the embeddings and every
            layer's output, and `attentions`, `(batch, heads, query, key)` for every layer. States of padding have no
            meaning.

        Raises:
            ValueError: If the input is too long, has a token outside the vocabulary (checked on the CPU), is no batch
                of sequences, is given twice or not at all, or does not fit `attention_mask`.
        """
        hidden_states = self.embeddings(input_ids, inputs_embeds, attention_mask)
        batches = None
        if attention_mask is not None and self.leaves_out_padding(attention_mask, **kwargs):
            batches = Batches.of(attention_mask)
        if batches is None:
            attention_bias = self.attention_bias(hidden_states, attention_mask)
            return BaseModelOutput(last_hidden_state=self.encoder(hidden_states, attention_bias, **kwargs))
        biases = self.batch_biases(hidden_states, batches)
        states = self.encoder(batches.take(hidden_states), *biases, batches=batches, **kwargs)
        return BaseModelOutput(last_hidden_state=batches.put(states, hidden_states.shape[:2]))

    def leaves_out_padding(self, attention_mask: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> bool:
        """Whether the layers compute nothing for padding, if that is on the right.

        They do where states or attentions of every place are asked for, where shapes must not depend on what a mask
        contains, and for FlexAttention, which compiles a kernel for every shape.
        """
        names = "output_hidden_states", "output_attentions"
        is_recorded = any(kwargs.get(name, getattr(self.config, name)) for name in names)
        return not (is_recorded or is_tracing(attention_mask) or self.config._attn_implementation == "flex_attention")

    @torch.no_grad()
    def attend_to_neighbors(self, strength: float = 4.0):
        """Lets each head of the first half prefer one of the tokens 1 to 4 to the left or right, in all layers.

        Our choice, for short trainings from random weights: that neighbors matter takes an encoder of this kind its
        first thousands of updates to find out, and until then it learns little else. The other heads stay free for what
        is far: the vector of [CLS], and words that come again.

        Args:
            strength: Added to the attention scores of that neighbor.

        Raises:
            ValueError: If `rel_pos_bins` is too small for these neighbors to have a bucket each.
        """
        offsets = torch.tensor([-1, 1, -2, 2, -3, 3, -4, 4][: max(1, self.config.num_attention_heads // 2)])
        if self.config.rel_pos_bins < 16:
            raise ValueError(
                "rel_pos_bins must be at least 16 to tell the 4 nearest tokens apart, but is "
                f"{self.config.rel_pos_bins}."
            )
        heads = torch.arange(len(offsets))
        self.relative_attention_bias.weight[self.position_buckets(offsets), heads] += strength

    def position_buckets(self, distance: torch.Tensor) -> torch.Tensor:
        """Rows of the table of position biases for distances between tokens, int64 of any shape, key minus query.

        They are counted from the bucket of the largest distance in the position table, whatever the input's length
        (authors' code).
        """
        farthest = distance.new_tensor(1 - self.config.max_position_embeddings)
        sizes = self.config.rel_pos_bins, self.config.max_rel_pos
        return relative_position_bucket(distance, *sizes) - relative_position_bucket(farthest, *sizes)

    def attention_bias(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
        r"""What is added to the attention scores of every layer: relative position bias and padding.

        It is computed here and not stored: a plain attribute would stay on the meta device when a checkpoint is loaded.

        Args:
            hidden_states: `(batch, length, hidden_size)`, read for its shape, type and device.
            attention_mask: `(batch, length)` or `None`.

        Returns:
            `(batch or 1, heads or 1, length, length)`, float, rounded to the type of the scores; `None` if there is
            nothing to add.
        """
        batch_size, length, _ = hidden_states.shape
        dtype = product_dtype(hidden_states)
        bias = None
        if self.config.rel_pos_bins:
            buckets = self.position_buckets(torch.arange(1 - length, length, device=hidden_states.device))
            position = torch.arange(length, device=hidden_states.device)
            # (query, key), from a row of distances
            buckets = buckets[position[None, :] - position[:, None] + length - 1]
            # Contiguous here, or scaled_dot_product_attention would copy it in every layer.
            bias = self.relative_attention_bias(buckets).permute(2, 0, 1)[None].to(dtype).contiguous()
        # Without padding one bias serves all rows; but a traced graph cannot depend on what a mask contains.
        if attention_mask is not None and (is_tracing(attention_mask) or not attention_mask.all()):
            bias = hidden_states.new_zeros(1, 1, length, length, dtype=dtype) if bias is None else bias
            bias = torch.where(attention_mask[:, None, None, :].bool(), bias, PADDING_SCORE)
        if bias is not None and self.config._attn_implementation == "flex_attention":
            # FlexAttention reads the bias by index and does not broadcast.
            bias = bias.expand(batch_size, self.config.num_attention_heads, length, length)
        return bias

    def batch_biases(self, hidden_states: torch.Tensor, batches: Batches) -> list[torch.Tensor | None]:
        """The `attention_bias` of each batch, parts of the one for the longest text."""
        longest = self.attention_bias(hidden_states[:, : batches.shapes[0][1]], None)
        biases = []
        for (_, length), mask in zip(batches.shapes, batches.masks, strict=True):
            bias = None if longest is None else longest[..., :length, :length]
            if mask is not None:
                bias = hidden_states.new_zeros((), dtype=product_dtype(hidden_states)) if bias is None else bias
                bias = torch.where(mask[:, None, None, :], bias, PADDING_SCORE)
            biases.append(bias if bias is None else bias.contiguous())
        return biases


class CocoLMTransform(nn.Module):
    """Dense, activation, LayerNorm: the head that embeds a text, and the first part of the language model head."""

    def __init__(self, config: CocoLMConfig, size: int, hidden_size: int | None = None):
        super().__init__()
        self.dense = nn.Linear(hidden_size or config.hidden_size, size)
        self.activation = ACT2FN[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.activation(self.dense(hidden_states)))


class CocoLMLMHead(CocoLMTransform):
    """Masked language model head, with the tied word embeddings and a bias of its own."""

    def __init__(self, config: CocoLMConfig, embedding_size: int | None = None, hidden_size: int | None = None):
        embedding_size = embedding_size or config.hidden_size
        super().__init__(config, embedding_size, hidden_size)
        self.decoder = nn.Linear(embedding_size, config.vocab_size)

    def transform(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.transform(hidden_states))


def _make_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """An encoder of any family, in the default type whatever the configuration says of its checkpoint."""
    # Ours is not registered with AutoModel where this file is the code of a checkpoint.
    if config.model_type == CocoLMConfig.model_type:
        return CocoLMModel(config)
    return AutoModel.from_config(config, dtype=torch.get_default_dtype())


def _num_positions(encoder: PreTrainedModel) -> int | float:
    """Tokens that the table of absolute positions has room for, infinite without one."""
    for name, module in encoder.named_modules():
        if name.endswith("embeddings.position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa's begin after that of padding.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return math.inf


def _embedding_weights(encoder: PreTrainedModel) -> tuple[str, dict[str, torch.Size]]:
    """Name of the word embeddings' weight, and shapes by name of all weights of the embedding layer that it is in."""
    words = next(name for name, module in encoder.named_modules() if module is encoder.get_input_embeddings())
    layer = words.rpartition(".")[0]
    # Word embeddings at the top of a network are in no such layer.
    prefix = f"{layer or words}."
    return f"{words}.weight", {n: weight.shape for n, weight in encoder.named_parameters() if n.startswith(prefix)}


@dataclass
class CocoLMForPretrainingOutput(ModelOutput):
    r"""Output of [`CocoLMForPretraining`].

    `compute_metrics` of a `Trainer` gets the fields from `mlm_loss` to `corrupted_input_ids` as predictions, in this
    order, the losses with one value a batch.

    Args:
        loss: Scalar, float32: mlm_loss + copy_loss_weight * copy_loss + corrective_lm_loss + contrastive_loss_weight *
            contrastive_loss. Like all losses, only with `labels`.
        mlm_loss: Scalar, float32, mean over masked tokens: the auxiliary network's, or with the objective `"masked_lm"`
            the main one's.
        copy_loss: Scalar, float32, mean over all tokens, unweighted. 0 with the objective `"masked_lm"`.
        corrective_lm_loss: Scalar, float32, mean over masked tokens. 0 with other objectives than `"corrective_lm"`.
        contrastive_loss: Scalar, float32, mean over both views of every text, unweighted. 0 for a single text, without
            `span_input_ids` or with weight 0.
        copy_logits: `(batch, length)`, float: logit of the probability that a token is original; `None` with the
            objective `"masked_lm"`.
        corrupted_input_ids: `(batch, length)`, int64: what the main network read.
        auxiliary_logits: `(masked, vocab_size)`, float, the masked positions in row-major order. With `output_logits`.
        corrective_lm_logits: `(masked, vocab_size)`, float, same positions. With `output_logits`.
        contrastive_embeddings: `(batch, contrastive_embedding_size)`, float, of the corrupted text. With
            `output_logits`.
        span_embeddings: `(batch, contrastive_embedding_size)`, float, of the crop. With `output_logits`.
        hidden_states: On demand, the main network's for the corrupted text.
        attentions: On demand, the main network's for the corrupted text.
    """

    loss: torch.Tensor | None = None
    mlm_loss: torch.Tensor | None = None
    copy_loss: torch.Tensor | None = None
    corrective_lm_loss: torch.Tensor | None = None
    contrastive_loss: torch.Tensor | None = None
    copy_logits: torch.Tensor | None = None
    corrupted_input_ids: torch.Tensor | None = None
    auxiliary_logits: torch.Tensor | None = None
    corrective_lm_logits: torch.Tensor | None = None
    contrastive_embeddings: torch.Tensor | None = None
    span_embeddings: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class CocoLMForPretraining(CocoLMPreTrainedModel):
    """Main and auxiliary network with the four pre-training losses.

    Gradients: the MLM loss trains the auxiliary network, the other losses the main one; the tokens sampled in between
    carry none. The embeddings belong to both, so they get all gradients. The corrective loss does not train the copy
    head: its copy probability is a constant.

    `config.discriminator_objective` chooses what the main network learns (the paper ablates it). Weights that an
    objective does not use stay as they are, without gradient.

    The networks are COCO-LM encoders, or with [`~CocoLMForPretraining.from_encoders`] any others. `base_model` is the
    main one: `base_model.save_pretrained(folder)` writes it as a checkpoint of its own class.
    """

    # Each loss has its own normaliser, so the one count of labels that Trainer offers cannot replace the means.
    accepts_loss_kwargs = False

    def __init__(self, config: CocoLMConfig):
        super().__init__(config)
        auxiliary_config = copy.deepcopy(config if config.main_config is None else config.auxiliary_config)
        if config.main_config is None:
            auxiliary_config.num_hidden_layers = config.auxiliary_layers
        if config.auxiliary_sampling == "zero_dropout":
            for name, value in auxiliary_config.to_dict().items():
                if "drop" in name and isinstance(value, float):
                    setattr(auxiliary_config, name, 0.0)
        self.cocolm, self.auxiliary = map(_make_encoder, (config.main_config or config, auxiliary_config))
        if config.auxiliary_sampling == "zero_dropout":
            # Some families have names of their own for it.
            for module in self.auxiliary.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        self.num_positions = min(map(_num_positions, (self.cocolm, self.auxiliary)))
        # Embeddings may be narrower than the layers, as ELECTRA's are.
        embedding_size = self.cocolm.get_input_embeddings().embedding_dim
        auxiliary_embedding_size = self.auxiliary.get_input_embeddings().embedding_dim
        self.auxiliary_lm_head = CocoLMLMHead(config, auxiliary_embedding_size, auxiliary_config.hidden_size)
        self.copy_head = nn.Linear(config.hidden_size, 1)
        is_narrow = embedding_size != config.hidden_size
        self.corrective_lm_projection = nn.Linear(config.hidden_size, embedding_size) if is_narrow else nn.Identity()
        self.corrective_lm_head = nn.Linear(embedding_size, config.vocab_size)
        self.contrastive_head = CocoLMTransform(config, config.contrastive_embedding_size or config.hidden_size)
        self._tied_weights_keys = self._shared_weights()
        self._unused = ()
        self.post_init()
        # Which the encoders pass on.
        self._keys_to_ignore_on_load_unexpected.discard(PRETRAINING_ONLY)

    def _shared_weights(self) -> dict[str, str]:
        """Names of the weights that are another weight, and that one's name.

        Both networks share all embeddings, as in COCO-LM, where they are of one family and those have the same names
        and shapes. (BERT and RoBERTa have such, but count positions differently.)
        """
        words, weights = _embedding_weights(self.cocolm)
        auxiliary_words, auxiliary_weights = _embedding_weights(self.auxiliary)
        shared = {}
        if self.auxiliary.config.model_type == self.cocolm.config.model_type and auxiliary_weights == weights:
            shared = {f"auxiliary.{name}": f"cocolm.{name}" for name in weights}
        auxiliary_words = f"auxiliary.{auxiliary_words}"
        shared["auxiliary_lm_head.decoder.weight"] = shared.get(auxiliary_words, auxiliary_words)
        shared["corrective_lm_head.weight"] = f"cocolm.{words}"
        return shared

    def tie_weights(self, *args, **kwargs):
        """Ties the shared weights, and takes the gradient from heads and auxiliary where the objective has no use.

        Distributed training waits for every gradient that it expects. Loading replaces all weights, and ends with this.
        Call it after another objective was set: the weights that this one took the gradient from get it back.
        """
        super().tie_weights(*args, **kwargs)
        unused = ["auxiliary.pooler."]
        if not self.config.contrastive_loss_weight:
            unused += ["contrastive_head."]
        if self.config.discriminator_objective == "replaced_token_detection":
            unused += ["corrective_lm_head.", "corrective_lm_projection."]
        elif self.config.discriminator_objective == "masked_lm":
            unused += ["auxiliary.", "auxiliary_lm_head.", "copy_head."]
        # A shared weight has the name that the main network gives it.
        for name, weight in self.named_parameters():
            if name.startswith((*self._unused, *unused)):
                weight.requires_grad_(not name.startswith(tuple(unused)))
        self._unused = tuple(unused)

    @classmethod
    def from_encoders(
        cls, main: PreTrainedModel, auxiliary: PreTrainedModel, config: CocoLMConfig | None = None, **kwargs
    ) -> "CocoLMForPretraining":
        """Two encoders of any families of the Auto classes (BERT, ELECTRA, ModernBERT, ...) under this objective.

        Their weights are copied; the heads are new. Networks of your own need only be a `PreTrainedModel` that is
        registered with `AutoModel`, called as `model(input_ids=..., attention_mask=...)` and returning
        `last_hidden_state` `(batch, length, hidden_size)`.

        The auxiliary network shares the main one's embeddings if both are of one family and have embeddings of the same
        names and shapes; if it comes with other values, it loses them to those of the main one, which is logged.

        A weight that this objective does not use, such as the pooler of BERT, keeps its `requires_grad` in the main
        network: `DistributedDataParallel` then needs `find_unused_parameters=True`, which `Trainer` sets.

        Args:
            main: The encoder to pre-train; of a model with a head, its `base_model`. The whole takes its device and
                type.
            auxiliary: The smaller encoder that corrupts the text, with the same vocabulary.
            config: Settings of the objective, instead of `kwargs`.
            kwargs: Fields of [`CocoLMConfig`], such as `copy_loss_weight=50`.

        Raises:
            TypeError: If a network is no `PreTrainedModel`.
            ValueError: If the vocabularies differ in size, a network is not registered with `AutoModel`, `config` and
                `kwargs` are both given, or one of `kwargs` is read from `main` and has another value there.
            huggingface_hub.errors.StrictDataclassError: If the configuration could not be saved.
        """
        if config is not None and kwargs:
            raise ValueError(
                f"The settings must be either in config or keywords, but got a config and {', '.join(sorted(kwargs))}. "
                "Set them in the config."
            )
        for name, encoder in {"main": main, "auxiliary": auxiliary}.items():
            if not isinstance(encoder, PreTrainedModel):
                raise TypeError(
                    f"{name} must be a PreTrainedModel, such as AutoModel gives, but got a {type(encoder).__name__}. "
                    "Wrap it in one and register that with AutoConfig and AutoModel, so that it can be saved."
                )
        main, auxiliary = main.base_model, auxiliary.base_model
        sizes = [encoder.get_input_embeddings().num_embeddings for encoder in (main, auxiliary)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"Both networks must have one vocabulary, but main has {sizes[0]} tokens and auxiliary {sizes[1]}: the "
                "tokens that the auxiliary network fills in are read by the main one. Make both with one tokenizer; if "
                "you only added tokens, call resize_token_embeddings."
            )
        config = CocoLMConfig(**kwargs) if config is None else copy.deepcopy(config)
        given = {name: value for name, value in vars(config).items() if name in kwargs}
        config.set_encoders(main.config, auxiliary.config)
        for name, value in given.items():
            if getattr(config, name) != value:
                raise ValueError(
                    f"{name} is read from main, whose configuration has {getattr(config, name)}, but got {value}. Set "
                    f"main.config.{name} if the encoder is really of that kind."
                )
        model = cls(config).to(device=main.device, dtype=main.dtype)
        for copied, encoder, name in ((model.auxiliary, auxiliary, "auxiliary"), (model.cocolm, main, "main")):
            if type(copied) is not type(encoder):
                raise ValueError(
                    f"{name} is a {type(encoder).__name__}, but AutoModel makes a {type(copied).__name__} of its "
                    "configuration, so it could not be loaded again. Give an encoder that AutoModel knows."
                )
            missing, unexpected = copied.load_state_dict(encoder.state_dict(), strict=False)
            # A model with a head may come without a pooler, which is not used here.
            if unexpected or any(not weight.startswith("pooler.") for weight in missing):
                raise ValueError(
                    f"The weights of {name} do not fit its configuration: it lacks {missing}, and {unexpected} are "
                    "left over. It could not be loaded again."
                )
        shared = [name.removeprefix("auxiliary.") for name in model._tied_weights_keys if name.startswith("auxiliary.")]
        pairs = [(model.auxiliary.get_parameter(name), auxiliary.get_parameter(name)) for name in shared]
        if not all(torch.equal(weight, given.to(weight)) for weight, given in pairs):
            logger.warning("The auxiliary network now has the main network's embeddings in place of its own.")
        return model

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        if self.auxiliary.get_input_embeddings().num_embeddings != embeddings.num_embeddings:
            self.auxiliary.resize_token_embeddings(embeddings.num_embeddings)
            self.tie_weights()
        for head in (self.corrective_lm_head, self.auxiliary_lm_head.decoder):
            head.out_features = embeddings.num_embeddings
        for config in (
            self.config.main_config,
            self.config.auxiliary_config,
            self.cocolm.config,
            self.auxiliary.config,
        ):
            if config is not None:
                config.vocab_size = embeddings.num_embeddings
        return embeddings

    def set_attn_implementation(self, attn_implementation: str | dict, **kwargs):
        super().set_attn_implementation(attn_implementation, **kwargs)
        # The auxiliary has a configuration of its own, which transformers before 5.20 passes over.
        self.auxiliary.set_attn_implementation(attn_implementation, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        span_input_ids: torch.Tensor | None = None,
        span_attention_mask: torch.Tensor | None = None,
        corrupted_input_ids: torch.Tensor | None = None,
        output_logits: bool = False,
        loss_normalizers: torch.Tensor | None = None,
        other_embeddings: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CocoLMForPretrainingOutput:
        r"""
        Args:
            input_ids: `(batch, length)`, int64: the text with [MASK] in place of some tokens.
            attention_mask: `(batch, length)`, int64 or bool: 1 for tokens, 0 for padding. If `None`, `pad_token_id` is
                padding.
            labels: `(batch, length)`, int64: the whole original text, -100 on padding. Masked positions are those where
                it differs from `input_ids`. Without it no loss is computed, nothing is sampled, and the main network
                reads `input_ids` (or `corrupted_input_ids`) as it is, to tell which tokens look replaced.
            span_input_ids: `(batch, span_length)`, int64: a crop of the original text, beginning with [CLS]. A COCO-LM
                encoder that leaves out padding encodes both in one pass, another one only where span_length is length,
                as the collator's `pad_to_multiple_of` can make it. Without it the contrastive head gets no gradient,
                for which `DistributedDataParallel` waits unless `contrastive_loss_weight` is 0.
            span_attention_mask: `(batch, span_length)`, like `attention_mask`.
            corrupted_input_ids: `(batch, length)`, int64: read by the main network instead of a new sample.
            output_logits: Whether to return the language model logits and the contrasted embeddings.
            loss_normalizers: `(3,)`, float: what the sums of the losses over masked tokens, tokens and anchors are
                divided by, instead of this batch's own numbers ([`~CocoLMForPretraining.count_items`]).
            other_embeddings: See [`contrastive_loss`].
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Raises:
            ValueError: If `labels`, `corrupted_input_ids` or the number of spans do not fit `input_ids`, if a text is
                longer than the table of positions, or a token or label outside the vocabulary (checked on the CPU), and
                for what [`CocoLMModel`] raises.
        """
        if attention_mask is None:
            attention_mask = self._not_padding(input_ids)
        if not self.config.contrastive_loss_weight:
            span_input_ids = None
        if span_input_ids is not None and span_attention_mask is None:
            span_attention_mask = self._not_padding(span_input_ids)
        tensors = {"attention_mask": attention_mask, "labels": labels, "corrupted_input_ids": corrupted_input_ids}
        for name, tensor in tensors.items():
            if tensor is not None:
                _check_shape(name, tensor, input_ids.shape)
        if span_input_ids is not None:
            _check_shape("span_input_ids", span_input_ids, (input_ids.shape[0], *span_input_ids.shape[1:]))
            _check_shape("span_attention_mask", span_attention_mask, span_input_ids.shape)
        # Encoders of other families do not check it themselves.
        tensors = {"The input": input_ids, "span_input_ids": span_input_ids, "corrupted_input_ids": corrupted_input_ids}
        for name, tensor in tensors.items():
            if tensor is not None:
                _check_length(name, tensor.shape[-1], self.num_positions)
                _check_token_ids(tensor, self.config.vocab_size, "input_ids" if tensor is input_ids else name)
        if labels is not None:
            _check_token_ids(labels.masked_fill(labels == -100, 0), self.config.vocab_size, "labels")
        for name in ("output_hidden_states", "output_attentions"):
            if self.config.main_config is not None and getattr(self.config, name):
                kwargs.setdefault(name, True)
        if labels is None:
            corrupted_input_ids = input_ids if corrupted_input_ids is None else corrupted_input_ids
            main_output = self._encode(corrupted_input_ids, attention_mask, **kwargs)
            is_detector = self.config.discriminator_objective != "masked_lm"
            return CocoLMForPretrainingOutput(
                copy_logits=self.copy_head(main_output.last_hidden_state).squeeze(-1) if is_detector else None,
                corrupted_input_ids=corrupted_input_ids,
                hidden_states=main_output.hidden_states,
                attentions=main_output.attentions,
            )

        is_token, is_masked = attention_mask.bool(), self._is_masked(input_ids, attention_mask, labels)
        masked_labels = labels[is_masked]
        num_masked, num_tokens, num_anchors = (None,) * 3 if loss_normalizers is None else loss_normalizers
        objective = self.config.discriminator_objective

        num_masked = max(len(masked_labels), 1) if num_masked is None else num_masked

        auxiliary_logits = copy_logits = corrective_lm_logits = None
        if objective == "masked_lm":
            corrupted_input_ids = input_ids if corrupted_input_ids is None else corrupted_input_ids
        else:
            masked_states = self._auxiliary_states(input_ids, attention_mask, is_masked)
            draws = corrupted_input_ids is None
            in_eval_mode = self.config.auxiliary_sampling == "eval" and self.auxiliary.training
            total, drawn = sum_of_losses(
                self.auxiliary_lm_head, masked_states, masked_labels, draws=draws and not in_eval_mode
            )
            mlm_loss = total / num_masked
            if draws and in_eval_mode:
                drawn = self._draw_in_eval_mode(input_ids, attention_mask, is_masked, masked_labels)
            if draws:
                corrupted_input_ids = input_ids.masked_scatter(is_masked, drawn)
            if output_logits:
                auxiliary_logits = self.auxiliary_lm_head(masked_states)

        main_output, span_states = self._encode_views(
            corrupted_input_ids, attention_mask, span_input_ids, span_attention_mask, **kwargs
        )
        hidden_states = main_output.last_hidden_state
        detection_loss = correction_loss = sequence_loss = hidden_states.new_zeros((), dtype=torch.float32)
        loss_of = None
        if objective != "masked_lm":
            copy_logits = self.copy_head(hidden_states).squeeze(-1)
            is_original = corrupted_input_ids == torch.where(is_masked, labels, input_ids)
            detection_loss = copy_loss(copy_logits[is_token], is_original[is_token], num_tokens)
            sampled, masked_logits = corrupted_input_ids[is_masked], copy_logits[is_masked]
            form = self.config.corrective_lm_form

            def loss_of(losses, rows):
                return corrective_lm_loss(losses, masked_logits[rows], masked_labels[rows], sampled[rows], form, 1)

        if objective != "replaced_token_detection":
            masked_states = self.corrective_lm_projection(hidden_states[is_masked])
            total, _ = sum_of_losses(self.corrective_lm_head, masked_states, masked_labels, loss_of)
            if objective == "masked_lm":
                mlm_loss = total / num_masked
            else:
                correction_loss = total / num_masked
            if output_logits:
                corrective_lm_logits = self.corrective_lm_head(masked_states)
        loss = mlm_loss + self.config.copy_loss_weight * detection_loss + correction_loss

        embeddings = span_embeddings = None
        if span_states is not None:
            embeddings = self.contrastive_head(hidden_states[:, 0])
            span_embeddings = self.contrastive_head(span_states[:, 0])
            sequence_loss = contrastive_loss(
                embeddings,
                span_embeddings,
                is_token.any(dim=-1) & span_attention_mask.bool().any(dim=-1),
                temperature=self.config.contrastive_temperature,
                all_ranks=self._gathers() and other_embeddings is None,
                num_anchors=num_anchors,
                other_embeddings=other_embeddings,
            )
            loss = loss + self.config.contrastive_loss_weight * sequence_loss

        return CocoLMForPretrainingOutput(
            loss=loss,
            mlm_loss=mlm_loss,
            copy_loss=detection_loss,
            corrective_lm_loss=correction_loss,
            contrastive_loss=sequence_loss,
            copy_logits=copy_logits,
            corrupted_input_ids=corrupted_input_ids,
            auxiliary_logits=auxiliary_logits,
            corrective_lm_logits=corrective_lm_logits,
            contrastive_embeddings=embeddings if output_logits else None,
            span_embeddings=span_embeddings if output_logits else None,
            hidden_states=main_output.hidden_states,
            attentions=main_output.attentions,
        )

    def _not_padding(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.config.pad_token_id is None:
            return torch.ones_like(input_ids, dtype=torch.bool)
        return input_ids != self.config.pad_token_id

    @torch.no_grad()
    def count_items(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        span_input_ids: torch.Tensor | None = None,
        span_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """What the losses of a batch are means over.

        Sums of these numbers over batches, and over ranks, give the `loss_normalizers` of the whole.

        Args:
            kwargs: Other arguments of forward, not read.

        Returns:
            `(3,)`, int64: masked tokens (auxiliary and corrective loss), tokens (copy loss), and anchors, two for each
            text that is not only padding (contrastive loss).
        """
        if attention_mask is None:
            attention_mask = self._not_padding(input_ids)
        is_text = attention_mask.bool().any(dim=-1)
        if span_input_ids is not None:
            if span_attention_mask is None:
                span_attention_mask = self._not_padding(span_input_ids)
            is_text = is_text & span_attention_mask.bool().any(dim=-1)
        masked = self._is_masked(input_ids, attention_mask, labels)
        return torch.stack([masked.sum(), attention_mask.bool().sum(), 2 * is_text.sum()])

    @staticmethod
    def _is_masked(input_ids, attention_mask, labels) -> torch.Tensor:
        return attention_mask.bool() & (labels != -100) & (labels != input_ids)

    def _encode(self, input_ids, attention_mask, **kwargs) -> ModelOutput:
        return self.cocolm(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)

    def _encode_views(self, input_ids, attention_mask, span_input_ids, span_attention_mask, **kwargs):
        """The main network's output for the texts, and its last states for the crops or `None` without crops."""
        if span_input_ids is None:
            return self._encode(input_ids, attention_mask, **kwargs), None
        length, span_length = input_ids.shape[1], span_input_ids.shape[1]
        # An encoder that computes on padding takes longer for one pass than for two; ours does if it is on the left.
        is_ours = isinstance(self.cocolm, CocoLMModel)
        if length != span_length and not (is_ours and self.cocolm.leaves_out_padding(attention_mask, **kwargs)):
            output = self._encode(input_ids, attention_mask, **kwargs)
            return output, self._encode(span_input_ids, span_attention_mask).last_hidden_state
        views = (input_ids, span_input_ids), (attention_mask, span_attention_mask)
        width = max(length, span_length)
        both = (torch.cat([F.pad(view, (0, width - view.shape[1])) for view in pair]) for pair in views)
        output = self._encode(*both, **kwargs)
        text_states, span_states = output.last_hidden_state.chunk(2)
        recorded = output.hidden_states, output.attentions
        of_texts = (layers and tuple(states.chunk(2)[0] for states in layers) for layers in recorded)
        return BaseModelOutput(text_states[:, :length], *of_texts), span_states

    def _auxiliary_states(self, input_ids, attention_mask, is_masked) -> torch.Tensor:
        """The auxiliary network's last states at the masked positions, `(masked, hidden_size)`."""
        output = self.auxiliary(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
        return output.last_hidden_state[is_masked]

    @torch.no_grad()
    def _draw_in_eval_mode(self, input_ids, attention_mask, is_masked, labels) -> torch.Tensor:
        """One token for each masked position from what the auxiliary network says without dropout, `(masked,)`."""
        modes = {module: module.training for module in self.auxiliary.modules()}
        self.auxiliary.eval()
        states = self._auxiliary_states(input_ids, attention_mask, is_masked)
        for module, mode in modes.items():
            module.training = mode
        return sum_of_losses(self.auxiliary_lm_head, states, labels, draws=True)[1]

    def _gathers(self) -> bool:
        """Whether texts are contrasted over all ranks: only in training, where every rank takes every step."""
        is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        return self.training and is_distributed and torch.distributed.get_world_size() > 1


class CocoLMForMaskedLM(CocoLMPreTrainedModel):
    """The main network as a masked language model."""

    _tied_weights_keys = {"lm_head.decoder.weight": "cocolm.embeddings.word_embeddings.weight"}

    def __init__(self, config: CocoLMConfig):
        super().__init__(config)
        self.cocolm = CocoLMModel(config)
        self.lm_head = CocoLMLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear):
        self.lm_head.decoder = new_embeddings

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, **kwargs: Unpack[TransformersKwargs]
    ) -> MaskedLMOutput:
        r"""
        Args:
            input_ids, attention_mask, inputs_embeds: See [`CocoLMModel`].
            labels: `(batch, length)`, int64: the original token, -100 where none is to be predicted.

        Returns:
            `logits` `(batch, length, vocab_size)` and, with labels, `loss`, the mean over them.
        """
        outputs = self.cocolm(input_ids, attention_mask, inputs_embeds, return_dict=True, **kwargs)
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None if labels is None else _labels_loss(logits, labels, **kwargs)
        return MaskedLMOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class CocoLMClassificationHead(nn.Module):
    """Logits of a text from the state of its first token: dropout, dense, GELU, dropout, dense."""

    def __init__(self, config: CocoLMConfig, num_labels: int):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        # Whatever hidden_act is (authors' code).
        self.activation = nn.GELU()
        self.dropout = nn.Dropout(config.cls_dropout_prob)
        self.out_proj = nn.Linear(config.hidden_size, num_labels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.activation(self.dense(self.dropout(hidden_states[:, 0])))
        return self.out_proj(self.dropout(hidden_states))


class CocoLMForSequenceClassification(CocoLMPreTrainedModel):
    """Classification or regression of texts and pairs of texts."""

    def __init__(self, config: CocoLMConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.cocolm = CocoLMModel(config)
        self.classifier = CocoLMClassificationHead(config, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, **kwargs: Unpack[TransformersKwargs]
    ) -> SequenceClassifierOutput:
        r"""
        Args:
            input_ids, attention_mask, inputs_embeds: See [`CocoLMModel`].
            labels: `(batch,)`, int64, for one class of several; `(batch, num_labels)`, float 0 or 1, for several
                classes; `(batch,)` or `(batch, num_labels)`, float, for regression. `config.problem_type` says which;
                if it is `None`, `num_labels` 1 means regression and integer labels mean one class.

        Returns:
            `logits` `(batch, num_labels)` and, with labels, `loss`, the mean over them: cross entropy, binary cross
            entropy or squared error.
        """
        outputs = self.cocolm(input_ids, attention_mask, inputs_embeds, return_dict=True, **kwargs)
        logits = self.classifier(outputs.last_hidden_state)
        loss = None if labels is None else self._loss(logits, labels, **kwargs)
        return SequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)

    def _loss(self, logits, labels, num_items_in_batch=None, **kwargs) -> torch.Tensor:
        problem = self.config.problem_type
        if problem is None:
            is_class = not labels.is_floating_point()
            problem = "single_label_classification" if is_class else "multi_label_classification"
            problem = "regression" if self.num_labels == 1 else problem
        if problem == "single_label_classification" or self.num_labels == 1:
            labels = labels.squeeze(-1) if labels.ndim == 2 else labels
        if problem == "single_label_classification":
            return _labels_loss(logits, labels, num_items_in_batch=num_items_in_batch)
        _check_shape("labels", labels, logits.shape[:1] if self.num_labels == 1 else logits.shape)
        elementwise = F.mse_loss if problem == "regression" else F.binary_cross_entropy_with_logits
        loss = elementwise(logits.float().view_as(labels), labels.float(), reduction="sum")
        return loss / (labels.numel() if num_items_in_batch is None else num_items_in_batch)


class CocoLMForTokenClassification(CocoLMPreTrainedModel):
    """Classification of every token."""

    def __init__(self, config: CocoLMConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.cocolm = CocoLMModel(config)
        self.dropout = nn.Dropout(config.cls_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, **kwargs: Unpack[TransformersKwargs]
    ) -> TokenClassifierOutput:
        r"""
        Args:
            input_ids, attention_mask, inputs_embeds: See [`CocoLMModel`].
            labels: `(batch, length)`, int64: the class, -100 for tokens without one.

        Returns:
            `logits` `(batch, length, num_labels)` and, with labels, `loss`, the mean over them.
        """
        outputs = self.cocolm(input_ids, attention_mask, inputs_embeds, return_dict=True, **kwargs)
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else _labels_loss(logits, labels, **kwargs)
        return TokenClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class CocoLMForQuestionAnswering(CocoLMPreTrainedModel):
    """Extraction of the answer to a question: where it starts and where it ends."""

    def __init__(self, config: CocoLMConfig):
        super().__init__(config)
        self.cocolm = CocoLMModel(config)
        names = ("start_logits", "end_logits")
        self.qa_outputs = nn.ModuleDict({n: nn.ModuleDict({"dense": nn.Linear(config.hidden_size, 1)}) for n in names})
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        start_positions=None,
        end_positions=None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QuestionAnsweringModelOutput:
        r"""
        Args:
            input_ids, attention_mask, inputs_embeds: See [`CocoLMModel`].
            start_positions: `(batch,)`, int64: first token of the answer, 0 ([CLS]) if there is none. Positions outside
                the sequence are ignored.
            end_positions: `(batch,)`, int64: last token of the answer.

        Returns:
            `start_logits` and `end_logits`, `(batch, length)`, and, with both positions, `loss`: the mean of both
            cross entropies over the tokens that are not padding. (The authors' code sums over the batch and lets
            padding compete.)
        """
        outputs = self.cocolm(input_ids, attention_mask, inputs_embeds, return_dict=True, **kwargs)
        start_logits, end_logits = (
            head["dense"](outputs.last_hidden_state).squeeze(-1) for head in self.qa_outputs.values()
        )
        loss = None
        if start_positions is not None and end_positions is not None:
            _check_shape("start_positions", start_positions, start_logits.shape[:1])
            _check_shape("end_positions", end_positions, end_logits.shape[:1])
            loss = 0.0
            for logits, positions in ((start_logits, start_positions), (end_logits, end_positions)):
                positions = positions.masked_fill((positions < 0) | (positions >= logits.shape[1]), -100)
                if attention_mask is not None:
                    logits = logits.masked_fill(~attention_mask.bool(), PADDING_SCORE)
                loss = loss + cross_entropy(logits, positions, **kwargs) / 2
        return QuestionAnsweringModelOutput(loss, start_logits, end_logits, outputs.hidden_states, outputs.attentions)


class CocoLMForMultipleChoice(CocoLMPreTrainedModel):
    """Choice between several texts, such as the answers to a question."""

    def __init__(self, config: CocoLMConfig):
        super().__init__(config)
        self.cocolm = CocoLMModel(config)
        self.classifier = CocoLMClassificationHead(config, num_labels=1)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, **kwargs: Unpack[TransformersKwargs]
    ) -> MultipleChoiceModelOutput:
        r"""
        Args:
            input_ids: `(batch, choices, length)`, int64.
            attention_mask: `(batch, choices, length)`, like [`CocoLMModel`]'s.
            inputs_embeds: `(batch, choices, length, hidden_size)`, float, instead of `input_ids`.
            labels: `(batch,)`, int64: the right choice.

        Returns:
            `logits` `(batch, choices)` and, with labels, `loss`, the mean over them.
        """
        num_choices = (inputs_embeds if input_ids is None else input_ids).shape[1]
        inputs = (None if x is None else x.flatten(0, 1) for x in (input_ids, attention_mask, inputs_embeds))
        outputs = self.cocolm(*inputs, return_dict=True, **kwargs)
        logits = self.classifier(outputs.last_hidden_state).view(-1, num_choices)
        loss = None if labels is None else _labels_loss(logits, labels, **kwargs)
        return MultipleChoiceModelOutput(loss, logits, outputs.hidden_states, outputs.attentions)


__all__ = [
    "CocoLMForMaskedLM",
    "CocoLMForMultipleChoice",
    "CocoLMForPretraining",
    "CocoLMForPretrainingOutput",
    "CocoLMForQuestionAnswering",
    "CocoLMForSequenceClassification",
    "CocoLMForTokenClassification",
    "CocoLMModel",
    "CocoLMPreTrainedModel",
]
