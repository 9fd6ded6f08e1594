"""MARGE: a document is rebuilt from related documents that the model retrieves itself.

Lewis et al., "Pre-training via Paraphrasing", NeurIPS 2020 (arXiv 2006.15020). The paper's symbols in this file:

=================  ====================================================================================
paper              here
=================  ====================================================================================
target x_i         `labels` (targets, target_length)
evidence z_1..z_M  `input_ids` (groups, num_evidence, length)
g(x), g(z)         `embed(...)`, `document_embeddings`: first token after `retrieval_layers` layers
f(x_i, z_j)        `relevance_scores` (targets, num_evidence): cosine of the two document embeddings
beta               `relevance_weight` of each cross-attention, one trainable scalar a layer
=================  ====================================================================================

The paper states neither where the LayerNorms stand, how positions are encoded, nor where beta starts. Our choice:
pre-norm with a final norm, learned positions, one beta a layer with start value 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    ModelOutput,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
    Seq2SeqSequenceClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_marge import MargeConfig

# Added to an attention score, it leaves a weight of exactly 0 after the softmax and still fits into float16.
HIDDEN_SCORE = -1e4
# Share of the evidence's states that a new cross-attention adds to the decoder's (our choice).
COPY_SCALE = 0.5
# Tokens whose scores over the vocabulary are held at a time in training (our choice): on a CPU so many as fit into its
# cache.
TOKENS_PER_CHUNK, TOKENS_PER_CPU_CHUNK = 2048, 256
# In training, self-attention pads a document to at most its length divided by this (our choice).
LEAST_FILLED = 0.5
# Scores that `cpu_attention_forward` holds at a time, in bfloat16 2 MB, and the range of their sums in which it trusts
# them: bfloat16 goes from 1e-38 to 3e38 (our choice).
SCORES_PER_BLOCK = 2**20
TRUSTED_SUMS = 1e-30, 1e30


@dataclass
class MargeEncoderOutput(ModelOutput):
    """Output of the encoder.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(groups, num_evidence * length, hidden_size)`):
            States of all evidence documents of a group, one document after the other; in training 0 where padded.
        document_embeddings (`torch.FloatTensor` of shape `(groups, num_evidence, hidden_size)`, float32):
            L2-normalised embedding g(z) of each evidence document.
        hidden_states (`tuple[torch.FloatTensor]` of shape `(groups * num_evidence, length, hidden_size)`, *optional*):
            Embeddings and the output of each layer, the last one before the final LayerNorm.
        attentions (`tuple[torch.FloatTensor]` of shape `(groups * num_evidence, heads, length, length)`, *optional*):
            Attention weights of each layer.
        target_embeddings (`torch.FloatTensor` of shape `(targets, hidden_size)`, float32, *optional*):
            L2-normalised embedding g(x) of each target that shared the pass through the first layers.
    """

    last_hidden_state: torch.FloatTensor | None = None
    document_embeddings: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    target_embeddings: torch.FloatTensor | None = None


@dataclass
class MargeDecoderOutput(BaseModelOutputWithPastAndCrossAttentions):
    """Output of the decoder: the usual fields and what distillation needs.

    Args:
        evidence_logits (`torch.FloatTensor` of shape `(targets, num_evidence)`, *optional*):
            Mean cross-attention score (relevance bias excluded) of each evidence document over layers, heads,
            queries and real tokens.
    """

    evidence_logits: torch.FloatTensor | None = None


@dataclass
class MargeModelOutput(Seq2SeqModelOutput):
    """Output of [`MargeModel`]: the usual fields of an encoder-decoder, and what retrieval adds.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(targets, target_length, hidden_size)`):
            Decoder states; in training 0 behind the last token of a target.
        encoder_last_hidden_state (`torch.FloatTensor` of shape `(groups, num_evidence * length, hidden_size)`):
            Encoded evidence; in training 0 where padded.
        document_embeddings (`torch.FloatTensor` of shape `(groups, num_evidence, hidden_size)`, float32): g(z).
        relevance_scores (`torch.FloatTensor` of shape `(targets, num_evidence)`, float32): f(x, z) used in attention;
            those of a document or target of padding only mean nothing.
        distillation_loss (`torch.FloatTensor` of shape `()`, nats, *optional*): See [`distillation_loss`].
        contrastive_loss (`torch.FloatTensor` of shape `()`, nats, *optional*): See [`contrastive_loss`].
    """

    document_embeddings: torch.FloatTensor | None = None
    relevance_scores: torch.FloatTensor | None = None
    distillation_loss: torch.FloatTensor | None = None
    contrastive_loss: torch.FloatTensor | None = None


@dataclass
class MargeLMOutput(Seq2SeqLMOutput):
    """Output of [`MargeForConditionalGeneration`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, nats a token): Reconstruction loss, plus the distillation loss and the
            contrastive loss times their weights.
        logits (`torch.FloatTensor` of shape `(targets, target_length, vocab_size)`, *optional*): Scores before the
            softmax.
        document_embeddings, relevance_scores, distillation_loss, contrastive_loss and the remaining fields: See
            [`MargeModelOutput`].
    """

    document_embeddings: torch.FloatTensor | None = None
    relevance_scores: torch.FloatTensor | None = None
    distillation_loss: torch.FloatTensor | None = None
    contrastive_loss: torch.FloatTensor | None = None


@dataclass
class Batches:
    """Batches of rows for attention, where all else takes the tokens of all rows flat: `(tokens, hidden_size)`.

    A row is a document, or all documents of a group. Flat tokens are in the order of the documents, without padding.

    Args:
        shapes (`list[tuple[int, int]]`): Rows and length of each batch.
        places (`torch.LongTensor` of shape `(tokens,)`, *optional*):
            Where each token stands in the rows of all batches; the other places are padding. If not given: token i at
            place i, without padding.
    """

    shapes: list[tuple[int, int]]
    places: torch.LongTensor | None = None

    @classmethod
    def of(
        cls, lengths: list[int], shapes: list[tuple[int, int]], device: torch.device, order: list[int] | None = None
    ) -> "Batches":
        """Documents of these lengths, padded on the right, as rows in `order`, by default their own."""
        counts = torch.tensor(lengths)
        rows = torch.tensor([length for number, length in shapes for _ in range(number)])
        starts = torch.empty_like(rows)
        starts[slice(None) if order is None else order] = rows.cumsum(0) - rows
        moved = starts - (counts.cumsum(0) - counts)
        if not moved.any() and counts.sum() == rows.sum():
            return cls(shapes)
        return cls(shapes, (torch.arange(int(counts.sum())) + moved.repeat_interleave(counts)).to(device))

    @classmethod
    def by_length(cls, lengths: list[int], device: torch.device) -> "Batches":
        """Documents of about one length in one batch, as long as its longest."""
        order = sorted(range(len(lengths)), key=lambda document: -lengths[document])
        shapes = []
        for length in (lengths[document] for document in order):
            if shapes and length >= LEAST_FILLED * shapes[-1][1]:
                shapes[-1] = shapes[-1][0] + 1, shapes[-1][1]
            else:
                shapes.append((1, length))
        return cls.of(lengths, shapes, device, order)

    def is_token(self, device: torch.device) -> list[torch.Tensor]:
        """Of each batch `(rows, length)`, False where padded."""
        tokens = sum(rows * length for rows, length in self.shapes) if self.places is None else len(self.places)
        return self.pad(torch.ones(tokens, dtype=torch.bool, device=device))

    def like(self, states: torch.Tensor) -> list[torch.Tensor]:
        """Of each batch `(rows, length, 1)`, empty, what transformers makes a mask from.

        In the type of the scores: with a mask in float32, attention weights kept for the backward pass are float32.
        """
        return [states.new_empty(*shape, 1, dtype=product_dtype(states)) for shape in self.shapes]

    def pad(self, states: torch.Tensor) -> list[torch.Tensor]:
        """`(tokens, ...)` -> of each batch `(rows, length, ...)`, 0 where padded."""
        sizes = [rows * length for rows, length in self.shapes]
        if self.places is not None:
            states = states.new_zeros(sum(sizes), *states.shape[1:]).index_copy_(0, self.places, states)
        return [part.unflatten(0, shape) for part, shape in zip(states.split(sizes), self.shapes, strict=True)]

    def flatten(self, batches: list[torch.Tensor]) -> torch.Tensor:
        """The reverse of `pad`."""
        flat = [batch.flatten(0, 1) for batch in batches]
        states = torch.cat(flat) if len(flat) > 1 else flat[0]
        return states if self.places is None else states.index_select(0, self.places)


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
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(Q K^T * scaling + mask) V, returned as `(batch, queries, heads, head_dim)`, with the weights."""
    scores = query * scaling @ key.transpose(-2, -1)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1)
    weights = nn.functional.dropout(weights, p=dropout)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def cpu_attention_forward(
    module: nn.Module,
    query: torch.Tensor,  # (batch, heads, length, head_dim)
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,  # (batch, 1, length, length), to be added
    scaling: float,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, None]:
    """As `eager_attention_forward`, for bfloat16 on a CPU without gradients, where it is the fastest (our choice).

    A few rows at a time, so that their scores stay in the cache. Their exponentials are divided by the sums only after
    the product with the values, and no maximum is subtracted before: a softmax costs more than both products. Where
    scores are too large or too small for that, it is the plain attention that computes them.
    """
    batch, heads, length, _ = query.shape
    output = query.new_empty(batch, length, heads, value.shape[-1])
    size = max(1, SCORES_PER_BLOCK // (heads * length * key.shape[2]))
    blocks = (part.split(size) for part in (query, key, value, attention_mask, output))
    for queries, keys, values, mask, result in zip(*blocks, strict=True):
        weights = (queries * scaling @ keys.transpose(-2, -1)).add_(mask).exp_()
        sums = weights.sum(-1, keepdim=True)
        least, largest = sums.aminmax()
        if least > TRUSTED_SUMS[0] and largest < TRUSTED_SUMS[1]:
            result.copy_(((weights @ values) / sums).transpose(1, 2))
        else:
            result.copy_(eager_attention_forward(module, queries, keys, values, mask, scaling)[0])
    return output, None


class MargeOutputProjection(nn.Linear):
    """The last projection of a sub-layer, which adds to the residual stream.

    Its initial weights are divided by sqrt(sub-layers of the stack), as in GPT-2, so that the stream keeps its size and
    what a token is shows at the top of the stack (our choice).
    """

    def __init__(self, config: MargeConfig, in_features: int, is_decoder: bool):
        super().__init__(in_features, config.hidden_size)
        sublayers = (
            2 * config.decoder_base_layers + 3 * config.decoder_layers if is_decoder else 2 * config.encoder_layers
        )
        self.initial_std = config.initializer_range * sublayers**-0.5


class MargeAttention(nn.Module):
    """Multi-head attention: the projections, and self-attention on them."""

    def __init__(self, config: MargeConfig, layer_idx: int, is_decoder: bool, is_causal: bool):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = is_causal
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = config.attention_probs_dropout_prob
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = MargeOutputProjection(config, config.hidden_size, is_decoder)

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.view(*states.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def forward(
        self,
        hidden_states: torch.Tensor,  # (batch, length, hidden), or with `batches` (tokens, hidden)
        attention_mask: torch.Tensor | list[torch.Tensor | None] | None,  # with `batches` one of each
        past_key_values: Cache | None = None,
        dropout: bool = True,
        batches: Batches | None = None,
        first_only: bool = False,  # whether the first token alone is asked for; a mask is to be added then
        attend: Callable | None = None,  # another kernel than that which `attn_implementation` names
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # Autocast would make a copy for each product, and keep it for the backward pass.
        hidden_states = hidden_states.to(product_dtype(hidden_states))
        if first_only and self.needs_no_keys():
            return self.attend_from_first(hidden_states, attention_mask), None
        queries = hidden_states[:, :1] if first_only else hidden_states
        states = self.q_proj(queries), self.k_proj(hidden_states), self.v_proj(hidden_states)
        kwargs |= {"scaling": self.scaling, "dropout": self.dropout if dropout and self.training else 0.0}
        if batches is not None:
            inputs = zip(*map(batches.pad, states), attention_mask, strict=True)
            outputs = [self.attend(*map(self.split_heads, batch), mask, **kwargs)[0] for *batch, mask in inputs]
            return self.out_proj(batches.flatten(outputs).flatten(1)), None

        query, key, value = map(self.split_heads, states)  # (batch, heads, length, head_dim)
        if past_key_values is not None:
            key, value = past_key_values.self_attention_cache.update(key, value, self.layer_idx)
        attend = partial(attend, self) if attend is not None else self.attend
        output, weights = attend(query, key, value, attention_mask, **kwargs)
        return self.out_proj(output.flatten(2)), weights

    def needs_no_keys(self) -> bool:
        """Whether `attend_from_first` computes what the projections would.

        With gradients, the bias of the keys would have none, though only because it is 0.
        """
        projections = self.k_proj, self.v_proj
        return not torch.is_grad_enabled() and all(
            is_plain(module, nn.Linear) and type(module.weight) is nn.Parameter and module.bias is not None
            for module in projections
        )

    def attend_from_first(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Self-attention of the first token alone, `(batch, 1, hidden)`.

        A score is q (W_k x) = (q W_k) x, and the mean of W_v x is W_v times the mean of x. With one query that is
        much less to compute than keys and values of all tokens. What the bias of the keys adds to all scores alike,
        the softmax takes away.
        """
        key_weight, value_weight = (
            projection.weight.unflatten(0, (self.num_heads, self.head_dim)) for projection in (self.k_proj, self.v_proj)
        )
        query = self.q_proj(hidden_states[:, :1]).unflatten(-1, (self.num_heads, self.head_dim))
        query = torch.einsum("bihd,hdc->bihc", query, key_weight)
        # The heads' queries as those of one head, whose keys and values are the states.
        states = hidden_states.unsqueeze(1)
        means, _ = eager_attention_forward(self, query, states, states, attention_mask, self.scaling)
        output = torch.einsum("bhic,hdc->bihd", means, value_weight).flatten(2) + self.v_proj.bias
        return self.out_proj(output)

    def attend(self, *args, **kwargs: Unpack[TransformersKwargs]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The kernel that `attn_implementation` names, on (batch, heads, length, head_dim)."""
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        return attention(self, *args, **kwargs)


class MargeCrossAttention(MargeAttention):
    """Attention of targets over all tokens of all their evidence, biased by relevance (paper, section 2.2).

    softmax over all evidence tokens of  q_i k^T / sqrt(head_dim) + beta * f(x_i, z_j), for the tokens of z_j.

    Keys and values are computed once a group; the queries of a group's targets stand one after the other.

    The bias is the same for all tokens of a document. So it goes through additional dimensions, one a document and one
    for padding: a key holds the one-hot vector of its document there, a query beta * f(x_i, z_1..M), and a score that
    hides it wherever it must not look. No mask and no bias of the size of the scores exists, so that every kernel can
    be used, also those that take neither (FlashAttention) or give no gradient to it (all fused ones); head_dim is
    rounded up to a multiple of 8, as they ask for. One dimension alone would do only where no target shares its
    evidence. Through SDPA on a CPU (4 heads, 2048 queries on 2048 keys, with gradients) this takes 65 MiB and 0.4 s
    instead of 277 MiB and 0.9 s with a bias of the size of the scores.
    """

    def __init__(self, config: MargeConfig, layer_idx: int):
        super().__init__(config, layer_idx, is_decoder=True, is_causal=False)
        self.relevance_weight = nn.Parameter(torch.ones(1))  # beta

    def forward(
        self,
        hidden_states: torch.Tensor,  # (targets, target_length, hidden), or with `batches` (tokens, hidden)
        evidence_states: torch.Tensor,  # (groups, keys, hidden), keys = num_evidence * length or fewer
        relevance_scores: torch.Tensor,  # (targets, num_evidence)
        token_documents: torch.Tensor,  # (groups, keys), each token's document; padding: num_evidence
        evidence_mask: torch.Tensor,  # (targets, num_evidence)
        target_mask: torch.Tensor | None = None,  # (targets, target_length) or (tokens,)
        past_key_values: EncoderDecoderCache | None = None,
        batches: Batches | None = None,  # one, with the tokens of each group's targets as a row
        token_targets: torch.Tensor | None = None,  # with `batches` (tokens,), each token's target
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        groups, (num_targets, num_evidence) = evidence_states.shape[0], relevance_scores.shape
        added = -(-(self.head_dim + num_evidence + 1) // 8) * 8 - self.head_dim
        # Scaled here: the backend then has nothing to multiply, so the additional dimensions stay as they are.
        queries = (self.q_proj(hidden_states) * self.scaling).view(-1, hidden_states.shape[-1])  # (tokens, hidden)
        is_packed = batches is not None
        if not is_packed:
            target_length = hidden_states.shape[1]
            batches = Batches([(groups, num_targets // groups * target_length)])
            token_targets = torch.arange(num_targets, device=queries.device).repeat_interleave(target_length)
        query = self.split_heads(*batches.pad(queries))

        cache = past_key_values.cross_attention_cache if past_key_values is not None else None
        if cache is not None and past_key_values.is_updated.get(self.layer_idx):
            key, value = cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        else:
            key = self.split_heads(self.k_proj(evidence_states))  # (groups, heads, keys, head_dim)
            value = self.split_heads(self.v_proj(evidence_states))
            one_hot = torch.eye(num_evidence + 1, added, dtype=key.dtype, device=key.device)[token_documents]
            key = torch.cat([key, one_hot.unsqueeze(1).expand(-1, self.num_heads, -1, -1)], dim=-1)
            # Fused kernels want one head_dim for queries, keys and values.
            value = nn.functional.pad(value, (0, added))
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx)
                past_key_values.is_updated[self.layer_idx] = True

        bias = self.relevance_weight.float() * relevance_scores
        # A softmax ignores what all its inputs share. Without that share b <= 0, and rounding b to bf16 changes e^b by
        # at most about |b| e^b / 256 < 0.0015, where 1 is the largest: less than bf16 weights are rounded by, so that a
        # second, finer part of b is not needed.
        bias = bias - bias.detach().masked_fill(~evidence_mask, torch.finfo(bias.dtype).min).amax(-1, keepdim=True)
        bias = bias.masked_fill(~evidence_mask, HIDDEN_SCORE)
        bias = nn.functional.pad(bias, (0, added - num_evidence), value=HIDDEN_SCORE)
        (bias,) = batches.pad(bias[token_targets].to(query.dtype))  # (groups, queries, added)
        query = torch.cat([query, bias.unsqueeze(1).expand(-1, self.num_heads, -1, -1)], dim=-1)

        dropout = self.dropout if self.training else 0.0
        output, weights = self.attend(query, key, value, None, scaling=1.0, dropout=dropout, **kwargs)
        output = batches.flatten([output[..., : self.head_dim]]).reshape(hidden_states.shape)
        if is_packed:
            weights = None
        elif weights is not None:  # (groups, heads, queries, keys) -> (targets, heads, target_length, keys)
            weights = weights.unflatten(2, (-1, target_length)).transpose(1, 2).flatten(0, 1)
        # A target without any evidence reads nothing (our choice), rather than the mean of what it must not see.
        reads = evidence_mask.any(-1)[token_targets].view(*hidden_states.shape[:-1], 1)
        output = self.out_proj(output) * reads

        evidence_logits = None
        if target_mask is not None:
            sizes = num_targets, num_evidence
            evidence_logits = self.mean_scores(
                queries, key[..., : self.head_dim], target_mask.flatten(), token_targets, token_documents, *sizes
            )
        return output, weights, evidence_logits

    @torch.no_grad()
    def mean_scores(
        self,
        queries: torch.Tensor,  # (tokens, hidden)
        key: torch.Tensor,  # (groups, heads, keys, head_dim)
        target_mask: torch.Tensor,  # (tokens,)
        token_targets: torch.Tensor,  # (tokens,)
        token_documents: torch.Tensor,  # (groups, keys)
        num_targets: int,
        num_evidence: int,
    ) -> torch.Tensor:
        """Mean score of each target for each document over heads and real tokens, `(targets, num_evidence)`.

        A mean of dot products is the dot product of the means, so no score matrix is needed.
        """
        queries, target_mask = queries.float(), target_mask.float().unsqueeze(-1)
        sums = queries.new_zeros(num_targets, queries.shape[-1]).index_add(0, token_targets, queries * target_mask)
        counts = queries.new_zeros(num_targets, 1).index_add(0, token_targets, target_mask)
        query = self.split_heads((sums / counts.clamp(min=1)).unflatten(0, (key.shape[0], -1)))
        is_token = token_documents.unsqueeze(1) == torch.arange(num_evidence, device=key.device).unsqueeze(-1)
        is_token = is_token.float().unsqueeze(1)  # (groups, 1, num_evidence, keys)
        key = is_token @ key.float() / is_token.sum(-1, keepdim=True).clamp(min=1)
        return (query @ key.transpose(-2, -1)).mean(1).flatten(0, 1)


class MargeFeedForward(nn.Module):
    def __init__(self, config: MargeConfig, intermediate_size: int, is_decoder: bool):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, intermediate_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.fc2 = MargeOutputProjection(config, intermediate_size, is_decoder)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act_fn(self.fc1(hidden_states)))


class MargeLayer(GradientCheckpointingLayer):
    """What layers of encoder and decoder share."""

    def __init__(
        self, config: MargeConfig, layer_idx: int, intermediate_size: int, is_decoder: bool, reads_evidence: bool
    ):
        super().__init__()
        self.dropout = config.hidden_dropout_prob
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = MargeAttention(config, layer_idx, is_decoder, is_causal=is_decoder)
        self.cross_attn = None
        if reads_evidence:
            self.cross_attn_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.cross_attn = MargeCrossAttention(config, layer_idx)
        self.mlp_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MargeFeedForward(config, intermediate_size, is_decoder)

    def add(self, hidden_states: torch.Tensor, output: torch.Tensor, dropout: bool = True) -> torch.Tensor:
        return hidden_states + nn.functional.dropout(output, p=self.dropout, training=dropout and self.training)


class MargeEncoderLayer(MargeLayer):
    def __init__(self, config: MargeConfig, layer_idx: int):
        super().__init__(config, layer_idx, config.encoder_intermediate_size, is_decoder=False, reads_evidence=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: bool = True,
        first_only: bool = False,  # whether to compute the first token alone, from all
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        normed_states = self.self_attn_layer_norm(hidden_states)
        output, _ = self.self_attn(normed_states, attention_mask, dropout=dropout, first_only=first_only, **kwargs)
        hidden_states = self.add(hidden_states[:, :1] if first_only else hidden_states, output, dropout)
        return self.add(hidden_states, self.mlp(self.mlp_layer_norm(hidden_states)), dropout)


class MargeDecoderLayer(MargeLayer):
    """One decoder layer. The base layers, at the bottom, have no cross-attention (paper, section 2.2)."""

    def __init__(self, config: MargeConfig, layer_idx: int):
        is_base = layer_idx < config.decoder_base_layers
        size = config.decoder_base_intermediate_size if is_base else config.decoder_intermediate_size
        super().__init__(config, layer_idx, size, is_decoder=True, reads_evidence=not is_base)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        # Positional from here: reentrant gradient checkpointing passes gradients to positional arguments only.
        evidence_states: torch.Tensor,
        relevance_scores: torch.Tensor,
        token_documents: torch.Tensor,
        evidence_mask: torch.Tensor,
        target_mask: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        batches: Batches | None = None,
        group_batches: Batches | None = None,
        token_targets: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, _ = self.self_attn(
            self.self_attn_layer_norm(hidden_states),
            attention_mask,
            past_key_values=past_key_values,
            batches=batches,
            **kwargs,
        )
        hidden_states = self.add(hidden_states, output)
        evidence_logits = None
        if self.cross_attn is not None:
            output, _, evidence_logits = self.cross_attn(
                self.cross_attn_layer_norm(hidden_states),
                evidence_states,
                relevance_scores,
                token_documents,
                evidence_mask,
                target_mask=target_mask,
                past_key_values=past_key_values,
                batches=group_batches,
                token_targets=token_targets,
                **kwargs,
            )
            hidden_states = self.add(hidden_states, output)
        return self.add(hidden_states, self.mlp(self.mlp_layer_norm(hidden_states))), evidence_logits


class MargePreTrainedModel(PreTrainedModel):
    """Weight initialisation, loading and saving of MARGE models."""

    config: MargeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # Read by `embed_documents`.
    is_thread_safe = True
    _no_split_modules = ["MargeEncoderLayer", "MargeDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, MargeOutputProjection):
            init.normal_(module.weight, std=module.initial_std)
        elif isinstance(module, MargeCrossAttention):
            init.ones_(module.relevance_weight)
            # What a head reads of the evidence it writes down as it is, so that from the first step on the tokens of
            # relevant evidence are more likely, and relevance has something to learn from (our choice).
            init.orthogonal_(module.v_proj.weight)
            init.copy_(module.out_proj.weight, COPY_SCALE * module.v_proj.weight.T)


class MargeStack(MargePreTrainedModel):
    """What encoder and decoder share: token and position embeddings, and the final norm."""

    def __init__(self, config: MargeConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False

    def embed_ids(self, input_ids: torch.LongTensor) -> torch.Tensor:
        try:
            return self.embed_tokens(input_ids)
        except IndexError as error:
            raise ValueError(
                f"Token ids must be from 0 to {self.embed_tokens.num_embeddings - 1}, below the model's vocab_size, "
                f"but got ids from {input_ids.min()} to {input_ids.max()}. The text comes from another tokenizer, or "
                "from one with tokens that model.resize_token_embeddings(len(tokenizer)) has not been told of."
            ) from error

    def add_positions(self, inputs_embeds: torch.Tensor, start: int | torch.Tensor = 0) -> torch.Tensor:
        length, limit = inputs_embeds.shape[1], self.config.max_position_embeddings
        # A static cache counts in a tensor, whose value a compiled step cannot look at.
        end = length + start if isinstance(start, int) else length
        if end > limit:
            raise ValueError(
                f"A document must have at most max_position_embeddings ({limit}) tokens, but got {end}. "
                "There is no position embedding beyond; cut it with chunk_documents, truncate it in the tokenizer, or "
                "generate fewer tokens."
            )
        position_ids = torch.arange(length, device=inputs_embeds.device) + start
        return inputs_embeds + self.embed_positions(position_ids)

    def is_recorded(self, **kwargs: Unpack[TransformersKwargs]) -> bool:
        """Whether hidden states or attentions are asked for, which are of all places, padding included."""
        names = "output_hidden_states", "output_attentions"
        return any(kwargs.get(name, getattr(self.config, name)) for name in names)


class MargeEncoder(MargeStack):
    """Encodes every evidence document alone, and embeds documents for retrieval."""

    _can_record_outputs = {"hidden_states": MargeEncoderLayer, "attentions": MargeAttention}

    def __init__(self, config: MargeConfig):
        super().__init__(config)
        self.layers = nn.ModuleList([MargeEncoderLayer(config, i) for i in range(config.encoder_layers)])
        self.post_init()

    def embed(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """See [`MargeModel.embed`]."""
        if attention_mask is None:
            attention_mask = mask_of(input_ids, self.config.pad_token_id)
        length = input_ids.shape[-1]
        attention_mask = attention_mask.reshape(-1, length)
        hidden_states = self.add_positions(self.embed_ids(input_ids.reshape(-1, length)))
        dtype = product_dtype(hidden_states)
        hidden = (HIDDEN_SCORE * ~attention_mask.bool())[:, None, None].to(dtype)
        needs_graph = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if (hidden.device.type, dtype) == ("cpu", torch.bfloat16) and not needs_graph:
            # Whole: long rows are faster to add than short ones.
            mask, attend = hidden.expand(-1, -1, length, -1).contiguous(), cpu_attention_forward
        else:
            mask, attend = create_bidirectional_mask(self.config, hidden_states, attention_mask), None
        *layers, last = self.layers[: self.config.retrieval_layers]
        for layer in layers:
            hidden_states = layer(hidden_states, mask, dropout=False, attend=attend)
        # Nothing reads its other tokens. One query makes nothing large, so that no kernel is better than the plain one.
        hidden_states = last(hidden_states, hidden, dropout=False, first_only=True, attend=eager_attention_forward)
        return first_token_embedding(hidden_states).view(*input_ids.shape[:-1], -1)

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        target_inputs_embeds: torch.FloatTensor | None = None,
        target_attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MargeEncoderOutput:
        """Encodes `(batch, length)` or `(groups, num_evidence, length)` ids (or embeddings, one dimension more).

        With several evidence documents, `(targets, target_length, hidden_size)` embeddings of targets share the pass
        through the first `retrieval_layers`, unless hidden states or attentions are asked for; see `target_embeddings`
        of the output.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Expected exactly one of input_ids and inputs_embeds, but got both or neither.")
        shape = input_ids.shape if inputs_embeds is None else inputs_embeds.shape[:-1]
        if len(shape) not in (2, 3):
            raise ValueError(
                "input_ids must be (batch, length) with one document a target, or (groups, num_evidence, length), "
                f"but got shape {tuple(shape)}."
            )
        groups, num_evidence, length = shape[0], shape[1] if len(shape) == 3 else 1, shape[-1]
        if inputs_embeds is None:
            inputs_embeds = self.embed_ids(input_ids)
            if attention_mask is None:
                attention_mask = mask_of(input_ids, self.config.pad_token_id)
        inputs_embeds = inputs_embeds.reshape(-1, length, self.config.hidden_size)
        if attention_mask is not None:
            attention_mask = attention_mask.reshape(-1, length)

        # Where relevance is trained, its embeddings must be those of the index. So no dropout below them (our choice).
        dropout = num_evidence == 1
        is_recorded = self.is_recorded(**kwargs)
        states, masks = [self.add_positions(inputs_embeds)], [attention_mask]
        if target_inputs_embeds is not None and not dropout and not is_recorded:
            # Only attention must know which document a token is of. Targets of another length so cost no padding, and
            # whatever the lengths, each layer is called once, as sharded layers have to be by all processes alike.
            states.append(self.add_positions(target_inputs_embeds))
            masks.append(target_attention_mask)
        packs = self.training and attention_mask is not None and not is_recorded
        lengths = lengths_of(masks) if packs else None
        padded, batches, mask = self.lay_out(states, masks, lengths)
        hidden_states = padded.flatten(states)
        if is_recorded:
            (hidden_states,), (mask,), batches = states, mask, None
        p = self.config.hidden_dropout_prob
        hidden_states = nn.functional.dropout(hidden_states, p=p, training=dropout and self.training)
        target_embeddings = None
        for number, layer in enumerate(self.layers, start=1):
            hidden_states = layer(hidden_states, mask, dropout=dropout, batches=batches, **kwargs)
            if number == self.config.retrieval_layers:
                states = padded.pad(hidden_states.flatten(0, -2))
                document_embeddings = first_token_embedding(states[0]).view(groups, num_evidence, -1)
                if len(states) == 2:
                    target_embeddings = first_token_embedding(states[1])
                    padded, batches, mask = self.lay_out(states[:1], masks[:1], lengths)
                    hidden_states = padded.flatten(states[:1])
                dropout = True
        (hidden_states,) = padded.pad(self.final_layer_norm(hidden_states).flatten(0, -2))
        return MargeEncoderOutput(
            last_hidden_state=hidden_states.reshape(groups, num_evidence * length, -1),
            document_embeddings=document_embeddings,
            target_embeddings=target_embeddings,
        )

    def lay_out(
        self, states: list[torch.Tensor], masks: list[torch.Tensor | None], lengths: list[int] | None
    ) -> tuple[Batches, Batches, list]:
        """How tokens stand in `(n, length, hidden)` states, and how in self-attention, with the masks of that.

        With `lengths`, the numbers of tokens of the documents, padding is left out.
        """
        shapes, device = [tuple(batch.shape[:2]) for batch in states], states[0].device
        padded = batches = Batches(shapes)
        if lengths is not None:
            lengths = lengths[: sum(number for number, _ in shapes)]
            padded, batches = Batches.of(lengths, shapes, device), Batches.by_length(lengths, device)
            masks = batches.is_token(device)
        inputs = zip(batches.like(states[0]), masks, strict=True)
        return padded, batches, [create_bidirectional_mask(self.config, *pair) for pair in inputs]


class MargeDecoder(MargeStack):
    """Rebuilds the targets: base layers of self-attention, then layers that also read the evidence."""

    _can_record_outputs = {
        "hidden_states": MargeDecoderLayer,
        "attentions": OutputRecorder(MargeAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(MargeCrossAttention, index=1, layer_name="cross_attn"),
    }

    def __init__(self, config: MargeConfig):
        super().__init__(config)
        num_layers = config.decoder_base_layers + config.decoder_layers
        self.layers = nn.ModuleList([MargeDecoderLayer(config, i) for i in range(num_layers)])
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        evidence_states: torch.FloatTensor | None = None,
        relevance_scores: torch.FloatTensor | None = None,
        token_documents: torch.LongTensor | None = None,
        evidence_mask: torch.BoolTensor | None = None,
        target_mask: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_mask: torch.BoolTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MargeDecoderOutput:
        """Decodes `(targets, target_length)` ids on `(groups, keys, hidden_size)` states of evidence.

        In training, states are 0 where `output_mask (targets, target_length)` is False, if that is on the right only.
        """
        if inputs_embeds is None:
            inputs_embeds = self.embed_ids(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        if not use_cache:
            past_key_values = None
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0

        hidden_states = self.add_positions(inputs_embeds, past_length)
        packs = self.training and output_mask is not None and past_key_values is None and not self.is_recorded(**kwargs)
        lengths = lengths_of([output_mask]) if packs else None
        padded = batches = group_batches = token_targets = None
        if lengths is None:
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=hidden_states,
                attention_mask=attention_mask,
                past_key_values=past_key_values.self_attention_cache if past_key_values is not None else None,
            )
        else:
            device = hidden_states.device
            padded, batches = Batches.of(lengths, [output_mask.shape], device), Batches.by_length(lengths, device)
            # It hides padding, too, which stands behind all tokens, so that one mask does for all rows.
            mask = [create_causal_mask(self.config, like[:1], None, None) for like in batches.like(hidden_states)]
            group_lengths = torch.tensor(lengths).view(len(evidence_states), -1).sum(1).tolist()
            group_batches = Batches.of(group_lengths, [(len(group_lengths), max(group_lengths))], device)
            token_targets = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(device)
            hidden_states = padded.flatten([hidden_states])
            target_mask = padded.flatten([target_mask]) if target_mask is not None else None
        hidden_states = nn.functional.dropout(hidden_states, p=self.config.hidden_dropout_prob, training=self.training)
        # One copy for the keys and values of all layers.
        evidence_states = evidence_states.to(product_dtype(evidence_states))
        all_evidence_logits = []
        for layer in self.layers:
            hidden_states, evidence_logits = layer(
                hidden_states,
                mask,
                evidence_states,
                relevance_scores,
                token_documents,
                evidence_mask,
                target_mask=target_mask,
                past_key_values=past_key_values,
                batches=batches,
                group_batches=group_batches,
                token_targets=token_targets,
                **kwargs,
            )
            if evidence_logits is not None:
                all_evidence_logits.append(evidence_logits)
        hidden_states = self.final_layer_norm(hidden_states)
        if padded is not None:
            (hidden_states,) = padded.pad(hidden_states)
        return MargeDecoderOutput(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            evidence_logits=torch.stack(all_evidence_logits).mean(0) if all_evidence_logits else None,
        )


def mask_of(input_ids: torch.LongTensor, pad_token_id: int | None) -> torch.LongTensor:
    """1 for real tokens, 0 for padding: the attention mask where none was given."""
    return torch.ones_like(input_ids) if pad_token_id is None else (input_ids != pad_token_id).long()


def without_padding(
    states: torch.Tensor, token_documents: torch.Tensor, is_token: torch.BoolTensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(groups, tokens, hidden) states and (groups, tokens) documents, as few a group as the fullest group has.

    What is left out are keys that would only be hidden.
    """
    most = int(is_token.sum(1).max().clamp(min=1))
    order = is_token.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    return states.take_along_dim(order.unsqueeze(-1), dim=1), token_documents.gather(1, order)


def lengths_of(masks: list[torch.Tensor]) -> list[int] | None:
    """Tokens of all documents `(n, length)`, 1 where there is padding only; None where padding is not on the right.

    And None in a graph, whose shapes would be data.
    """
    if torch.compiler.is_compiling():
        return None
    masks = [mask.bool() for mask in masks]
    is_right = [(mask[:, :-1] >= mask[:, 1:]).all()[None] for mask in masks]
    *lengths, is_right = torch.cat([*(mask.sum(1) for mask in masks), torch.cat(is_right).all()[None]]).tolist()
    return [max(length, 1) for length in lengths] if is_right else None


def first_token_embedding(hidden_states: torch.Tensor) -> torch.Tensor:
    """(n, length, hidden) states -> (n, hidden) document embeddings, L2-normalised in float32."""
    return nn.functional.normalize(hidden_states[:, 0].float(), dim=-1)


def without_language_token(
    input_ids: torch.LongTensor, attention_mask: torch.Tensor, bos_token_id: int | None
) -> tuple[torch.LongTensor, torch.Tensor]:
    """(n, length) ids and mask, moved left by one where a document begins with one token before `bos_token_id`."""
    has_language = (input_ids[:, 1:2] == bos_token_id) & (input_ids[:, :1] != bos_token_id)
    has_language = has_language.any(-1, keepdim=True)
    moved = (nn.functional.pad(tensor[:, 1:], (0, 1)) for tensor in (input_ids, attention_mask))
    return tuple(torch.where(has_language, *pair) for pair in zip(moved, (input_ids, attention_mask), strict=True))


def distillation_loss(
    evidence_logits: torch.Tensor, relevance_scores: torch.Tensor, evidence_mask: torch.Tensor, num_tokens: torch.Tensor
) -> torch.Tensor:
    """KL(softmax(evidence_logits) || softmax(relevance_scores)) over the documents a target may see, a mean in nats.

    The teacher, what cross-attention reads, gets no gradient. Targets count by their number of tokens (our choice), as
    in the reconstruction loss, so that both losses are normalised alike.

    Args:
        evidence_logits, relevance_scores (`torch.FloatTensor` of shape `(targets, num_evidence)`): Teacher and student.
        evidence_mask (`torch.BoolTensor` of shape `(targets, num_evidence)`): Documents that the target may see.
        num_tokens (`torch.Tensor` of shape `(targets,)`): Tokens of each target.
    """
    hidden = ~evidence_mask
    teacher = evidence_logits.detach().float().masked_fill(hidden, HIDDEN_SCORE).log_softmax(-1)
    student = relevance_scores.float().masked_fill(hidden, HIDDEN_SCORE).log_softmax(-1)
    divergence = (teacher.exp() * (teacher - student)).masked_fill(hidden, 0.0).sum(-1)
    return (divergence * num_tokens).sum() / num_tokens.sum().clamp(min=1)


def contrastive_loss(
    relevance_scores: torch.Tensor,
    is_own: torch.Tensor,
    is_negative: torch.Tensor,
    num_tokens: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """-log of the share of own documents in exp(f / temperature) over the batch, a mean over rows, in nats.

    That one document at least among several is relevant, not all, is what the groups promise; this is the loss of Miech
    et al. 2020 (MIL-NCE, equation 1) for that. Rows count by their number of tokens, as in [`distillation_loss`]; one
    without a document of its own, or in a batch without any other, counts 0.

    Args:
        relevance_scores (`torch.FloatTensor` of shape `(n, m)`): f of the rows and of all that they are compared with.
        is_own, is_negative (`torch.BoolTensor` of that shape): What belongs to a row, and what it is contrasted with.
        num_tokens (`torch.Tensor` of shape `(n,)`): Tokens of each row.
        temperature: Divisor of f.
    """
    scores = relevance_scores.float() / temperature
    own = scores.masked_fill(~is_own, HIDDEN_SCORE).logsumexp(-1)
    all_documents = scores.masked_fill(~(is_own | is_negative), HIDDEN_SCORE).logsumexp(-1)
    losses = (all_documents - own).masked_fill(~is_own.any(-1), 0.0)
    return (losses * num_tokens).sum() / num_tokens.sum().clamp(min=1)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call is nothing but that of its class: no adapter, no hook, no offloading."""
    hooks = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return type(module) is kind and "forward" not in vars(module) and not any(getattr(module, name) for name in hooks)


class _SumOfLosses(torch.autograd.Function):
    """-log p of all labels, summed up, for scores without a bias.

    Gradients are computed along with it, so that scores are computed once.
    """

    @staticmethod
    def forward(ctx, states, weight, labels, size, dtype):
        ctx.save_for_backward(states, weight, labels)
        ctx.settings = size, dtype
        loss, ctx.gradients = _linear_losses(states, weight, labels, *ctx.settings, any(ctx.needs_input_grad))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        # They are given away, as large as they are, and computed again for another pass through a retained graph.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            gradients = _linear_losses(*ctx.saved_tensors, *ctx.settings, is_trained=True)[1]
        pairs = zip(gradients, ctx.saved_tensors, strict=False)
        return *(part.mul_(gradient).to(tensor.dtype) for part, tensor in pairs), *[None] * 3


def _linear_losses(states, weight, labels, size, dtype, is_trained):
    """The sum of the losses and, chunk by chunk like these, the gradients for states and weight.

    Products are of type `dtype`. The gradients of the weight add up in float32, and so do the losses, unlike those of
    torch's `linear_cross_entropy`, which are of the type of the product.

    Args:
        states, weight, labels: `(tokens, hidden)`, `(vocab, hidden)`, `(tokens,)`.
    """
    states, weight = states.to(dtype), weight.to(dtype)
    of_states, of_weight = torch.empty_like(states) if is_trained else None, None
    loss = torch.zeros((), dtype=torch.float32, device=states.device)
    for first in range(0, max(len(labels), 1), size):
        part, chosen = states[first : first + size], labels[first : first + size, None]
        # In place, because there is no larger tensor.
        scores = (part @ weight.T).float()
        highest, own = scores.amax(dim=-1, keepdim=True), scores.gather(1, chosen)
        total = scores.sub_(highest).exp_().sum(dim=-1, keepdim=True)
        loss += (highest + total.log() - own).sum()
        if is_trained:
            # Of the softmax: the probabilities, less 1 at the label.
            change = scores.div_(total).scatter_add_(1, chosen, scores.new_full(chosen.shape, -1.0)).to(dtype)
            del scores
            torch.mm(change, weight, out=of_states[first : first + size])
            product = change.T @ part
            of_weight = product.float() if of_weight is None else of_weight.add_(product)
    return loss, (of_states, of_weight) if is_trained else None


def reconstruction_loss(states: torch.Tensor, labels: torch.LongTensor, lm_head: nn.Module) -> torch.Tensor:
    """-log p of all labels, summed up chunk by chunk, so that the scores of all tokens never exist at once.

    Padding is left out before.

    Args:
        states (`torch.FloatTensor` of shape `(targets, target_length, hidden_size)`): Of the decoder.
        labels (`torch.LongTensor` of shape `(targets, target_length)`): -100 is no label.
        lm_head: Gives the scores. Unless it is a plain linear layer, without adapters, hooks or a bias, and where it is
            compiled, they are computed once more in the backward pass.

    Returns:
        `torch.FloatTensor` of shape `()`, float32, nats.
    """
    device = states.device.type
    is_label = labels != -100
    states, labels = states[is_label], labels[is_label]
    size = TOKENS_PER_CPU_CHUNK if device == "cpu" else TOKENS_PER_CHUNK
    if is_plain(lm_head, nn.Linear) and lm_head.bias is None and not torch.compiler.is_compiling():
        arguments = states, lm_head.weight, labels, size, product_dtype(states)
        if torch.is_grad_enabled():
            return _SumOfLosses.apply(*arguments)
        return _linear_losses(*arguments, is_trained=False)[0]

    autocast = {"dtype": torch.get_autocast_dtype(device), "enabled": torch.is_autocast_enabled(device)}

    def loss(states, labels):
        # Without its cache, each chunk casts the weights for itself, and their gradients add up in float32.
        with torch.autocast(device, **autocast, cache_enabled=False):
            return nn.functional.cross_entropy(lm_head(states).float(), labels, reduction="sum")

    chunks = zip(states.split(size), labels.split(size), strict=True)
    losses = [checkpoint(loss, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.stack(losses).sum()


def visible_evidence(
    attention_mask: torch.BoolTensor, targets: int, evidence_mask: torch.Tensor | None
) -> torch.BoolTensor:
    """`(targets, num_evidence)`: what each may see of `(groups, num_evidence, length)` evidence."""
    groups = len(attention_mask)
    if targets % groups:
        raise ValueError(
            f"The number of targets must be a multiple of the number of evidence groups ({groups}), but got {targets}. "
            "Evidence of shape (groups, num_evidence, length) serves targets // groups consecutive targets a group."
        )
    # A document of nothing but padding only fills up a group.
    is_document = attention_mask.any(-1).repeat_interleave(targets // groups, dim=0)
    return is_document if evidence_mask is None else evidence_mask.bool() & is_document


def is_same_text(input_ids: torch.LongTensor, others: torch.LongTensor, pad_token_id: int) -> torch.BoolTensor:
    """`(n, m)`: which of the texts `(n, length)` and `(m, other_length)`, padded on the right, are the same tokens."""
    length = max(input_ids.shape[1], others.shape[1])
    input_ids, others = (
        nn.functional.pad(ids, (0, length - ids.shape[1]), value=pad_token_id) for ids in (input_ids, others)
    )
    return (input_ids[:, None] == others).all(-1)


class MargeModel(MargePreTrainedModel):
    """Encoder and decoder without a head: decoder states of targets that read their evidence."""

    _tied_weights_keys = {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }

    def __init__(self, config: MargeConfig):
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.encoder = MargeEncoder(config)
        self.decoder = MargeDecoder(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.shared

    def set_input_embeddings(self, value):
        self.shared = self.encoder.embed_tokens = self.decoder.embed_tokens = value

    def embed(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None) -> torch.FloatTensor:
        """Document embeddings g: the first token's state after `retrieval_layers` layers, L2-normalised (section 2.1).

        Dropout is off in these layers whatever the mode, so training, index and disk hold the same numbers, up to
        rounding. In bfloat16 on a CPU, without gradients, attention is computed by the fastest way there, whatever
        `attn_implementation` says.

        Args:
            input_ids (`torch.LongTensor` of shape `(..., length)`): Documents as the tokenizer makes them.
            attention_mask (`torch.Tensor` of shape `(..., length)`, *optional*):
                1 for real tokens, 0 for padding; from `pad_token_id` if not given.

        Returns:
            `torch.FloatTensor` of shape `(..., hidden_size)`, float32: the cosine f(x, z) of two documents is their dot
            product.
        """
        return self.encoder.embed(input_ids, attention_mask)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        relevance_scores: torch.FloatTensor | None = None,
        evidence_mask: torch.BoolTensor | None = None,
        target_input_ids: torch.LongTensor | None = None,
        target_attention_mask: torch.Tensor | None = None,
        encoder_outputs: MargeEncoderOutput | tuple | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MargeModelOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)` or `(groups, num_evidence, length)`):
                The evidence. 2-D: one document a target. 3-D: `num_evidence` documents that `targets // groups`
                consecutive targets share; each group is encoded once.
            attention_mask (`torch.Tensor` of the shape of `input_ids` or `(groups, num_evidence * length)`):
                1 for real tokens, 0 for padding; from `pad_token_id` if not given.
            decoder_input_ids (`torch.LongTensor` of shape `(targets, target_length)`): Targets, shifted right.
            decoder_attention_mask (`torch.Tensor` of shape `(targets, target_length)`, *optional*):
                1 for real tokens, 0 for padding. Not needed where padding stands on the right.
            relevance_scores (`torch.FloatTensor` of shape `(targets, num_evidence)`, *optional*):
                f(x, z). If not given: computed from the target where it is known, else 1.
            evidence_mask (`torch.BoolTensor` of shape `(targets, num_evidence)`, *optional*):
                False where a target must not see a document. A target that sees none gets nothing from
                cross-attention.
            target_input_ids, target_attention_mask (`(targets, target_length)`, *optional*):
                The targets as documents, for their embedding g(x); a language token in front is left out of it.
            encoder_outputs ([`MargeEncoderOutput`] or a tuple that starts with its `last_hidden_state`, *optional*):
                Evidence that is encoded already.

        Raises:
            ValueError: If the number of targets is no multiple of the number of groups, a shape does not fit, or a
                document is longer than `max_position_embeddings`.
        """
        if (decoder_input_ids is None) == (decoder_inputs_embeds is None):
            raise ValueError(
                "Expected exactly one of decoder_input_ids and decoder_inputs_embeds, but got both or neither. "
                "Pass labels to have decoder_input_ids made from them."
            )
        document = None
        if target_input_ids is not None and relevance_scores is None:
            if target_attention_mask is None:
                target_attention_mask = mask_of(target_input_ids, self.config.pad_token_id)
            document = without_language_token(target_input_ids, target_attention_mask, self.config.bos_token_id)
        if attention_mask is None and input_ids is not None:
            attention_mask = mask_of(input_ids, self.config.pad_token_id)
        if encoder_outputs is None:
            evidence_ids, target_embeds, target_mask = input_ids, None, None
            if document is not None and input_ids is not None:
                target_mask = document[1]
                if decoder_inputs_embeds is None and self.shares_lookup():
                    # At once, because each lookup has a gradient of the size of the vocabulary.
                    all_ids = input_ids, document[0], decoder_input_ids
                    embeds = self.encoder.embed_ids(torch.cat([ids.flatten() for ids in all_ids]))
                    embeds = embeds.split([ids.numel() for ids in all_ids])
                    embeds = [part.unflatten(0, ids.shape) for part, ids in zip(embeds, all_ids, strict=True)]
                    evidence_ids, (inputs_embeds, target_embeds, decoder_inputs_embeds) = None, embeds
                else:
                    target_embeds = self.encoder.embed_ids(document[0])
            documents = inputs_embeds, target_embeds, target_mask
            encoder_outputs = self.encoder(evidence_ids, attention_mask, *documents, **kwargs)
        elif not isinstance(encoder_outputs, ModelOutput):
            encoder_outputs = MargeEncoderOutput(*encoder_outputs)
        evidence_states, document_embeddings = encoder_outputs[0], encoder_outputs.get("document_embeddings")

        groups = evidence_states.shape[0]
        decoder_shape = (decoder_input_ids if decoder_input_ids is not None else decoder_inputs_embeds).shape[:2]
        targets = decoder_shape[0]
        given = next((x for x in (document_embeddings, relevance_scores, evidence_mask) if x is not None), None)
        num_evidence = 1 if given is None else given.shape[1]
        for name, tensor in (("relevance_scores", relevance_scores), ("evidence_mask", evidence_mask)):
            if tensor is not None and tensor.shape != (targets, num_evidence):
                raise ValueError(
                    f"{name} must have the shape (targets, num_evidence) = ({targets}, {num_evidence}), but got "
                    f"{tuple(tensor.shape)}."
                )
        if attention_mask is None:
            attention_mask = evidence_states.new_ones(evidence_states.shape[:2])
        attention_mask = attention_mask.reshape(groups, num_evidence, -1).bool()
        documents = torch.arange(num_evidence, device=attention_mask.device).unsqueeze(-1)
        token_documents = torch.where(attention_mask, documents, num_evidence).flatten(1)
        evidence_mask = visible_evidence(attention_mask, targets, evidence_mask)

        contrast = None
        contrasts = self.config.contrastive_loss_weight > 0 and self.training and input_ids is not None
        if relevance_scores is None:
            is_needed = num_evidence > 1 or contrasts
            if document is not None and document_embeddings is not None and is_needed:
                embeddings = encoder_outputs.get("target_embeddings")
                embeddings = self.embed(*document) if embeddings is None else embeddings
                texts = (document, input_ids) if contrasts else (None, None)
                masks = attention_mask, evidence_mask, target_attention_mask
                relevance_scores, contrast = self.compare(embeddings, document_embeddings, *texts, *masks)
            else:
                relevance_scores = evidence_states.new_ones(targets, num_evidence)
        relevance_scores = relevance_scores.float()

        distills = self.config.distillation_loss_weight > 0 and self.training and target_attention_mask is not None
        read_states = evidence_states
        if self.training and not kwargs.get("output_attentions", self.config.output_attentions):
            read_states, token_documents = without_padding(evidence_states, token_documents, attention_mask.flatten(1))
        output_mask = decoder_attention_mask
        if target_attention_mask is not None:
            # Up to the last token of a target. What else is hidden from what, only the whole mask can say.
            is_target = decoder_attention_mask is None and target_attention_mask.shape == decoder_shape
            output_mask = target_attention_mask.flip(1).cumsum(1).flip(1) > 0 if is_target else None
        decoder_outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            evidence_states=read_states,
            relevance_scores=relevance_scores,
            token_documents=token_documents,
            evidence_mask=evidence_mask,
            target_mask=target_attention_mask if distills else None,
            past_key_values=past_key_values,
            inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            output_mask=output_mask,
            **kwargs,
        )
        distillation = None
        if distills:
            logits, num_tokens = decoder_outputs.evidence_logits, target_attention_mask.sum(-1)
            distillation = distillation_loss(logits, relevance_scores, evidence_mask, num_tokens)
        return MargeModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            relevance_scores=relevance_scores,
            distillation_loss=distillation,
            contrastive_loss=contrast,
            past_key_values=decoder_outputs.past_key_values,
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=evidence_states,
            document_embeddings=document_embeddings,
            encoder_hidden_states=encoder_outputs.get("hidden_states"),
            encoder_attentions=encoder_outputs.get("attentions"),
        )

    def shares_lookup(self) -> bool:
        """Whether encoder and decoder look tokens up alike."""
        modules = self.encoder.embed_tokens, self.decoder.embed_tokens
        return all(is_plain(x, nn.Embedding) for x in modules) and modules[0].weight is modules[1].weight

    def compare(
        self,
        embeddings: torch.Tensor,
        document_embeddings: torch.Tensor,
        document: tuple[torch.Tensor, torch.Tensor] | None,
        input_ids: torch.LongTensor | None,
        attention_mask: torch.BoolTensor,
        evidence_mask: torch.BoolTensor,
        target_attention_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """f of targets `(targets, hidden_size)` and their groups' evidence `(groups, num_evidence, hidden_size)`.

        Returns:
            f, `(targets, num_evidence)`, and with the texts (`document` and `input_ids`) their contrastive loss.
        """
        # In bf16 the cosines of similar documents, all close to 1, would be one and the same.
        with maybe_autocast(embeddings.device.type, enabled=False):
            by_group = embeddings.unflatten(0, (len(document_embeddings), -1))
            relevance_scores = (by_group @ document_embeddings.transpose(1, 2)).flatten(0, 1)
            if input_ids is None:
                return relevance_scores, None
            all_scores = embeddings @ document_embeddings.flatten(0, 1).T
            own = evidence_mask, target_attention_mask.sum(-1)
            return relevance_scores, self.contrastive_loss(all_scores, document, input_ids, attention_mask, *own)

    def contrastive_loss(
        self, relevance_scores, document, input_ids, attention_mask, evidence_mask, num_tokens
    ) -> torch.Tensor:
        """[`contrastive_loss`] from targets to evidence and from evidence to targets, the mean of both.

        Contrasted are documents of different groups, unless one is a copy of the other or of what belongs to it.

        Args:
            relevance_scores: `(targets, groups * num_evidence)`.
            document: ids and mask of the targets as documents, both `(targets, target_length)`.
            input_ids, attention_mask: `(groups, num_evidence, length)`.
            evidence_mask: `(targets, num_evidence)`.
            num_tokens: `(targets,)`.
        """
        groups, num_evidence = attention_mask.shape[:2]
        group = torch.arange(groups, device=evidence_mask.device).repeat_interleave(len(evidence_mask) // groups)
        is_own = evidence_mask.new_zeros(len(evidence_mask), groups, num_evidence)
        is_own[torch.arange(len(group), device=group.device), group] = evidence_mask & (num_tokens > 0)[:, None]
        is_own = is_own.flatten(1)
        pad = -1 if self.config.pad_token_id is None else self.config.pad_token_id
        attention_mask = attention_mask.flatten(0, 1)
        evidence = input_ids.reshape(groups * num_evidence, -1).masked_fill(~attention_mask, pad)
        targets = document[0].masked_fill(~document[1].bool(), pad)
        # Of one text there may be copies in other groups.
        dtype = relevance_scores.dtype
        same_target, same_evidence = (is_same_text(texts, texts, pad).to(dtype) for texts in (targets, evidence))
        is_known = (same_target @ is_own.to(dtype) @ same_evidence > 0) | is_same_text(targets, evidence, pad)
        in_own_group = torch.arange(groups, device=group.device).repeat_interleave(num_evidence) == group[:, None]
        is_document = attention_mask.any(-1) & (num_tokens > 0)[:, None]
        table = relevance_scores, is_own, is_document & ~in_own_group & ~is_known
        temperature = self.config.contrastive_temperature
        to_evidence = contrastive_loss(*table, num_tokens, temperature)
        to_targets = contrastive_loss(*(part.T for part in table), attention_mask.sum(-1), temperature)
        return (to_evidence + to_targets) / 2


class MargeForConditionalGeneration(MargePreTrainedModel, GenerationMixin):
    """MARGE with its language modelling head: rebuilds targets from evidence, and generates.

    The objective (paper, section 2): L = - sum_i log p(x_i | z_1..M, f(x_i, z_1), .., f(x_i, z_M)), a mean over tokens.

    A language token steers in which language is written (our choice how). It stands first in a target, `[language]
    [CLS] .. [SEP]`, as in mBART-50; the decoder then reads `[start] [language] [CLS] ..`, and learns to choose a
    language, too. `generate(.., forced_bos_token_id=language)` writes in one, without it in the likeliest, and
    `decoder_input_ids` with the rows `[start, language]` in one a row. g(x) embeds what follows the language token,
    from `bos_token_id` on, so that relevance is that of the index, where documents have no such token. A language token
    in the place of `[start]`, as in the first mBART, works as well: put it into `decoder_input_ids` beside `labels`,
    and pass it to `generate` as `decoder_start_token_id`, one for all or a list with one a row.
    """

    _tied_weights_keys = {"lm_head.weight": "model.shared.weight"}

    def __init__(self, config: MargeConfig):
        super().__init__(config)
        self.model = MargeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def embed(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None) -> torch.FloatTensor:
        """Document embeddings, see [`MargeModel.embed`]."""
        return self.model.embed(input_ids, attention_mask)

    def prepare_decoder_input_ids_from_labels(self, labels: torch.LongTensor) -> torch.LongTensor:
        """Labels `(targets, length)` behind a start token, without their last; transformers' collator calls it, too."""
        shifted = nn.functional.pad(labels[:, :-1], (1, 0), value=self.config.decoder_start_token_id)
        return shifted.masked_fill(shifted == -100, self.config.pad_token_id)

    def _prepare_model_inputs(self, inputs, bos_token_id, model_kwargs):
        inputs, input_name, model_kwargs = super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)
        if input_name == "input_ids" and model_kwargs.get("encoder_outputs") is None:
            if model_kwargs.get("attention_mask") is None:
                model_kwargs["attention_mask"] = mask_of(inputs, self.config.pad_token_id)
            # generate() takes only a 2-D mask: that of the group's documents, one after the other.
            model_kwargs["attention_mask"] = model_kwargs["attention_mask"].reshape(inputs.shape[0], -1)
        return inputs, input_name, model_kwargs

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        relevance_scores: torch.FloatTensor | None = None,
        evidence_mask: torch.BoolTensor | None = None,
        encoder_outputs: MargeEncoderOutput | tuple | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_logits: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MargeLMOutput:
        """
        Args:
            labels (`torch.LongTensor` of shape `(targets, target_length)`, *optional*):
                The targets, with the tokens that a document starts and ends with; -100 where padded. They give the
                decoder's input, the loss and, with several evidence documents, the relevance scores.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0): Logits of the last positions only; 0 is all.
            output_logits (`bool`, *optional*): Whether to return logits. If not given: not in training with labels,
                where they would take most of the memory; see [`reconstruction_loss`].
            num_items_in_batch (`int` or `torch.Tensor`, *optional*):
                Target tokens of the global batch, gradient accumulation included; divides the loss in `Trainer`.
            input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, relevance_scores, evidence_mask,
                encoder_outputs: See [`MargeModel.forward`].
        """
        target_input_ids = target_attention_mask = None
        if labels is not None:
            use_cache = False
            target_attention_mask = labels != -100
            target_input_ids = labels.masked_fill(~target_attention_mask, self.config.pad_token_id)
            if self.training and self.config.reconstruction_loss_weight == 0:
                targets = target_input_ids, target_attention_mask
                return self._contrast(input_ids, attention_mask, *targets, evidence_mask, num_items_in_batch)
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)

        outputs: MargeModelOutput = self.model(
            input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            relevance_scores=relevance_scores,
            evidence_mask=evidence_mask,
            target_input_ids=target_input_ids,
            target_attention_mask=target_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = loss = None
        if output_logits or (output_logits is None and not (self.training and labels is not None)):
            logits = self.lm_head(outputs.last_hidden_state[:, positions])
        if labels is not None:
            num_tokens = target_attention_mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            loss = reconstruction_loss(outputs.last_hidden_state, labels, self.lm_head) / num_tokens
            if self.training:
                loss = self.config.reconstruction_loss_weight * loss
            share = target_attention_mask.sum() / num_tokens
            if outputs.distillation_loss is not None:
                loss = loss + self.config.distillation_loss_weight * outputs.distillation_loss * share
            if outputs.contrastive_loss is not None:
                loss = loss + self.config.contrastive_loss_weight * outputs.contrastive_loss * share
        fields = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return MargeLMOutput(loss=loss, logits=logits, **fields)

    def _contrast(
        self, input_ids, attention_mask, target_input_ids, target_attention_mask, evidence_mask, num_items_in_batch
    ) -> MargeLMOutput:
        """The contrastive loss alone, of nothing but the embeddings; arguments as in `MargeModel.forward`."""
        if input_ids is None or input_ids.dim() != 3:
            raise ValueError(
                "reconstruction_loss_weight=0 trains by the contrastive loss alone, which needs evidence as input_ids "
                f"(groups, num_evidence, length), but got {None if input_ids is None else tuple(input_ids.shape)}. "
                "DataCollatorForParaphrasing makes them."
            )
        if attention_mask is None:
            attention_mask = mask_of(input_ids, self.config.pad_token_id)
        attention_mask = attention_mask.reshape(input_ids.shape).bool()
        document = without_language_token(target_input_ids, target_attention_mask, self.config.bos_token_id)
        embeddings, document_embeddings = self.embed(*document), self.embed(input_ids, attention_mask)
        evidence_mask = visible_evidence(attention_mask, len(embeddings), evidence_mask)
        scores, contrast = self.model.compare(
            embeddings, document_embeddings, document, input_ids, attention_mask, evidence_mask, target_attention_mask
        )
        num_tokens = target_attention_mask.sum()
        share = num_tokens / (num_tokens.clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        return MargeLMOutput(
            loss=self.config.contrastive_loss_weight * contrast * share,
            relevance_scores=scores,
            contrastive_loss=contrast,
            document_embeddings=document_embeddings,
        )


class MargeForSequenceClassification(MargePreTrainedModel):
    """MARGE with a classifier on the decoder state of the last token; the input goes into encoder and decoder."""

    def __init__(self, config: MargeConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = MargeModel(config)
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqSequenceClassifierOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): One text, or pair of texts, an example.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*):
                1 for real tokens, 0 for padding; from `pad_token_id` if not given.
            labels (`torch.Tensor` of shape `(batch,)`, or `(batch, num_labels)` for several labels, *optional*):
                Class indices, values to regress (`num_labels` 1), or 0/1 for each label.
        """
        if attention_mask is None:
            attention_mask = mask_of(input_ids, self.config.pad_token_id)
        outputs: MargeModelOutput = self.model(
            input_ids,
            attention_mask=attention_mask,
            # Nothing is generated, so the decoder reads the text itself, not shifted (our choice).
            decoder_input_ids=input_ids,
            decoder_attention_mask=attention_mask,
            use_cache=False,
            **kwargs,
        )
        last = (attention_mask * torch.arange(input_ids.shape[1], device=input_ids.device)).argmax(-1)
        state = outputs.last_hidden_state[torch.arange(input_ids.shape[0], device=input_ids.device), last]
        logits = self.classifier(self.dropout(state))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        own = ("last_hidden_state", "document_embeddings", "relevance_scores", "distillation_loss", "contrastive_loss")
        fields = {name: value for name, value in outputs.items() if name not in own}
        return Seq2SeqSequenceClassifierOutput(loss=loss, logits=logits, **fields)


__all__ = ["MargeForConditionalGeneration", "MargeForSequenceClassification", "MargeModel", "MargePreTrainedModel"]
