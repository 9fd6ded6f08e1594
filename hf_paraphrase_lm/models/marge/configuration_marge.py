"""MARGE configuration."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN


@strict
class MargeConfig(PreTrainedConfig):
    r"""Configuration of a MARGE model; the defaults are the paper's size (962M parameters).

    Lewis et al., "Pre-training via Paraphrasing", 2020 (arXiv 2006.15020). Values marked "our choice" are not stated
    in the paper.

    Args:
        vocab_size (`int`, defaults to 250000): Tokens shared by encoder, decoder and output (about 250k in the paper).
        hidden_size (`int`, defaults to 1024): Width of every layer.
        encoder_layers (`int`, defaults to 12): Bidirectional layers that encode each evidence document alone.
        decoder_base_layers (`int`, defaults to 4):
            Decoder layers below the cross-attention: self-attention and feed-forward only.
        decoder_layers (`int`, defaults to 12): Decoder layers with cross-attention, on top of the base layers.
        num_attention_heads (`int`, defaults to 16): Heads of every attention (our choice).
        encoder_intermediate_size (`int`, defaults to 4096): Feed-forward width of the encoder.
        decoder_base_intermediate_size (`int`, defaults to 4096): Feed-forward width of the decoder base layers.
        decoder_intermediate_size (`int`, defaults to 16384): Feed-forward width of the layers with cross-attention.
        retrieval_layers (`int`, defaults to 4):
            The document embedding is the state of the first token after this many encoder layers.
        max_position_embeddings (`int`, defaults to 512): Longest evidence document and longest target, in tokens.
        hidden_act (`str`, defaults to `"gelu"`): Feed-forward activation (our choice).
        hidden_dropout_prob (`float`, defaults to 0.1): Dropout of embeddings and layer outputs (our choice).
        attention_probs_dropout_prob (`float`, defaults to 0.1): Dropout of attention weights (our choice).
        distillation_loss_weight (`float`, defaults to 0.0):
            Weight of KL(cross-attention || relevance), which teaches the relevance scores what the decoder reads.
            Not in the paper; known from marge-pytorch. 0 computes nothing.
        reconstruction_loss_weight (`float`, defaults to 1.0):
            Weight of the paper's loss in training. 0 trains the layers that embed documents by the contrastive loss
            alone and computes nothing else, which takes a fraction of the time: a beginning for languages that share no
            words, which reconstruction cannot learn from before it knows what is relevant. Not in the paper.
        contrastive_loss_weight (`float`, defaults to 0.0):
            Weight of [`contrastive_loss`](modeling_marge.py), which makes targets and evidence of one group more
            relevant to each other than to those of the other groups in the batch. Not in the paper: our choice, for
            small corpora, which reconstruction alone does not teach what is relevant. 0 computes nothing.
        contrastive_temperature (`float`, defaults to 0.05): Divisor of the relevance scores in that loss.
        initializer_range (`float`, defaults to 0.02): Standard deviation of initial weights (our choice).
        layer_norm_eps (`float`, defaults to 1e-5): Epsilon of every LayerNorm (our choice).
        classifier_dropout (`float`, *optional*): Dropout of the classification head; `hidden_dropout_prob` if `None`.
        bos_token_id, eos_token_id, pad_token_id (`int`, default to 0, 2 and 1):
            Tokens that a document starts and ends with, and padding: [CLS], [SEP] and [PAD] of `train_tokenizer`. What
            stands before `bos_token_id` in a target is a language token, see [`MargeForConditionalGeneration`].
        decoder_start_token_id (`int`, defaults to 2): What the decoder starts from.

    Raises:
        ValueError: If sizes contradict each other; the sentence names the field, its value and the bound.

    Example:

    ```python
    >>> from hf_paraphrase_lm import MargeConfig, MargeForConditionalGeneration

    >>> config = MargeConfig(vocab_size=1000, hidden_size=64, num_attention_heads=4, encoder_intermediate_size=128,
    ...     decoder_base_intermediate_size=128, decoder_intermediate_size=128, encoder_layers=4, decoder_base_layers=1,
    ...     decoder_layers=2, retrieval_layers=2)
    >>> model = MargeForConditionalGeneration(config)
    ```
    """

    model_type = "marge"
    keys_to_ignore_at_inference = [
        "past_key_values",
        "relevance_scores",
        "distillation_loss",
        "contrastive_loss",
        "encoder_last_hidden_state",
        "document_embeddings",
    ]
    attribute_map = {"num_hidden_layers": "encoder_layers"}

    vocab_size: int = 250_000
    hidden_size: int = 1024
    encoder_layers: int = 12
    decoder_base_layers: int = 4
    decoder_layers: int = 12
    num_attention_heads: int = 16
    encoder_intermediate_size: int = 4096
    decoder_base_intermediate_size: int = 4096
    # The 16536 printed in the paper is a typo: only 16384 gives its parameter count.
    decoder_intermediate_size: int = 16_384
    retrieval_layers: int = 4
    max_position_embeddings: int = 512
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    distillation_loss_weight: float | int = 0.0
    reconstruction_loss_weight: float | int = 1.0
    contrastive_loss_weight: float | int = 0.0
    contrastive_temperature: float | int = 0.05
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    classifier_dropout: float | int | None = None
    use_cache: bool = True
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 0
    pad_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    decoder_start_token_id: int | None = 2

    def validate_sizes(self):
        """Checks that the sizes fit each other (called at construction, save and load)."""
        positive = ["vocab_size", "hidden_size", "encoder_layers", "decoder_layers", "num_attention_heads"]
        positive += ["encoder_intermediate_size", "decoder_base_intermediate_size", "decoder_intermediate_size"]
        positive += ["max_position_embeddings"]
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but got {getattr(self, name)}.")
        if self.decoder_base_layers < 0:
            raise ValueError(f"decoder_base_layers must not be negative, but got {self.decoder_base_layers}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads ({self.num_attention_heads}), but got "
                f"{self.hidden_size}. Every head works on an equal part of the hidden state."
            )
        if not 1 <= self.retrieval_layers <= self.encoder_layers:
            raise ValueError(
                f"retrieval_layers must be between 1 and encoder_layers ({self.encoder_layers}), but got "
                f"{self.retrieval_layers}. The document embedding is read inside the encoder, so it cannot lie above "
                "its last layer."
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), but got {getattr(self, name)}.")
        for name in ("distillation_loss_weight", "reconstruction_loss_weight", "contrastive_loss_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, but got {getattr(self, name)}.")
        if self.reconstruction_loss_weight == self.contrastive_loss_weight == 0:
            raise ValueError(
                "reconstruction_loss_weight=0 trains by the contrastive loss alone, but contrastive_loss_weight is 0, "
                "too, so nothing would be trained. Set one of them."
            )
        if self.contrastive_temperature <= 0:
            raise ValueError(f"contrastive_temperature must be positive, but got {self.contrastive_temperature}.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act must be one of {sorted(ACT2FN)}, but got {self.hidden_act!r}.")

    def get_text_config(self, decoder=None, encoder=None):
        """The half of the configuration that `generate` and the caches ask for."""
        config = super().get_text_config(decoder=decoder, encoder=encoder)
        if decoder and not encoder:
            # A key-value cache has one entry a decoder layer, the base layers included.
            config.num_hidden_layers = self.decoder_base_layers + self.decoder_layers
        return config


__all__ = ["MargeConfig"]
