"""The packages that MARGE and COCO-LM were known by before this one, at the size of our models, as they run today.

marge-pytorch 0.2.9 and coco-lm-pytorch 0.0.2 are imported as they are; this is all that is changed, in this process:

- marge-pytorch moves everything to a GPU. On a CPU, `.cuda()` of tensors and modules returns what it is called on, and
  where faiss sees no GPU, its index stays on the CPU.
- marge-pytorch leaves the token 0 out of its loss, as padding. It is told which token is padding here.
- To measure speed and memory, the output matrix of marge-pytorch is its token embedding, as in the paper and in ours.
  Otherwise it is a matrix of its own, with which the number of parameters would differ by a fifth; the products to be
  computed are the same. To measure what it learns, it keeps its own: its embeddings are too large for logits at first.
- coco-lm-pytorch takes the same number of tokens from each text as a crop, and stops with an error where a text has
  padding, or where that number is rounded otherwise in two places. Its crop is filled up with padding, and with
  further tokens where that is not enough.
- coco-lm-pytorch makes its [CLS] on the default device, which is set to that of the model.

x-transformers has no layer `norm` any more, which the README of coco-lm-pytorch reads the states from. Here the main
network returns its states (`return_only_embed`), so that it does not compute logits which nobody needs.
"""

from pathlib import Path

import numpy as np
import torch

from hf_paraphrase_lm import CocoLMConfig, MargeConfig, MargeForConditionalGeneration
from measuring import num_parameters

CROP = 0.9
# Layers of marge-pytorch's decoder without cross-attention, which it has no argument for.
BASE_LAYERS = 4


def import_marge_pytorch(device: str):
    import faiss

    if faiss.get_num_gpus() == 0:
        faiss.index_cpu_to_all_gpus = lambda index, *args, **kwargs: index
    if device == "cpu":
        torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    import marge_pytorch

    return marge_pytorch


def make_marge(config: MargeConfig, max_length: int, device: str, is_tied: bool = True) -> torch.nn.Module:
    """A Marge of marge-pytorch with the layers of the configuration, and about its number of parameters.

    Its feed-forward layers are GEGLUs, which have three matrices of the width k h, k a whole number. In the encoder k
    is the nearest that there is, and in the decoder that with which the whole comes nearest. Without `is_tied` the
    output matrix is its own, as in the package, and comes on top.
    """
    marge_pytorch, h = import_marge_pytorch(device), config.hidden_size
    decoder_layers = max(BASE_LAYERS + 1, config.decoder_base_layers + config.decoder_layers)
    settings = {
        "num_tokens": config.vocab_size,
        "max_seq_len": max_length,
        "enc_depth": max(config.encoder_layers, config.retrieval_layers + 1),
        "enc_retrieval_depth": config.retrieval_layers,
        "dec_depth": decoder_layers,
        # k is two thirds of this argument, rounded down.
        "enc_ff_mult": 1.5 * max(1, round(2 * config.encoder_intermediate_size / (3 * h))),
    }

    def make(k: int, is_tied: bool = True) -> torch.nn.Module:
        model = marge_pytorch.Marge(h, dec_ff_mult=1.5 * k, **settings)
        if is_tied:
            model.decoder.net.to_logits.weight = model.encoder.token_emb.weight
        return model

    with torch.device("meta"):
        wanted, smallest, second = marge_parameters(config), *(num_parameters(make(k)) for k in (1, 2))
    model = make(max(1, 1 + round((wanted - smallest) / (second - smallest))), is_tied)
    model.decoder.ignore_index = model.decoder.pad_value = config.pad_token_id
    return model.to(device)


def write_rows(file: Path, documents: list[list[int]], length: int, pad_token_id: int) -> np.memmap:
    """Token ids as marge-pytorch reads them: a memory map of int32 `(documents, length)`, padded on the right."""
    rows = np.memmap(file, np.int32, mode="w+", shape=(len(documents), length))
    rows[:] = pad_token_id
    for row, ids in zip(rows, documents, strict=True):
        row[: len(ids)] = ids
    rows.flush()
    return rows


def marge_parameters(config: MargeConfig) -> int:
    """Of our model."""
    with torch.device("meta"):
        return num_parameters(MargeForConditionalGeneration(config))


def make_coco(config: CocoLMConfig, mask_token_id: int, attention: str, device: str) -> torch.nn.Module:
    """A COCO of coco-lm-pytorch with two encoders of x-transformers, of the layers of the configuration."""
    from coco_lm_pytorch import coco_lm_pytorch
    from x_transformers import Encoder, TransformerWrapper

    h, heads = config.hidden_size, config.num_attention_heads
    subset = coco_lm_pytorch.get_mask_subset_with_prob

    def subset_of_one_size(mask: torch.Tensor, share: float) -> torch.Tensor:
        chosen = subset(mask, share)
        if share != CROP:
            return chosen
        # The chosen tokens first, then padding, then other tokens; [CLS], the first one, is put in front again.
        preference = 2 * chosen.long() + (~mask).long()
        preference[:, 0] = -1
        taken = preference.topk(int(mask.shape[1] * share)).indices
        return torch.zeros_like(mask).scatter(1, taken, True)

    coco_lm_pytorch.get_mask_subset_with_prob = subset_of_one_size

    def network(depth: int, **settings) -> torch.nn.Module:
        layers = {"attn_dim_head": h // heads, "ff_mult": config.intermediate_size / h}
        layers = Encoder(dim=h, depth=depth, heads=heads, attn_flash=attention == "sdpa", **layers)
        positions = config.max_position_embeddings
        return TransformerWrapper(num_tokens=config.vocab_size, max_seq_len=positions, attn_layers=layers, **settings)

    main, auxiliary = (
        network(config.num_hidden_layers, return_only_embed=True),
        network(config.auxiliary_layers, tie_embedding=True),
    )
    auxiliary.token_emb, auxiliary.pos_emb = main.token_emb, main.pos_emb
    tokens = {"pad_token_id": config.pad_token_id, "cls_token_id": config.bos_token_id, "mask_token_id": mask_token_id}
    return coco_lm_pytorch.COCO(auxiliary, main, discr_dim=h, crop_percentage=CROP, **tokens).to(device)
