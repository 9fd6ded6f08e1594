"""Auto classes, and checkpoints that carry the code of their model.

A folder or Hub repository written here loads with `trust_remote_code=True` in a process where this package is not
installed: the model's source files lie beside the weights, and `auto_map` in `config.json` names the class behind each
Auto class.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .models.cocolm import (
    CocoLMConfig,
    CocoLMForMaskedLM,
    CocoLMForMultipleChoice,
    CocoLMForPretraining,
    CocoLMForQuestionAnswering,
    CocoLMForSequenceClassification,
    CocoLMForTokenClassification,
    CocoLMModel,
)
from .models.marge import MargeConfig, MargeForConditionalGeneration, MargeForSequenceClassification, MargeModel

# Which class of ours each Auto class loads, for either family.
AUTO_CLASSES = {
    MargeConfig: {
        AutoModel: MargeModel,
        AutoModelForPreTraining: MargeForConditionalGeneration,
        AutoModelForSeq2SeqLM: MargeForConditionalGeneration,
        AutoModelForSequenceClassification: MargeForSequenceClassification,
    },
    CocoLMConfig: {
        AutoModel: CocoLMModel,
        AutoModelForMaskedLM: CocoLMForMaskedLM,
        AutoModelForMultipleChoice: CocoLMForMultipleChoice,
        AutoModelForPreTraining: CocoLMForPretraining,
        AutoModelForQuestionAnswering: CocoLMForQuestionAnswering,
        AutoModelForSequenceClassification: CocoLMForSequenceClassification,
        AutoModelForTokenClassification: CocoLMForTokenClassification,
    },
}

# Weights under other names than those just written would shadow them (a single file beats shards) or be dead weight.
WEIGHT_FILES = ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]


def register_auto_classes() -> None:
    """Makes `AutoConfig`, `AutoModel`, ... know both families; `import hf_paraphrase_lm` calls it."""
    for config_class, heads in AUTO_CLASSES.items():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for auto_class, model_class in heads.items():
            auto_class.register(config_class, model_class, exist_ok=True)


def save_with_code(
    model: PreTrainedModel, folder: str | os.PathLike, tokenizer: PreTrainedTokenizerBase | None = None
) -> Path:
    """Saves a checkpoint with its code, for `AutoModel*.from_pretrained(folder, trust_remote_code=True)`.

    Every Auto class of the family is named, so a pre-trained checkpoint loads for fine-tuning too. Other files in
    `folder` stay. The checkpoint is written aside and moved in file by file, `config.json` last: an interrupted save
    leaves no truncated file. The model and its classes are not changed (`register_for_auto_class` would put code into
    every later checkpoint). In distributed training call it on the main process only.

    Args:
        model: A model of this package, e.g. `trainer.model`.
        folder: Where to save; made if needed.
        tokenizer: Saved beside the model, with its code where its class is of this package.

    Returns:
        `folder` as a path.

    Raises:
        TypeError: If `model` is no model of this package.
        FileExistsError: If `folder` is a file.
    """
    heads = AUTO_CLASSES.get(type(model.config), {}) if isinstance(model, PreTrainedModel) else {}
    if type(model) not in heads.values():
        known = ", ".join(sorted({head.__name__ for heads in AUTO_CLASSES.values() for head in heads.values()}))
        raise TypeError(
            f"save_with_code expects one of {known}, but got {type(model).__module__}.{type(model).__qualname__}. Only "
            "the code of these classes works by itself; unwrap the model or save it with save_pretrained."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".save_with_code-") as scratch:
        scratch = Path(scratch)
        model.save_pretrained(scratch)
        auto_map = {"AutoConfig": _copy_code(type(model.config), scratch)}
        auto_map |= {auto_class.__name__: _copy_code(head, scratch) for auto_class, head in heads.items()}
        _add_auto_map(scratch / "config.json", auto_map)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
            if type(tokenizer).__module__.startswith(f"{__package__}."):
                reference = _copy_code(type(tokenizer), scratch)
                _add_auto_map(scratch / "tokenizer_config.json", {"AutoTokenizer": [reference, None]})
        _move_files(scratch, folder)
    return folder


def push_with_code(
    model: PreTrainedModel,
    repo_id: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload checkpoint with its code",
    token: str | None = None,
) -> CommitInfo:
    """Uploads what `save_with_code` writes to the Hub in one commit, for `from_pretrained(repo_id, ...)` anywhere.

    Args:
        model: A model of this package.
        repo_id: `"user/name"`, or `"name"` in the namespace of the token; made if needed.
        tokenizer: Uploaded beside the model, with its code where its class is of this package.
        private: Whether a repository made here is private; the account's default if `None`.
        revision: The branch to commit to, made if needed; the main branch if `None`.
        commit_message: First line of the commit.
        token: Access token; the one stored by `hf auth login` if `None`.

    Returns:
        The commit, with its `commit_url` and `oid`.

    Raises:
        TypeError: If `model` is no model of this package; nothing is sent then.
        huggingface_hub.errors.HfHubHTTPError: If the Hub refuses.
    """
    hub = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_with_code(model, folder, tokenizer)
        repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            hub.create_branch(repo_id, branch=revision, exist_ok=True)
        return hub.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            delete_patterns=WEIGHT_FILES,
        )


def _copy_code(cls: type, folder: Path) -> str:
    """Copies the file that defines `cls` and returns the reference `file.Class` that `auto_map` holds."""
    file = Path(sys.modules[cls.__module__].__file__)
    shutil.copyfile(file, folder / file.name)
    return f"{file.stem}.{cls.__name__}"


def _add_auto_map(file: Path, auto_map: dict) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    config["auto_map"] = auto_map
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _move_files(source: Path, folder: Path) -> None:
    """Moves all files of `source` into `folder`, drops weights of an earlier save, ends with `config.json`."""
    names = {file.name for file in source.iterdir()}
    for name in sorted(names - {"config.json"}):
        os.replace(source / name, folder / name)
    for file in [file for pattern in WEIGHT_FILES for file in folder.glob(pattern)]:
        if file.name not in names:
            file.unlink()
    os.replace(source / "config.json", folder / "config.json")
