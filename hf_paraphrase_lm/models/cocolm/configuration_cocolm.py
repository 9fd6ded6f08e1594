"""COCO-LM configuration."""

import copy
import difflib
from dataclasses import fields

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Our choice: from this similarity on (difflib's ratio) an unknown key is a misspelt field. One wrong letter in the
# shortest field gives 0.9. The keys that the authors' code writes are below; some fields of other families are above
# (`layer_norm_epsilon`) and refused too: their values would not be read.
MISSPELT = 0.87


@strict
class CocoLMConfig(PreTrainedConfig):
    r"""Configuration of a COCO-LM model; the defaults are the size of `microsoft/cocolm-base` (134.6M parameters).

    Meng et al., "COCO-LM: Correcting and Contrasting Text Sequences for Language Model Pretraining", 2021 (arXiv
    2102.08473). The `config.json` of the released checkpoints is read as it is; the fields that it lacks have the
    authors' values as defaults.

    Args:
        vocab_size (`int`, defaults to 64000): Tokens shared by input, auxiliary and corrective language model.
        hidden_size (`int`, defaults to 768): Width of every layer, of the auxiliary network too.
        num_hidden_layers (`int`, defaults to 12): Layers of the main network.
        num_attention_heads (`int`, defaults to 12): Heads of every attention.
        intermediate_size (`int`, defaults to 3072): Feed-forward width.
        hidden_act (`str`, defaults to `"gelu"`): Activation of the feed-forward layers and pre-training heads.
        hidden_dropout_prob (`float`, defaults to 0.1): Dropout of embeddings and layer outputs.
        attention_probs_dropout_prob (`float`, defaults to 0.1): Dropout of attention weights.
        cls_dropout_prob (`float`, defaults to 0.1): Dropout in the heads for fine-tuning.
        max_position_embeddings (`int`, defaults to 512):
            Longest sequence, in tokens. It also shifts the relative buckets when it is below the largest distance that
            they tell apart, so a checkpoint keeps its own value.
        type_vocab_size (`int`, defaults to 0): Must be 0: COCO-LM has no token types.
        rel_pos_bins (`int`, defaults to 64):
            Buckets of the relative position bias: even and at least 4, or 0 for none (ablated in the paper).
        max_rel_pos (`int`, defaults to 128): Distance, in tokens, from which all pairs share the outermost bucket.
        layer_norm_type (`str`, defaults to `"post"`): Must be `"post"`: LayerNorm after each residual sum.
        layer_norm_eps (`float`, defaults to 1e-5): Epsilon of every LayerNorm.
        initializer_range (`float`, defaults to 0.02): Standard deviation of initial weights.
        auxiliary_layers (`int`, defaults to 4):
            Layers of the auxiliary network that corrupts the text: 4 for base and base++, 6 for large++.
        copy_loss_weight (`float`, defaults to 50): Weight of the copy loss (replaced-token detection).
        contrastive_loss_weight (`float`, defaults to 1):
            Weight of the sequence contrastive loss. 0 does not encode the cropped sequence at all.
        contrastive_temperature (`float`, defaults to 1): Divisor of the cosines in the contrastive loss.
        contrastive_embedding_size (`int`, *optional*):
            Width of the embedding that is contrasted; `hidden_size` if `None`. The authors' trainer defaults to 768 for
            every size.
        corrective_lm_form (`str`, defaults to `"released"`):
            `"released"`: cross entropy weighted with the probability that a token was replaced (the authors' code);
            `"paper"`: likelihood of the mixture of copying and language model (the equation of the paper).
        auxiliary_sampling (`str`, defaults to `"eval"`):
            Logits that replacements are sampled from in training. `"eval"`: a second pass without dropout; `"train"`:
            those of the loss; `"zero_dropout"`: those of the loss, the auxiliary network having no dropout.
        discriminator_objective (`str`, defaults to `"corrective_lm"`):
            What the main network learns besides the contrast of sequences. `"corrective_lm"`: to tell replaced tokens
            and to restore the original ones; `"replaced_token_detection"`: only to tell them, as in ELECTRA (Clark et
            al. 2020); `"masked_lm"`: to fill the masks itself, without an auxiliary network.
        main_config (`PreTrainedConfig`, *optional*):
            The main network, if it is one of its own; see [`CocoLMForPretraining.from_encoders`]. Sizes,
            `initializer_range` and special tokens are then read from it, which one line of the log says where it
            replaces a value other than the default; the fields above that describe the encoder have no effect.
        auxiliary_config (`PreTrainedConfig`, *optional*): The auxiliary network beside such a main one.
        tie_word_embeddings (`bool`, defaults to `True`):
            Must be true: the language model heads and the auxiliary network share the main network's embeddings.

    A key that is no field stays an attribute, as in every configuration, and is saved; one line of the log names it.

    Raises:
        ValueError: If a key resembles a field so much that it is a misspelling.
        huggingface_hub.errors.StrictDataclassError:
            If a value has a wrong type, is out of bounds or contradicts another one; the sentence names the field, its
            value and the bound.

    Example:

    ```python
    >>> from hf_paraphrase_lm import CocoLMConfig, CocoLMForPretraining

    >>> config = CocoLMConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
    ...     intermediate_size=128, auxiliary_layers=2)
    >>> model = CocoLMForPretraining(config)
    ```
    """

    model_type = "cocolm"
    sub_configs = {"main_config": AutoConfig, "auxiliary_config": AutoConfig}

    vocab_size: int = 64_000
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    cls_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 0
    rel_pos_bins: int = 64
    max_rel_pos: int = 128
    layer_norm_type: str = "post"
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    auxiliary_layers: int = 4
    copy_loss_weight: float | int = 50
    contrastive_loss_weight: float | int = 1
    contrastive_temperature: float | int = 1
    contrastive_embedding_size: int | None = None
    corrective_lm_form: str = "released"
    auxiliary_sampling: str = "eval"
    discriminator_objective: str = "corrective_lm"
    main_config: dict | PreTrainedConfig | None = None
    auxiliary_config: dict | PreTrainedConfig | None = None
    tie_word_embeddings: bool = True
    # The ids of the released vocabulary, which its config.json does not tell.
    bos_token_id: int | None = 0
    pad_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs):
        for name in self.sub_configs:
            if isinstance(encoder := getattr(self, name), dict):
                if "model_type" not in encoder:
                    raise ValueError(
                        f"{name} must have a model_type, which says of what family the encoder is, but has only the "
                        f"keys {sorted(encoder)}. Take it from the encoder's config.json."
                    )
                # Ours is not registered where this file is the code of a checkpoint.
                is_own = encoder["model_type"] == self.model_type
                setattr(self, name, type(self)(**encoder) if is_own else AutoConfig.for_model(**encoder))
        super().__post_init__(**kwargs)
        self._check_keys(kwargs)
        if (self.main_config is None) != (self.auxiliary_config is None):
            raise ValueError("main_config and auxiliary_config go together, but only one of them was given.")
        if self.main_config is not None:
            self.set_encoders(self.main_config, self.auxiliary_config)

    def _check_keys(self, kwargs: dict):
        """Refuses misspelt fields; tells of other keys that transformers did not understand, but kept as attributes."""
        known = ("auto_map", "quantization_config", *dir(type(self)))
        unknown = [key for key in kwargs if key in vars(self) and key not in known and not key.startswith("_")]
        inherited = {field.name for field in fields(PreTrainedConfig)}
        names = [field.name for field in fields(self) if field.name not in inherited] + ["num_labels"]
        for key in unknown:
            written = key.lower().replace("-", "_")
            if closest := difflib.get_close_matches(written, names, n=1, cutoff=MISSPELT):
                raise ValueError(
                    f"{type(self).__name__} has no field {key!r}, but has {closest[0]!r}. Correct the spelling, in "
                    "config.json if it stands there."
                )
        if unknown:
            logger.warning_once(
                f"{type(self).__name__} does not know {', '.join(map(repr, unknown))}: kept, but not read by any model "
                "of this package."
            )

    def set_encoders(self, main: PreTrainedConfig, auxiliary: PreTrainedConfig):
        """Makes these the encoders instead of COCO-LM's own, and takes over the main one's sizes and special tokens.

        Raises:
            huggingface_hub.errors.StrictDataclassError: If such a value cannot be saved.
        """
        self.main_config, self.auxiliary_config = copy.deepcopy(main), copy.deepcopy(auxiliary)
        taken = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"]
        taken += ["initializer_range", "pad_token_id", "bos_token_id", "eos_token_id"]
        replaced = []
        for name in taken:
            own, value = getattr(self, name), getattr(main, name, getattr(self, name))
            # XLNet has no longest sequence.
            if name == "max_position_embeddings" and (value is None or value < 1):
                continue
            if own not in (value, getattr(type(self), name)):
                replaced.append(f"{name} {own} by {value}")
            setattr(self, name, value)
        if replaced:
            logger.warning(f"The main encoder's configuration replaces {', '.join(replaced)}.")
        self.validate()

    def validate_sizes(self):
        """Checks that the sizes fit each other (called at construction, save and load)."""
        positive = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
        positive += ["max_position_embeddings", "auxiliary_layers"]
        if self.contrastive_embedding_size is not None:
            positive.append("contrastive_embedding_size")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but got {getattr(self, name)}.")
        # Other encoders check their own.
        if self.main_config is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads ({self.num_attention_heads}), but got "
                f"{self.hidden_size}. Every head works on an equal part of the hidden state."
            )
        if self.rel_pos_bins != 0 and (self.rel_pos_bins < 4 or self.rel_pos_bins % 2):
            raise ValueError(
                f"rel_pos_bins must be 0 (no relative bias) or an even number from 4 on, but got {self.rel_pos_bins}. "
                "Half of the buckets serve each direction."
            )
        if self.rel_pos_bins and self.max_rel_pos < self.rel_pos_bins // 4 + 2:
            raise ValueError(
                f"max_rel_pos must be at least rel_pos_bins // 4 + 2 ({self.rel_pos_bins // 4 + 2}), but got "
                f"{self.max_rel_pos}. Distances below rel_pos_bins // 4 have a bucket each, and the others are spread "
                "over the range from there to max_rel_pos."
            )

    def validate_training(self):
        """Checks the dropouts, loss weights and choices (called at construction, save and load)."""
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "cls_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), but got {getattr(self, name)}.")
        for name in ("copy_loss_weight", "contrastive_loss_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, but got {getattr(self, name)}.")
        for name in ("contrastive_temperature", "layer_norm_eps", "initializer_range"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, but got {getattr(self, name)}.")
        choices = {
            "corrective_lm_form": ("released", "paper"),
            "auxiliary_sampling": ("eval", "train", "zero_dropout"),
            "discriminator_objective": ("corrective_lm", "replaced_token_detection", "masked_lm"),
            "hidden_act": tuple(sorted(ACT2FN)),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, but got {getattr(self, name)!r}.")

    def validate_fixed(self):
        """Checks the fields that have one value in COCO-LM (called at construction, save and load)."""
        if self.type_vocab_size != 0:
            raise ValueError(
                f"type_vocab_size must be 0, but got {self.type_vocab_size}. COCO-LM has no token types: the two texts "
                "of a pair are told apart by the separators between them."
            )
        if self.layer_norm_type != "post":
            raise ValueError(
                f"layer_norm_type must be 'post', but got {self.layer_norm_type!r}. No COCO-LM checkpoint was released "
                "with another order of layers."
            )
        if not self.tie_word_embeddings:
            raise ValueError(
                "tie_word_embeddings must be true, but got False. The language model heads and the auxiliary network "
                "of COCO-LM share the embeddings of the main network."
            )


__all__ = ["CocoLMConfig"]
