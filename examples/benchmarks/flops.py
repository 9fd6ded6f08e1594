"""FLOPs of the matrix products that each model has to do for real tokens: 2 for a multiplication with its addition.

Padding, norms, softmax, activations and optimizer are not counted, nor is what a model computes without need. An
update has three times the products of its forward pass: in the backward pass each product has two, one for the
gradient of either factor.

n, h, f and V are the length of a text, the width of layers and feed-forward, and the size of the vocabulary.
"""

from hf_paraphrase_lm import CocoLMConfig, MargeConfig

UPDATE = 3


def layer(n: int, h: int, f: int, is_causal: bool = False) -> float:
    """Self-attention and feed-forward: 2 n (4 h^2 + 2 h f) + 4 n^2 h, of the latter half if causal."""
    return 2 * n * (4 * h**2 + 2 * h * f) + 4 * n**2 * h / (2 if is_causal else 1)


def embedding(config: MargeConfig, n: int) -> float:
    """g of a document: the retrieval layers, of the last one what its first token needs, without keys and values.

    (R - 1) layer(n) + 2 (4 h^2 + 2 h f) + 4 n H h, where H heads read the states
    """
    h, f = config.hidden_size, config.encoder_intermediate_size
    first_token = 2 * (4 * h**2 + 2 * h * f) + 4 * n * config.num_attention_heads * h
    return (config.retrieval_layers - 1) * layer(n, h, f) + first_token


def marge(config: MargeConfig, targets: list[int], evidence: list[int]) -> float:
    """A group: evidence of the lengths z_j is encoded; targets of the lengths x_i are embedded and decoded.

        sum_j encoder(z_j) + sum_i [ g(x_i) + decoder(x_i) + 2 x_i h V + D (4 x_i h^2 + 4 x_i Z h) ] + D 4 Z h^2

    Z is the sum of all z_j, and D the number of layers that read evidence: each projects queries and outputs of the
    targets, keys and values of the evidence.
    """
    h, read = config.hidden_size, sum(evidence)
    flops = config.decoder_layers * 4 * read * h**2
    for n in evidence:
        flops += config.encoder_layers * layer(n, h, config.encoder_intermediate_size)
    for n in targets:
        base = layer(n, h, config.decoder_base_intermediate_size, is_causal=True)
        upper = layer(n, h, config.decoder_intermediate_size, is_causal=True) + 4 * n * h**2 + 4 * n * read * h
        flops += embedding(config, n) + config.decoder_base_layers * base + config.decoder_layers * upper
        flops += 2 * n * h * config.vocab_size
    return flops


def cocolm(config: CocoLMConfig, n: int, corrects: bool = True) -> float:
    """A text: the auxiliary network's A layers, the main one's M layers for the text and for the crop of 0.9 n.

        (A + M) layer(n) + M layer(0.9 n) + 2 (0.15 n) (h^2 + h V) + 2 (0.15 n) h V + 4 h^2

    The last terms are the heads: of the auxiliary network and of the corrective language model at the masked tokens,
    and that of the contrast for both views. Without them and the h^2 before (`corrects=False`) it is coco-lm-pytorch,
    which only detects.
    """
    h, f, masked = config.hidden_size, config.intermediate_size, 0.15 * n
    flops = (config.auxiliary_layers + config.num_hidden_layers) * layer(n, h, f)
    flops += config.num_hidden_layers * layer(0.9 * n, h, f) + 2 * masked * h * config.vocab_size
    return flops + (2 * masked * (h**2 + h * config.vocab_size) + 4 * h**2 if corrects else 0)


def electra(config: CocoLMConfig, n: int) -> float:
    """A text through an encoder as large as the main network, with ELECTRA's head: M layer(n) + 2 n h^2."""
    h = config.hidden_size
    return config.num_hidden_layers * layer(n, h, config.intermediate_size) + 2 * n * h**2
