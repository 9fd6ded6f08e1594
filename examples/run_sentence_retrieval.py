"""Finds translations among sentences with an encoder that was not fine-tuned for it: the Tatoeba and BUCC protocols.

    python examples/run_sentence_retrieval.py --model_name_or_path runs/marge --protocol tatoeba \
        --test_file tatoeba.parquet --source_column text --target_column en --language_column lang \
        --development_languages deu jpn --output_dir runs/tatoeba

    python examples/run_sentence_retrieval.py --model_name_or_path runs/marge --protocol bucc \
        --validation_file bucc_dev.tsv --test_file bucc_test.tsv --output_dir runs/bucc

A sentence is the mean of the hidden states of its tokens after one layer of the encoder, padding excluded, of length 1;
or with --representation embed what `model.embed` gives, such as MARGE's document embedding. Any model of AutoModel will
do, of an encoder-decoder its encoder. Of several layers, the best on development data is used: on --validation_file, or
on some languages of the test data, which then do not count in the mean.

A row of the data is a sentence with its translation, of one language pair or, with --language_column, of several, each
searched by itself. In BUCC a row may lack one of the two: a sentence without translation, as most are there.

tatoeba (Artetxe and Schwenk 2019, arXiv 1812.10464): accuracy of the nearest neighbor both ways, by cosine and by
margin. bucc (Zweigenbaum et al. 2018): which sentences translate each other; precision, recall and F1. Candidates are
scored by margin, and those above a threshold are taken that was tuned on the development data of the same language.

Margin (Artetxe and Schwenk 2019, arXiv 1811.01136, section 3): cos(x, y) divided by the mean of two averages, of the
cosines of x and of y to their k nearest neighbors on the other side. Candidates are among those neighbors. In BUCC they
come from both directions, the highest margin first, and no sentence is taken twice.

--output_dir gets `results.json`, and the table is printed.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import faiss
import numpy as np
import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from classification_data import check_columns
from hf_paraphrase_lm.retrieval import embed_documents
from runs import DataArguments, ModelArguments, load_splits, parse_arguments

BY = ("cosine", "margin")
WAYS = ("source_to_target", "target_to_source")


@dataclass
class RetrievalArguments(DataArguments):
    """The sentences, what stands for them, and the protocol."""

    protocol: Literal["tatoeba", "bucc"] = field(default="tatoeba", metadata={"help": "see the top of the file"})
    source_column: str = field(default="source", metadata={"help": "the column of sentences"})
    target_column: str = field(default="target", metadata={"help": "the column of their translations"})
    language_column: str | None = field(default=None, metadata={"help": "the column that names a row's language pair"})
    development_languages: list[str] = field(
        default_factory=list, metadata={"help": "languages of the test data that serve as development data"}
    )
    representation: Literal["mean", "embed"] = field(
        default="mean", metadata={"help": "mean of a layer, or model.embed"}
    )
    layers: list[int] = field(
        default_factory=list,
        metadata={"help": "layers to choose from, 0 the token embeddings; by default 1 to the last"},
    )
    num_neighbors: int = field(default=4, metadata={"help": "neighbors of each sentence in the margin: k"})
    max_length: int = field(default=512, metadata={"help": "tokens in the longest sentence; longer ones are cut"})
    batch_size: int = field(default=64, metadata={"help": "sentences in a batch"})
    output_dir: str = field(default="runs/sentence_retrieval", metadata={"help": "folder of the results"})
    use_cpu: bool = field(default=False, metadata={"help": "do not use a GPU"})
    disable_tqdm: bool = field(default=False, metadata={"help": "no progress bar"})

    def __post_init__(self):
        for name in ("num_neighbors", "max_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, but got {getattr(self, name)}.")


class Sentences(nn.Module):
    """Embeds sentences by several layers at once: their vectors side by side, together of length 1."""

    def __init__(self, model: PreTrainedModel, layers: list[int], representation: str):
        super().__init__()
        self.model, self.layers, self.representation = model, layers, representation
        self.encoder = model.get_encoder() if model.config.is_encoder_decoder else model

    def embed(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """int64 `(n, length)` -> float32 `(n, layers * hidden_size)`."""
        if self.representation == "embed":
            return F.normalize(self.model.embed(input_ids, attention_mask).float(), dim=-1)
        states = self.encoder(input_ids, attention_mask=attention_mask, output_hidden_states=True).hidden_states
        mask = attention_mask[:, :, None].float()
        means = [(states[layer].float() * mask).sum(1) / mask.sum(1) for layer in self.layers]
        return torch.cat([F.normalize(mean, dim=-1) for mean in means], dim=-1) / len(self.layers) ** 0.5


def embed_sentences(
    sentences: list[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: list[int],
    data: RetrievalArguments,
    bar: tqdm,
) -> np.ndarray:
    """float32 `(layers, sentences, hidden_size)`, rows of length 1."""
    limit = min(data.max_length, tokenizer.model_max_length)
    limit = min(limit, getattr(model.config, "max_position_embeddings", None) or limit)
    ids = tokenizer(sentences, truncation=True, max_length=limit, return_attention_mask=False)["input_ids"]
    vectors = embed_documents(
        Dataset.from_dict({"input_ids": ids}),
        Sentences(model, layers, data.representation),
        tokenizer.pad_token_id,
        data.batch_size,
        progress=bar,
    )
    vectors = vectors.reshape(len(ids), len(layers), -1).transpose(1, 0, 2) * len(layers) ** 0.5
    return np.ascontiguousarray(vectors, dtype=np.float32)


def search(queries: np.ndarray, keys: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact: float32 cosines and int64 indices, `(queries, k)`, of the k nearest keys, or of all if there are fewer."""
    index = faiss.IndexFlatIP(keys.shape[1])
    index.add(keys)
    return index.search(queries, min(k, len(keys)))


def margins(source: np.ndarray, target: np.ndarray, k: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Cosines, margins (float32) and indices of the k nearest neighbors: of the sources, and of the targets.

    The cosines of a sentence to its neighbors are averaged over k, or over as many as there are.
    """
    found = [search(source, target, k), search(target, source, k)]
    # In float64: an average of 0 is then only that of opposite neighbors.
    means = [cosines.astype(np.float64).mean(1) for cosines, _ in found]
    result = []
    for (cosines, indices), own, other in zip(found, means, means[::-1], strict=True):
        density = (own[:, None] + other[indices]) / 2
        result.append((cosines, cosines / density, indices))
    return result


def accuracies(source: np.ndarray, target: np.ndarray, k: int) -> dict[str, float]:
    """Share of rows whose translation, the same row of the other side, is their neighbor: both ways, in percent."""
    result = {}
    for way, (cosines, scores, indices) in zip(WAYS, margins(source, target, k), strict=True):
        for by, values in zip(BY, (cosines, scores), strict=True):
            nearest = indices[np.arange(len(indices)), values.argmax(1)]
            result[f"{way}_{by}"] = 100 * int((nearest == np.arange(len(nearest))).sum()) / len(nearest)
    for by in BY:
        result[f"mean_{by}"] = float(np.mean([result[f"{way}_{by}"] for way in WAYS]))
    return result


def mine(source: np.ndarray, target: np.ndarray, k: int) -> list[tuple[float, int, int]]:
    """Candidates: margin, source and target, the highest first; each sentence is in one of them at most."""
    (_, forward, targets), (_, backward, sources) = margins(source, target, k)
    best, pairs = forward.argmax(1), {}
    for i, column in enumerate(best):
        pairs[i, int(targets[i, column])] = float(forward[i, column])
    for j, column in enumerate(backward.argmax(1)):
        pairs.setdefault((int(sources[j, column]), j), float(backward[j, column]))
    candidates, used = [], (set(), set())
    for (i, j), score in sorted(pairs.items(), key=lambda item: (-item[1], item[0])):
        if i not in used[0] and j not in used[1]:
            used[0].add(i)
            used[1].add(j)
            candidates.append((score, i, j))
    return candidates


def scores_of(num_right: int, num_taken: int, num_gold: int) -> dict[str, float]:
    """Precision, recall and F1, in percent; 0 where nothing is taken."""
    return {
        "precision": 100 * num_right / max(num_taken, 1),
        "recall": 100 * num_right / num_gold,
        "f1": 200 * num_right / (num_taken + num_gold),
    }


def best_threshold(candidates: list[tuple[float, int, int]], gold: set[tuple[int, int]]) -> tuple[float, float]:
    """The threshold with the highest F1, half-way to the next candidate, and this F1; above all if none is right."""
    best, right = (float(np.nextafter(candidates[0][0], np.inf)), 0.0), 0
    for rank, (score, *pair) in enumerate(candidates, start=1):
        right += tuple(pair) in gold
        following = candidates[rank][0] if rank < len(candidates) else score
        # Candidates with the same score are taken together.
        if (rank == len(candidates) or following < score) and scores_of(right, rank, len(gold))["f1"] > best[1]:
            best = ((score + following) / 2, scores_of(right, rank, len(gold))["f1"])
    return best


def read_pairs(rows: Dataset, split: str, data: RetrievalArguments) -> dict[str, tuple[list, list]]:
    """The sentences of each language, row by row; in BUCC None where there is none.

    Raises:
        ValueError: a column is missing, or a row lacks a sentence that it must have.
    """
    columns = [data.source_column, data.target_column]
    check_columns(rows, split, columns + [data.language_column] * (data.language_column is not None))
    languages = rows[data.language_column][:] if data.language_column else ["all"] * len(rows)
    groups = {}
    for row, (language, *pair) in enumerate(zip(languages, *(rows[column] for column in columns), strict=True)):
        pair = [sentence if isinstance(sentence, str) and sentence.strip() else None for sentence in pair]
        if pair.count(None) > (data.protocol == "bucc"):
            has = "at least one sentence" if data.protocol == "bucc" else "a sentence and its translation"
            raise ValueError(f"Row {row} of the {split} data must have {has}, but has {pair}.")
        for side, sentence in zip(groups.setdefault(str(language), ([], [])), pair, strict=True):
            side.append(sentence)
    return groups


def gold_pairs(pairs: tuple[list, list]) -> tuple[list[str], list[str], set[tuple[int, int]]]:
    """The distinct sentences of both sides, sorted, and which of them are translations.

    Sorted, because the order of the rows would tell which belong together.
    """
    sides = [sorted({sentence for sentence in side if sentence is not None}) for side in pairs]
    places = [{sentence: i for i, sentence in enumerate(side)} for side in sides]
    gold = {(places[0][a], places[1][b]) for a, b in zip(*pairs, strict=True) if a is not None and b is not None}
    return *sides, gold


def choose_layers(data: RetrievalArguments, model: PreTrainedModel) -> list[int]:
    """The layers to choose from; the one entry -1 stands for `model.embed`.

    Raises:
        ValueError: the model has no such layer, or no `embed`.
    """
    if data.representation == "embed":
        if not callable(getattr(model, "embed", None)):
            raise ValueError(
                f"--representation embed needs a model with a method embed, but got {type(model).__name__}."
            )
        return [-1]
    last = model.config.num_hidden_layers
    for layer in data.layers:
        if not 0 <= layer <= last:
            raise ValueError(f"--layers must be between 0 and {last}, the layers of the encoder, but got {layer}.")
    return list(dict.fromkeys(data.layers)) or list(range(1, last + 1))


def split_development(data: RetrievalArguments, groups: dict[str, dict]) -> tuple[dict, dict]:
    """The languages of the development data, and those of the test data.

    Raises:
        ValueError: a language is missing, or development data is given twice.
    """
    test, development = dict(groups["test"]), groups.get("validation", {})
    if data.development_languages and development:
        raise ValueError("Give development data or --development_languages, not both.")
    for language in data.development_languages:
        if language not in test:
            raise ValueError(f"--development_languages: the test data has no {language!r}, only {', '.join(test)}.")
        development[language] = test.pop(language)
    if not test:
        raise ValueError("All languages of the test data are --development_languages, so there is nothing to test.")
    missing = [language for language in test if data.protocol == "bucc" and language not in development]
    if missing:
        raise ValueError(
            f"The threshold of {missing[0]!r} is tuned on development data of this language, but there is none. "
            "Give it as --validation_file."
        )
    return development, test


def evaluate(model, tokenizer, data: RetrievalArguments, development: dict, test: dict) -> dict:
    """The results, as they are written to `results.json`.

    Raises:
        ValueError: there are several layers, but no development data to choose on; data for BUCC has no pair.
    """
    layers, k = choose_layers(data, model), data.num_neighbors
    if len(layers) > 1 and not development:
        raise ValueError(
            f"Layers {layers[0]} to {layers[-1]} can be chosen from only with development data: give --validation_file "
            "or --development_languages, or one layer as --layers."
        )
    if data.protocol == "bucc":
        development, test = ({name: gold_pairs(pairs) for name, pairs in some.items()} for some in (development, test))
        for name, (_, _, gold) in [*development.items(), *test.items()]:
            if not gold:
                raise ValueError(
                    f"The data of {name!r} has no sentence with its translation, so there is nothing to find."
                )
    sizes = [len(side) for some in (development, test) for pairs in some.values() for side in pairs[:2]]
    results = {"protocol": data.protocol, "representation": data.representation, "development": {}, "languages": {}}
    with tqdm(total=sum(sizes), desc="sentences", disable=data.disable_tqdm) as bar:

        def embed(pairs, some: list[int]):
            return zip(*(embed_sentences(side, model, tokenizer, some, data, bar) for side in pairs[:2]), strict=True)

        # For each layer, what each language reaches: its threshold, if there is one, and what it is chosen by.
        tuned = {layer: {} for layer in layers}
        for name, pairs in development.items():
            for layer, (source, target) in zip(layers, embed(pairs, layers), strict=True):
                if data.protocol == "bucc":
                    tuned[layer][name] = best_threshold(mine(source, target, k), pairs[2])
                else:
                    tuned[layer][name] = None, accuracies(source, target, k)["mean_cosine"]
        if development:
            results["development"] = {
                str(layer): float(np.mean([score for _, score in some.values()])) for layer, some in tuned.items()
            }
        layer = max(layers, key=lambda layer: results["development"].get(str(layer), 0.0))
        results["layer"] = None if data.representation == "embed" else layer
        for name, pairs in test.items():
            ((source, target),) = embed(pairs, [layer])
            if data.protocol == "bucc":
                threshold = tuned[layer][name][0]
                taken = [(i, j) for score, i, j in mine(source, target, k) if score >= threshold]
                scores = scores_of(len(pairs[2].intersection(taken)), len(taken), len(pairs[2])) | {
                    "threshold": threshold
                }
            else:
                scores = accuracies(source, target, k)
            results["languages"][name] = {"sentences": len(source)} | scores
    rows = list(results["languages"].values())
    names = [name for name in rows[0] if name not in ("sentences", "threshold")]
    results["mean"] = {name: float(np.mean([row[name] for row in rows])) for name in names}
    return results


def table(results: dict) -> str:
    """A Markdown table: a row for each language, and one of their mean."""
    names = list(next(iter(results["languages"].values())))
    lines = [
        "| language | " + " | ".join(name.replace("_", " ") for name in names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for language, row in [*results["languages"].items(), ("mean", results["mean"])]:
        decimals = {"sentences": "d", "threshold": ".3f"}
        cells = [format(row[name], decimals.get(name, ".1f")) if name in row else "" for name in names]
        lines.append(f"| {language} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    checkpoint, data = parse_arguments(__doc__.splitlines()[0], ModelArguments, RetrievalArguments)
    splits = load_splits(data, "test")
    groups = {split: read_pairs(splits[split], split, data) for split in ("validation", "test") if split in splits}
    development, test = split_development(data, groups)
    tokenizer = checkpoint.load_tokenizer()
    model = checkpoint.load(AutoModel, checkpoint.load_config())
    model.to("cuda" if torch.cuda.is_available() and not data.use_cpu else "cpu")
    results = {"model": checkpoint.model_name_or_path} | evaluate(model, tokenizer, data, development, test)
    folder = Path(data.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    chosen = "model.embed" if results["layer"] is None else f"layer {results['layer']}"
    print(f"{data.protocol}, {chosen} of {checkpoint.model_name_or_path}, in percent\n\n{table(results)}")


if __name__ == "__main__":
    main()
