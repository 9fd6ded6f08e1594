"""examples/run_cocolm_pretraining.py with tiny models: where it starts from, resuming, what it writes, its errors."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertModel,
    Trainer,
    set_seed,
)

from hf_paraphrase_lm import CocoLMConfig, CocoLMModel, DataCollatorForCorrectiveLM, chunk_documents
from hf_paraphrase_lm.training import corrective_lm_metrics

from .hub_server import TOKEN
from .scripts import import_example, make_checkpoint, read_json, run_script, write_rows

FIXTURES = Path(__file__).parent / "fixtures"
TEXTS = [
    "The last train to the coast leaves at nine in the evening.",
    "At nine in the evening the last train leaves for the coast.",
    "Boil the eggs for ten minutes in a pot of water.",
    "Put the eggs into a pot of water and let them boil for ten minutes.",
    "A dictionary maps every key to one value.",
    "Every key of a dictionary is mapped to a value.",
    "A train.",
]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SIZES |= {"auxiliary_layers": 1, "initializer_range": 0.2}
OVERRIDES = ",".join(f"{name}={value}" for name, value in SIZES.items())


@pytest.fixture
def script(monkeypatch, repository):
    return import_example(monkeypatch, repository, "run_cocolm_pretraining")


@pytest.fixture
def run(script, monkeypatch, tmp_path):
    """Runs the script on texts to train on and to evaluate; returns its --output_dir."""

    def run(train=None, validation=None, kind="txt", **arguments):
        for split, switch, texts in (("train", "train", train), ("validation", "eval", validation)):
            if texts is not None:
                file = write_texts(tmp_path / f"{split}.{kind}", texts)
                arguments |= {f"{split}_file": file, f"do_{switch}": True}
        defaults = {"max_steps": 1, "per_device_train_batch_size": 3, "warmup_steps": 0, "bf16": False}
        if "model_name_or_path" not in arguments:
            defaults |= {"vocab_size": 300, "max_length": 64, "config_overrides": OVERRIDES}
        return run_script(script, monkeypatch, tmp_path, **defaults | arguments)

    return run


def write_texts(file, texts):
    if file.suffix == ".txt":
        file.write_text("\n".join(texts) + "\n", encoding="utf-8")
        return file
    return write_rows(file, [{"number": i, "text": text} for i, text in enumerate(texts)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An encoder alone."""
    set_seed(0)
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), TEXTS)


@pytest.fixture(scope="module")
def berts(tmp_path_factory):
    set_seed(0)
    return [make_checkpoint(tmp_path_factory.mktemp(name), TEXTS, "bert", **sizes) for name, sizes in BERTS.items()]


BERTS = {"main": {"num_hidden_layers": 2}, "auxiliary": {"hidden_size": 16}}


def metrics_of(folder, texts):
    """The metrics of a saved model on texts."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chunks = chunk_documents(Dataset.from_dict({"text": texts}), tokenizer, tokenizer.model_max_length)
    model = AutoModelForPreTraining.from_pretrained(folder)
    return corrective_lm_metrics(model, chunks, DataCollatorForCorrectiveLM(tokenizer), progress=False)


def same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def record_batches(monkeypatch, script):
    """What the collator returns from now on."""
    batches, collate = [], script.DataCollatorForCorrectiveLM.__call__

    def call(self, examples):
        batches.append(collate(self, examples))
        return batches[-1]

    monkeypatch.setattr(script.DataCollatorForCorrectiveLM, "__call__", call)
    return batches


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_from_random_weights(run, kind):
    """Trains a tokenizer and both networks, learns, and leaves all that is needed to go on."""
    held_out = TEXTS[::-1]
    folder = run(TEXTS, held_out, kind, max_steps=30, logging_steps=15, save_strategy="steps", save_steps=15)
    assert {file.name for file in folder.iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training_args.bin"),
        *("train_results.json", "eval_results.json", "all_results.json", "trainer_state.json", "README.md"),
        *("checkpoint-15", "checkpoint-30", "arguments.json"),
    }
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForPreTraining.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer) <= 300
    # Fine-tuning may use longer texts.
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 512
    assert {name: getattr(model.config, name) for name in SIZES} == SIZES
    results = read_json(folder / "all_results.json")
    expected = {f"eval_{name}": value for name, value in metrics_of(folder, held_out).items()}
    assert {name: results[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert read_json(folder / "eval_results.json") == pytest.approx(expected, rel=1e-5)
    assert results["train_samples"] == 7
    first, second = read_json(folder / "trainer_state.json")["log_history"][:2]
    for name in ("loss", "mlm_loss", "copy_loss", "corrective_lm_loss", "contrastive_loss"):
        assert second[name] > 0 and ("contrastive" in name or second[name] < first[name])


@pytest.mark.parametrize("use_muon", [False, True])
def test_an_interrupted_run_goes_on(run, script, monkeypatch, tmp_path, capsys, use_muon):
    """Ctrl-C in the second epoch, dropout included: the same command ends with the weights of an unbroken run."""
    settings = {"max_steps": 9, "save_strategy": "steps", "save_steps": 100, "use_muon": use_muon}
    batches = record_batches(monkeypatch, script)
    whole = run(TEXTS, output_dir=tmp_path / "whole", **settings)
    # Every text is in each of three epochs, and its masks are other ones there.
    masks = [
        (row[row != -100].tolist(), ids[row != -100].tolist())
        for batch in batches
        for ids, row in zip(batch["input_ids"], batch["labels"], strict=True)
    ]
    masks.sort()
    assert len(masks) == 21 and all(masks[i][0] == masks[i + 2][0] for i in range(0, 21, 3))
    assert sum(masks[i][1] != masks[i + 2][1] for i in range(0, 21, 3)) > 4
    step = Trainer.training_step

    def interrupted_step(self, *args, **kwargs):
        if self.state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as error:
        patch.setattr(Trainer, "training_step", interrupted_step)
        run(TEXTS, **settings)
    assert error.value.code == "Interrupted at update 4. The same command goes on from there."
    folder = tmp_path / "out"
    state = torch.load(folder / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert ("momentum" in state["param_groups"][0]) == use_muon
    # A later checkpoint that was not written to its end is passed over.
    (folder / "checkpoint-8").mkdir()
    (folder / "checkpoint-8" / "model.safetensors").write_bytes(b"")
    capsys.readouterr()
    run(TEXTS, TEXTS, **settings)
    assert f"Going on from {folder / 'checkpoint-4'}." in capsys.readouterr().err
    assert same_weights(*(AutoModelForPreTraining.from_pretrained(path) for path in (whole, folder)))
    assert (folder / "tokenizer.json").read_bytes() == (whole / "tokenizer.json").read_bytes()
    assert "h since it last went on |" in (folder / "README.md").read_text()
    assert "since it last" not in (whole / "README.md").read_text()


def test_a_run_that_is_done_is_not_trained_again(run, monkeypatch):
    """In the middle of an epoch: weights, duration and results stay; another corpus is refused."""
    settings = {"max_steps": 4, "save_strategy": "steps", "lr_scheduler_type": "constant"}
    folder = run(TEXTS, TEXTS, **settings)
    model, results = AutoModelForPreTraining.from_pretrained(folder), read_json(folder / "all_results.json")
    monkeypatch.setattr(Trainer, "train", None)
    run(TEXTS, TEXTS, **settings)
    assert same_weights(AutoModelForPreTraining.from_pretrained(folder), model)
    assert read_json(folder / "all_results.json") == pytest.approx(results, rel=1e-5)
    card = (folder / "README.md").read_text()
    assert "since it last went on" not in card and "| steps | 4 |" in card
    run(TEXTS, **settings)
    assert "| eval_" not in (folder / "README.md").read_text()
    assert "eval_" not in (folder / "all_results.json").read_text()
    with pytest.raises(ValueError, match="had other arguments: --train_file was"):
        run(TEXTS[1:], **settings)


def test_a_new_run_has_a_new_tokenizer(run):
    """In a folder without a checkpoint to go on from."""
    folder = run(TEXTS)
    assert len(AutoTokenizer.from_pretrained(folder)) > 280
    run(["OTHER TEXT"] * 3, lowercase=True, vocab_size=270)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) <= 270 and tokenizer.tokenize("OTHER")[0].islower()


def released(folder):
    """As it is published: a config.json that does not tell the family, sp.model and dict.txt."""
    folder.mkdir()
    sizes = {"vocab_size": 92, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24, "max_position_embeddings": 40, "rel_pos_bins": 32, "max_rel_pos": 64}
    torch.save(CocoLMModel(CocoLMConfig(**sizes)).state_dict(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(sizes | {"type_vocab_size": 0, "layer_norm_type": "post"}))
    for name in ("sp.model", "dict.txt"):
        shutil.copy(FIXTURES / "cocolm_tokenizer" / name, folder)
    return folder


@pytest.mark.parametrize("origin", ["own output", "encoder", "fine-tuned", "released"])
def test_continued(run, checkpoint, tmp_path, origin):
    """Any COCO-LM checkpoint keeps its encoder and its tokenizer, and then learns."""
    source = tmp_path / "source"
    if origin == "own output":
        run(TEXTS, output_dir=source)
    elif origin == "released":
        released(source)
    else:
        shutil.copytree(checkpoint, source)
    if origin == "fine-tuned":
        AutoModelForSequenceClassification.from_pretrained(source, num_labels=3).half().save_pretrained(source)
    texts = ["A text."] * 4 if origin == "released" else TEXTS
    settings = {"model_name_or_path": source, "max_length": 32, "discriminator_objective": "corrective_lm"}
    folder = run(texts, texts, learning_rate=0, **settings)
    given = CocoLMModel.from_pretrained(source, dtype=torch.float32)
    model = AutoModelForPreTraining.from_pretrained(folder)
    assert same_weights(model.base_model, given) and {weight.dtype for weight in model.parameters()} == {torch.float32}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    known = AutoTokenizer.from_pretrained(source, config=CocoLMConfig())
    assert type(tokenizer) is type(known) and tokenizer(texts)["input_ids"] == known(texts)["input_ids"]
    assert f"| from | `{source}` |" in (folder / "README.md").read_text()
    if origin == "own output":
        assert same_weights(model, AutoModelForPreTraining.from_pretrained(source))
        # No --max_length is needed where the tokenizer knows it.
        run(texts, model_name_or_path=source)
    run(texts, output_dir=tmp_path / "more", **settings)
    assert not same_weights(CocoLMModel.from_pretrained(tmp_path / "more"), given)


DETECTION = {f"eval_detection_{name}" for name in ("accuracy", "precision", "recall", "f1")} | {"eval_majority_rate"}


@pytest.mark.parametrize(
    ("objective", "metrics", "words"),
    [
        ("corrective_lm", {"eval_copy_loss", "eval_corrective_lm_loss"} | DETECTION, "restore the original ones"),
        ("replaced_token_detection", {"eval_copy_loss"} | DETECTION, "(the objective of ELECTRA)"),
        ("masked_lm", set(), "that learned to fill the masks in a text, and to recognise a crop of the same text."),
    ],
)
def test_objectives(run, objective, metrics, words):
    """Each is saved and can be gone on with; results and card have its own losses only."""
    folder = run(TEXTS, TEXTS, discriminator_objective=objective)
    assert AutoModelForPreTraining.from_pretrained(folder).config.discriminator_objective == objective
    results = read_json(folder / "eval_results.json")
    assert results.keys() == {"eval_mlm_loss", "eval_contrastive_loss"} | metrics
    card = (folder / "README.md").read_text()
    assert words in card
    named = set(re.findall(r"^\| (eval_\w+) \|", card, re.MULTILINE))
    assert named == results.keys() - {"eval_majority_rate"}
    run(TEXTS, model_name_or_path=folder, output_dir=folder.parent / "more")
    assert read_json(folder.parent / "more" / "config.json")["discriminator_objective"] == objective


def test_other_encoders(run, berts, tmp_path):
    """One checkpoint with both, the encoder alone as its own class, and more training from the former."""
    main, auxiliary = berts
    settings = {"model_name_or_path": main, "auxiliary_name_or_path": auxiliary, "learning_rate": 0}
    folder = run(TEXTS, TEXTS, config_overrides="copy_loss_weight=2.5", **settings)
    given = AutoModel.from_pretrained(main)
    model, encoder = AutoModelForPreTraining.from_pretrained(folder), AutoModel.from_pretrained(folder / "main")
    assert model.config.copy_loss_weight == 2.5 and model.auxiliary.config.hidden_size == 16
    assert type(encoder) is BertModel and same_weights(encoder, given) and same_weights(model.base_model, given)
    assert len(AutoTokenizer.from_pretrained(folder / "main")) == given.config.vocab_size
    card = (folder / "README.md").read_text()
    assert "An encoder (`bert`)" in card and 'AutoModelForPreTraining.from_pretrained("out").base_model' in card
    more = run(TEXTS, model_name_or_path=folder, output_dir=tmp_path / "more", learning_rate=0)
    assert same_weights(AutoModelForPreTraining.from_pretrained(more), model)


def test_whole_words(run, script, monkeypatch):
    batches = record_batches(monkeypatch, script)
    folder = run(TEXTS, whole_word_masking=True, mask_probability=0.5, max_steps=6)
    begins = torch.tensor([token.startswith("Ġ") for token in tokens_of(AutoTokenizer.from_pretrained(folder))])
    cut = 0
    for batch in batches:
        masked, labels = batch["input_ids"] != batch["labels"].clamp(min=1), batch["labels"].clamp(min=1)
        inside = ~begins[labels[:, 2:]] & (labels[:, 2:] > 4)
        assert torch.equal(masked[:, 2:][inside], masked[:, 1:-1][inside])
        cut += int(inside.sum())
    assert cut > 50


def tokens_of(tokenizer):
    return tokenizer.convert_ids_to_tokens(range(len(tokenizer)))


def test_settings_and_a_tokenizer_from_elsewhere(run, script, monkeypatch, tmp_path):
    """Numbers of every kind, the preference for neighbors, and the released vocabulary for random weights."""
    overrides = f"{OVERRIDES}, copy_loss_weight=0.5,layer_norm_eps=1e-6,contrastive_embedding_size=8"
    folder = run(
        ["A text.", "Another text."],
        tokenizer_name=released(tmp_path / "released"),
        config_overrides=f"{overrides},auxiliary_sampling=train,vocab_size=96",
        attend_to_neighbors=4.0,
        attn_implementation="eager",
        learning_rate=0,
    )
    model = AutoModelForPreTraining.from_pretrained(folder)
    names = ("copy_loss_weight", "layer_norm_eps", "contrastive_embedding_size", "auxiliary_sampling", "vocab_size")
    assert [getattr(model.config, name) for name in names] == [0.5, 1e-6, 8, "train", 96]
    assert type(AutoTokenizer.from_pretrained(folder)).__name__ == "CocoLMTokenizer"
    for encoder in (model.cocolm, model.auxiliary):
        bucket = encoder.position_buckets(torch.tensor(-1))
        # One of the two heads; the other one stays free.
        assert encoder.relative_attention_bias.weight[bucket, 0] > 2
        assert encoder.relative_attention_bias.weight[:, 1].abs().max() < 1


def test_evaluation_during_training_and_alone(run):
    """Untrained weights are measured too; without training there is no card."""
    folder = run(TEXTS, TEXTS, max_steps=2, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4)
    history = read_json(folder / "trainer_state.json")["log_history"]
    assert [log["step"] for log in history if "eval_loss" in log] == [1, 2]
    before, alone = read_json(folder / "eval_results.json"), folder.parent / "alone"
    run(None, TEXTS, model_name_or_path=folder, output_dir=alone, per_device_eval_batch_size=4)
    assert read_json(alone / "all_results.json") == pytest.approx(before, rel=1e-5)
    assert {file.name for file in alone.iterdir()} == {"eval_results.json", "all_results.json"}
    run(None, TEXTS, tokenizer_name=folder, output_dir=folder.parent / "untrained")
    untrained = read_json(folder.parent / "untrained" / "eval_results.json")
    assert untrained.keys() == before.keys() and untrained != before


def test_the_card(run, tmp_path):
    folder = run(TEXTS, TEXTS, gradient_accumulation_steps=2, max_steps=2)
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "transformers"
    assert "cocolm" in card.data.tags and card.data.base_model is None and card.data.datasets is None
    results = read_json(folder / "all_results.json")
    assert f"| eval_mlm_loss | {results['eval_mlm_loss']:.4f} |  |" in card.text
    accuracy, majority = (f"{results[f'eval_{name}']:.4f}" for name in ("detection_accuracy", "majority_rate"))
    assert f'| eval_detection_accuracy | {accuracy} | {majority} (always "original") |' in card.text
    model = AutoModelForPreTraining.from_pretrained(folder)
    parameters = f"{model.num_parameters():,} ({model.base_model.num_parameters():,} in the encoder)"
    rows = {"from": "random weights", "text": f"`{tmp_path / 'train.txt'}`", "parameters": parameters, "steps": 2}
    for name, value in (rows | {"sequences a step": 6}).items():
        assert f"| {name} | {value} |" in card.text
    assert f"python run_cocolm_pretraining.py --output_dir={folder}" in card.text
    assert f"measured but losses, in nats, and shares on `{tmp_path / 'validation.txt'}`." in card.text
    assert not re.search(r"[{}]", card.text)
    # The code in it runs.
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1].replace('"out"', repr(str(folder)))
    names = {}
    exec(code, names)
    assert same_weights(names["model"], model.base_model) and len(names["tokenizer"]) == model.config.vocab_size
    unmeasured = (run(TEXTS, output_dir=tmp_path / "unmeasured") / "README.md").read_text()
    assert "Nothing was measured. Fine-tune it" in unmeasured and "| eval_" not in unmeasured


def environment_of(repository, **variables):
    variables = {"PYTHONPATH": str(repository), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"} | variables
    return os.environ | variables | {"DISABLE_SAFETENSORS_CONVERSION": "1"}


def test_as_a_command(checkpoint, tmp_path, repository, loopback_hub):
    """From another folder, warnings being errors, from a model of the Hub, to which the result goes too."""
    loopback_hub.repositories["user/base"] = {"branches": {}, "commits": {}, "private": False}
    loopback_hub.commit("user/base", "main", {file.name: file.read_bytes() for file in checkpoint.iterdir()})
    write_texts(tmp_path / "text.txt", TEXTS)
    (tmp_path / "arguments.yaml").write_text(
        "model_name_or_path: user/base\nvalidation_file: text.txt\ntrain_file: text.txt\noutput_dir: out\n"
        "do_train: true\ndo_eval: true\nmax_steps: 2\nlearning_rate: 1e-3\nuse_cpu: true\nreport_to: none\n"
        "push_to_hub: true\nhub_model_id: user/trained\nsave_steps: 1\n"
    )
    hub = {"HF_ENDPOINT": loopback_hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    environment = environment_of(repository, HF_HOME=str(tmp_path / "home"), **hub)
    command = [sys.executable, "-W", "error", repository / "examples" / "run_cocolm_pretraining.py", "arguments.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pushed = loopback_hub.files("user/trained")
    assert {"model.safetensors", "tokenizer.json", "config.json", "all_results.json"} <= pushed.keys()
    assert pushed["README.md"] == (tmp_path / "out" / "README.md").read_bytes()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "user/base" and "# user/trained\n" in card.text
    assert "| from | `user/base` |" in card.text and "generated_from_trainer" not in card.content


def test_arguments_of_a_file(run, script, monkeypatch, tmp_path):
    """JSON and YAML are the command line in another form."""
    expected = run(TEXTS, TEXTS, max_steps=2)
    settings = {"train_file": tmp_path / "train.txt", "validation_file": tmp_path / "validation.txt"}
    settings = {name: str(file) for name, file in settings.items()} | {"do_train": True, "do_eval": True}
    settings |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "learning_rate": 1e-2, "max_length": 64}
    settings |= {"per_device_train_batch_size": 3, "vocab_size": 300, "config_overrides": OVERRIDES, "max_steps": 2}
    settings |= {"warmup_steps": 0, "bf16": False}
    for name in ("a.json", "a.yaml"):
        file, folder = tmp_path / name, tmp_path / name.replace(".", "-")
        # JSON is YAML.
        file.write_text(json.dumps(settings | {"output_dir": str(folder)}))
        monkeypatch.setattr(sys, "argv", ["run_cocolm_pretraining.py", str(file)])
        script.main()
        assert read_json(folder / "eval_results.json") == read_json(expected / "eval_results.json")


def test_two_processes(tmp_path, repository):
    """The tokenizer is trained once; results are written once, and are those of the saved model."""
    write_texts(tmp_path / "text.txt", TEXTS)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    command += [repository / "examples" / "run_cocolm_pretraining.py", "--train_file=text.txt", "--do_train"]
    command += ["--validation_file=text.txt", "--do_eval", "--output_dir=out", "--use_cpu", "--report_to=none"]
    command += ["--vocab_size=1000", "--max_length=32", "--max_steps=3", "--per_device_train_batch_size=2"]
    command += [f"--config_overrides={OVERRIDES}", "--learning_rate=1e-2", "--logging_steps=3", "--bf16=False"]
    environment = environment_of(repository, HF_HOME=str(tmp_path / "home"))
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("The corpus yields a vocabulary of") == 1
    results = read_json(tmp_path / "out" / "eval_results.json")
    expected = {f"eval_{name}": value for name, value in metrics_of(tmp_path / "out", TEXTS).items()}
    assert results == pytest.approx(expected, rel=1e-4)
    assert "| sequences a step | 4 |" in (tmp_path / "out" / "README.md").read_text()


def test_help(script, monkeypatch, capsys):
    """It begins with what the script does, and says of every own argument what it is."""
    monkeypatch.setattr(sys, "argv", ["run_cocolm_pretraining.py", "--help"])
    with pytest.raises(SystemExit):
        script.main()
    text = capsys.readouterr().out
    assert "\n\nPre-trains COCO-LM on your own text, from random weights or from a checkpoint.\n\noptions:" in text
    for word in (
        "--config_overrides CONFIG",
        "{corrective_lm,replaced_token_detection,masked_lm}",
        "--mask_probability",
    ):
        assert word in text


def refused(run, sentence, *texts, error=ValueError, **arguments):
    with pytest.raises(error, match=f"^{re.escape(sentence)}$"):
        run(*texts, **arguments)


def test_settings_that_do_not_do(run, tmp_path):
    fields = f"The fields are {', '.join(CocoLMConfig.__annotations__)}."
    start = "--config_overrides must be fields of CocoLMConfig with their values, such as hidden_size=256, but has "
    refused(run, f"{start}'hidden=32'. {fields}", TEXTS, config_overrides="num_hidden_layers=2,hidden=32")
    refused(run, f"{start}'hidden_size'. {fields}", TEXTS, config_overrides="hidden_size")
    sentence = "--max_length must be at most the model's max_position_embeddings ({}), but got {}. Give a smaller one "
    sentence += "or, for random weights, --config_overrides max_position_embeddings=..."
    refused(run, sentence.format(512, 513), TEXTS, max_length=513)
    short = {"config_overrides": f"{OVERRIDES},max_position_embeddings=32"}
    refused(run, sentence.format(32, 64), TEXTS, **short)
    refused(run, sentence.format(32, 64), TEXTS, tokenizer_name=run(TEXTS), output_dir=tmp_path / "other", **short)
    # Told at once, not at the first save.
    for text, words in (
        ("auxiliary_sampling=mean", "auxiliary_sampling must be one of"),
        ("hidden_size=a", "expected"),
    ):
        with pytest.raises(StrictDataclassError, match=words):
            run(TEXTS, config_overrides=text)


def test_networks_that_do_not_do(run, berts, checkpoint):
    main, auxiliary = berts
    sentence = "--model_name_or_path is of the family 'bert'. Give with --auxiliary_name_or_path a smaller network of "
    refused(run, sentence + "the same vocabulary, which replaces tokens for it.", TEXTS, model_name_or_path=main)
    sentence = "--auxiliary_name_or_path goes with the main network. Give --model_name_or_path, too."
    refused(run, sentence, TEXTS, auxiliary_name_or_path=auxiliary)
    sentence = "--attend_to_neighbors is for random weights. Leave it out with --model_name_or_path."
    refused(run, sentence, TEXTS, model_name_or_path=checkpoint, attend_to_neighbors=4)


def test_data_that_does_not_do(run, tmp_path):
    sentence = "There is nothing to do. Give --do_train, --do_eval or --do_predict, or several of them."
    refused(run, sentence, train_file=tmp_path / "train.txt")
    sentence = "text_column 'body' is not in the dataset. Its columns are: text."
    refused(run, sentence, TEXTS, text_column="body")
    sentence = "There are no training texts for a tokenizer. Give --model_name_or_path or --tokenizer_name."
    refused(run, sentence, None, TEXTS)
    refused(run, "There is no split 'validation', only train.", TEXTS, do_eval=True)
