"""Trains networks of your own, here x-transformers encoders, under the objective of COCO-LM.

    python examples/any_network.py               # about a minute on two CPU cores, nothing is downloaded
    python examples/any_network.py --seed 1 --output runs/seed1

Any two encoders with one vocabulary can be the main and the auxiliary network. What each has to be show the two small
classes below: a configuration from which a network can be made again, and a model that maps input_ids and
attention_mask to last_hidden_state. Registered with the Auto classes, both networks are saved and loaded as one
checkpoint, and the main one is exported as a checkpoint of its own class.

The text is the documentation of the Python that runs this script, read as bytes. The losses in the table are on a tenth
of the documents, held out of training. Those in the column "trained" are the reloaded checkpoint's.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.modeling_outputs import BaseModelOutput
from x_transformers import Encoder

from hf_paraphrase_lm import CocoLMForPretraining, LogComponentLossesCallback
from hf_paraphrase_lm.data import DataCollatorForCorrectiveLM, chunk_documents, load_python_docs, train_tokenizer
from hf_paraphrase_lm.training import corrective_lm_metrics

MAX_LENGTH = 64
# Fewest tokens that train_tokenizer makes: bytes.
BYTES = 261


class XTransformersConfig(PreTrainedConfig):
    model_type = "x_transformers"

    vocab_size: int = BYTES
    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    # 0.02 suits a width of 1024; narrower networks need larger weights.
    initializer_range: float = 0.06
    pad_token_id: int | None = 1


class XTransformersModel(PreTrainedModel):
    """Embeddings and an x-transformers encoder: pre-norm layers with rotary positions."""

    config_class = XTransformersConfig

    def __init__(self, config: XTransformersConfig):
        super().__init__(config)
        self.embed_tokens = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        layers = {"depth": config.num_hidden_layers, "heads": heads, "attn_dim_head": width}
        self.encoder = Encoder(dim=config.hidden_size, **layers, rotary_pos_emb=True, rotary_emb_dim=width)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **kwargs):
        mask = None if attention_mask is None else attention_mask.bool()
        return BaseModelOutput(last_hidden_state=self.encoder(self.embed_tokens(input_ids), mask=mask))


AutoConfig.register(XTransformersConfig.model_type, XTransformersConfig)
AutoModel.register(XTransformersConfig, XTransformersModel)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/any_network"), help="folder for the checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, of masks and of the order of the data")
    parser.add_argument("--steps", type=int, default=300, help="updates")
    parser.add_argument("--documents", type=int, help="how many to use; all by default")
    args = parser.parse_args()

    began = time.perf_counter()
    torch.manual_seed(args.seed)
    texts = load_python_docs(args.documents)
    tokenizer = train_tokenizer(texts, vocab_size=BYTES, model_max_length=MAX_LENGTH)
    parts = texts.train_test_split(0.1, seed=0)
    train, held_out = (chunk_documents(parts[name], tokenizer, MAX_LENGTH) for name in ("train", "test"))
    held_out = held_out.shuffle(seed=0).take(1000)
    collator = DataCollatorForCorrectiveLM(tokenizer)

    main_network = XTransformersModel(XTransformersConfig())
    auxiliary = XTransformersModel(XTransformersConfig(num_hidden_layers=1))
    # As in COCO-LM; they would be the main network's in any case.
    auxiliary.set_input_embeddings(main_network.get_input_embeddings())
    model = CocoLMForPretraining.from_encoders(main_network, auxiliary, auxiliary_sampling="zero_dropout")
    before = corrective_lm_metrics(model, held_out, collator, progress=False)
    arguments = TrainingArguments(
        output_dir=str(args.output),
        seed=args.seed,
        max_steps=args.steps,
        per_device_train_batch_size=16,
        learning_rate=2e-3,
        warmup_steps=0.1,
        logging_steps=50,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    Trainer(model, arguments, collator, train, callbacks=[LogComponentLossesCallback()]).train()
    for network, folder in ((model, args.output), (model.base_model, args.output / "main")):
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    trained = CocoLMForPretraining.from_pretrained(args.output)
    after = corrective_lm_metrics(trained, held_out, collator, progress=False)
    encoder = AutoModel.from_pretrained(args.output / "main")
    print(f"\n{'held-out documents, losses in nats':<36}{'untrained':>11}{'trained':>11}\n{'-' * 58}")
    for name in ("mlm_loss", "copy_loss", "corrective_lm_loss", "contrastive_loss"):
        print(f"{name:<36}{before[name]:>11.4f}{after[name]:>11.4f}")
    print(f"\nDone in {time.perf_counter() - began:.0f} s. Saved:")
    for folder, network in ((args.output, trained), (args.output / "main", encoder)):
        print(f"  {folder}: {type(network).__name__}, {network.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
