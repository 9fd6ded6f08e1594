import copy
import re
import threading
import time
import types

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_paraphrase_lm.retrieval import EvidenceDataset, LexicalEmbedder, embed_documents
from hf_paraphrase_lm.training import RefreshIndexCallback

from .reference.evidence import row_documents

PAD = 0
N = 48
TOKENIZER = types.SimpleNamespace(pad_token_id=PAD)


class Model(nn.Module):
    """Predicts the labels of a target from the mean of the evidence it may see; with dropout."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(N + 2, 8)
        self.dropout = nn.Dropout(0.3)
        # Targets that it was trained on; the first token of a document is its row + 1.
        self.rows = []

    def states(self, input_ids, attention_mask):
        states = self.dropout(self.tokens(input_ids)) * attention_mask[..., None]
        return states.sum(dim=-2) / attention_mask.sum(dim=-1, keepdim=True)

    def embed(self, input_ids, attention_mask):
        assert not self.training
        return nn.functional.normalize(self.states(input_ids, attention_mask), dim=-1)

    def forward(self, input_ids, attention_mask, labels, evidence_mask):
        assert self.training
        self.rows.append((labels[:, 0] - 1).tolist())
        weights = evidence_mask.float() / evidence_mask.sum(dim=1, keepdim=True)
        target = weights @ self.states(input_ids, attention_mask)
        logits = (target @ self.tokens.weight.T)[:, None].expand(-1, labels.shape[1], -1)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def collate(groups):
    (group,) = groups
    evidence, labels = (
        nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in group[key]], True, fill)
        for key, fill in (("input_ids", PAD), ("labels", -100))
    )
    mask = torch.tensor(group["evidence_mask"])
    return {"input_ids": evidence, "attention_mask": (evidence != PAD).long(), "labels": labels, "evidence_mask": mask}


@pytest.fixture
def dataset():
    documents = row_documents(N, shard=[row % 4 for row in range(N)])
    documents = documents.map(lambda row: {"input_ids": [token + 1 for token in row["input_ids"]]})
    return EvidenceDataset(documents, num_targets=4, num_evidence=4, pairs_per_target=3)


@pytest.fixture
def model():
    return Model()


def same(groups, others):
    return all(torch.equal(*sides) for sides in zip(groups, others, strict=True))


class Recording(RefreshIndexCallback):
    """Notes when the groups were rebuilt, from which shards and which weights."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, progress=False, **options)
        self.rebuilds = []

    def _refresh(self, step, model, processing_class):
        assert model.training or step == 0
        super()._refresh(step, model, processing_class)
        shards = {int(row) % 4 for item in self.dataset for row in item["target_rows"]}
        self.rebuilds.append((step, shards, model.tokens.weight.detach().clone()))


@pytest.fixture
def train(dataset, model, tmp_path):
    def train(*callbacks, max_steps=10, processing_class=TOKENIZER, **options):
        torch.manual_seed(0)
        defaults = {"logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "report_to": "none"}
        options = defaults | {"learning_rate": 1e-2} | options
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=max_steps,
            per_device_train_batch_size=1,
            remove_unused_columns=False,
            use_cpu=True,
            **options,
        )
        trainer = Trainer(
            model,
            arguments,
            data_collator=collate,
            train_dataset=dataset,
            processing_class=processing_class,
            callbacks=list(callbacks),
        )
        trainer.train()
        return trainer

    return train


def test_refreshes_at_the_start_and_every_so_many_steps(dataset, model, train):
    callback = Recording(dataset, refresh_steps=3)
    train(callback, max_steps=9)
    # None after the last step: nothing would train on it.
    assert [step for step, *_ in callback.rebuilds] == [0, 3, 6]
    assert all(shards == {0, 1, 2, 3} for _, shards, _ in callback.rebuilds)
    weights = [weight for *_, weight in callback.rebuilds]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


def test_the_groups_are_those_of_the_current_weights(dataset, model, train):
    before, found = [Model()], []

    class Watching(Recording):
        def _refresh(self, step, model, processing_class):
            super()._refresh(step, model, processing_class)
            before.append(copy.deepcopy(model))
            found.append(dataset.groups)
            for embedder, is_same in ((model, True), (before[-2], False)):
                expected, _ = dataset.find_groups(embedder, PAD, progress=False, number=dataset.num_rebuilds - 1)
                assert same(dataset.groups, expected) == is_same

    train(Watching(dataset, refresh_steps=4), learning_rate=0.3)
    assert len(found) == 3


def test_groups_that_are_there_are_held(dataset, train):
    dataset.rebuild(LexicalEmbedder(dataset.documents, progress=False), PAD, progress=False)
    callback = Recording(dataset, refresh_steps=4)
    train(callback)
    assert [step for step, *_ in callback.rebuilds] == [4, 8]


@pytest.mark.parametrize("mode", ["blocking", "async"])
def test_training_goes_on_as_if_nothing_had_happened(dataset, model, train, monkeypatch, mode):
    """A refresh that changes no group changes no loss: gradients, modes, dropout and sampling are untouched."""
    start = {name: value.clone() for name, value in model.state_dict().items()}
    dataset.rebuild(model, PAD, progress=False)
    plain = train(max_steps=8).state.log_history
    model.load_state_dict(start)
    monkeypatch.setattr(dataset, "install", lambda *arguments: None)
    callback = Recording(dataset, refresh_steps=2, mode=mode)
    refreshed = train(callback, max_steps=8).state.log_history
    assert len(callback.rebuilds) == 3
    assert [log["loss"] for log in plain[:-1]] == [log["loss"] for log in refreshed[:-1]]


def test_sampled_shards(dataset, model, train):
    start = {name: value.clone() for name, value in model.state_dict().items()}
    callback = Recording(dataset, refresh_steps=1, shards_per_refresh=2)
    train(callback, max_steps=6)
    sampled = [shards for _, shards, _ in callback.rebuilds]
    assert all(len(shards) == 2 for shards in sampled)
    assert len(set(map(frozenset, sampled))) > 1
    # They follow from the seed and the step.
    model.load_state_dict(start)
    again = EvidenceDataset(dataset.documents, num_targets=4, num_evidence=4)
    callback = Recording(again, refresh_steps=1, shards_per_refresh=2)
    train(callback, max_steps=6)
    assert [shards for _, shards, _ in callback.rebuilds] == sampled


class Integration(TrainerCallback):
    def __init__(self):
        self.logged = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append((state.global_step, dict(logs)))


def test_statistics_are_logged(dataset, train):
    integration = Integration()
    trainer = train(Recording(dataset, refresh_steps=4), integration, max_steps=10, logging_steps=100)
    logs = [log for log in trainer.state.log_history if "refresh/groups" in log]
    # The refresh before the first step is logged with it, the others with their own step.
    assert [log["step"] for log in logs] == [1, 4, 8]
    names = {"groups", "targets", "resting_targets", "pairs", "distinct_evidence", "seconds", "cross_language_share"}
    names |= {"relevance_mean", "relevance_std", "pair_relevance_mean", "share_of_time", "staleness"}
    for log in logs:
        assert {name for name in log if name.startswith("refresh/")} == {f"refresh/{name}" for name in names}
        assert "loss" in log and log["refresh/staleness"] == 0 and 0 < log["refresh/share_of_time"] < 1
    # All the time so far was that of the first refresh; later ones share it with updates.
    assert logs[0]["refresh/share_of_time"] > logs[2]["refresh/share_of_time"]
    assert [step for step, log in integration.logged if "refresh/groups" in log] == [1, 4, 8]


def test_no_logging_is_no_logging(dataset, train):
    history = train(Recording(dataset, refresh_steps=4), logging_strategy="no").state.log_history
    # What Trainer logs at the end.
    assert len(history) == 1 and "refresh/groups" in history[0]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes:UserWarning")
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("blocking", {}),
        ("blocking", {"dataloader_num_workers": 2}),
        ("blocking", {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}),
        ("async", {"gradient_accumulation_steps": 2}),
        ("async", {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 4, "gradient_accumulation_steps": 2}),
        ("async", {"dataloader_num_workers": 2, "dataloader_multiprocessing_context": "spawn"}),
    ],
    ids=["no workers", "workers", "persistent", "accumulation", "reading further ahead", "spawned"],
)
def test_every_batch_holds_the_groups_of_its_place(dataset, model, train, mode, options):
    """Those read ahead hold the old groups, the next ones the new ones: not about there, but exactly."""
    # Spawned workers take long to start, so they live on.
    if "dataloader_multiprocessing_context" in options:
        options = options | {"dataloader_persistent_workers": True}
    installed = Installed(dataset)
    train(RefreshIndexCallback(dataset, 7, progress=False, mode=mode), installed, max_steps=22, **options)
    accumulated = options.get("gradient_accumulation_steps", 1)
    ahead = 1 + options.get("dataloader_num_workers", 0) * options.get("dataloader_prefetch_factor", 2)
    first_batches = [0]
    for step in (7, 14, 21) if mode == "blocking" else (14, 21):
        # An epoch has 12 batches, and nothing is read ahead over its end.
        end = 12 * (1 + (step * accumulated - 1) // 12)
        first_batches.append(min(step * accumulated + ahead, end))
    assert len(installed.targets) == len(first_batches)
    assert len(model.rows) == 22 * accumulated
    others = 0
    for number, rows in enumerate(model.rows):
        now = sum(first <= number for first in first_batches) - 1
        assert rows in installed.targets[now], number
        others += sum(rows not in targets for targets in installed.targets)
    assert others > 0


class Installed(TrainerCallback):
    """Notes the targets of the groups that are installed."""

    def __init__(self, dataset):
        self.dataset = dataset
        self.targets = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.on_step_end(args, state, control)

    def on_step_end(self, args, state, control, **kwargs):
        if len(self.targets) < self.dataset.num_rebuilds:
            targets, _ = self.dataset.groups
            self.targets.append([[row for row in group if row >= 0] for group in targets.tolist()])


def test_gradient_accumulation(dataset, train):
    callback = Recording(dataset, refresh_steps=2)
    train(callback, max_steps=5, gradient_accumulation_steps=3)
    assert [step for step, *_ in callback.rebuilds] == [0, 2, 4]


def test_an_interrupted_refresh_leaves_groups_and_mode(dataset, model, train, monkeypatch):
    class Interrupted(Recording):
        def _refresh(self, step, model, processing_class):
            if step:
                self.before = list(dataset)
                monkeypatch.setattr(model, "embed", interrupt)
            super()._refresh(step, model, processing_class)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    callback = Interrupted(dataset, refresh_steps=3)
    with pytest.raises(KeyboardInterrupt):
        train(callback)
    assert list(dataset) == callback.before
    assert all(module.training for module in model.modules())
    monkeypatch.undo()
    embed_documents(dataset.documents, model, PAD, progress=False)


def test_the_padding_token_may_come_from_the_config(dataset, model, train):
    callback = Recording(dataset, refresh_steps=5)
    message = (
        "RefreshIndexCallback must know the padding token to embed documents in batches, but neither Trainer's "
        "processing_class nor model.config has a pad_token_id. Give Trainer the tokenizer as processing_class."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        train(callback, processing_class=None)
    callback._refresh(0, model.train(), types.SimpleNamespace(pad_token_id=PAD))
    model.config = types.SimpleNamespace(pad_token_id=PAD)
    callback._refresh(0, model, None)
    callback._refresh(0, model, types.SimpleNamespace(pad_token_id=None))
    assert len(callback.rebuilds) == 3


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def search_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("refresh")]


class Weights(TrainerCallback):
    """Copies of the model after each update."""

    def __init__(self):
        self.models = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.models[state.global_step] = copy.deepcopy(model)


def test_in_the_background_with_the_weights_of_one_refresh_before(dataset, train, monkeypatch):
    weights, installed = Weights(), {}
    install = dataset.install

    def noting(groups, *arguments):
        installed[max(weights.models, default=0)] = groups
        install(groups, *arguments)

    monkeypatch.setattr(dataset, "install", noting)
    # Callbacks are called in this order.
    refresh = RefreshIndexCallback(dataset, 6, 3, progress=False, mode="async")
    trainer = train(weights, refresh, max_steps=24, learning_rate=0.3)
    assert list(installed) == [0, 12, 18]
    for number, step in ((1, 12), (2, 18)):
        rng = np.random.default_rng([dataset.seed, step - 6])
        shards = [dataset.shards[i] for i in rng.choice(4, 3, replace=False)]
        expected, _ = dataset.find_groups(weights.models[step - 6], PAD, shards, progress=False, number=number)
        assert same(installed[step], expected)
        other, _ = dataset.find_groups(weights.models[step], PAD, shards, progress=False, number=number)
        assert not same(installed[step], other)
    logs = [log for log in trainer.state.log_history if "refresh/groups" in log]
    assert [(log["step"], log["refresh/staleness"]) for log in logs] == [(1, 0), (12, 6), (18, 6)]
    assert ["refresh/background_seconds" in log for log in logs] == [False, True, True]
    assert not search_threads()


def test_how_fast_a_search_is_changes_nothing(dataset, model, train, monkeypatch):
    start = copy.deepcopy(model.state_dict())
    quick = train(RefreshIndexCallback(dataset, 3, progress=False, mode="async"), max_steps=12)
    model.load_state_dict(start)
    slow_dataset = EvidenceDataset(dataset.documents, num_targets=4, num_evidence=4, pairs_per_target=3)
    find_groups, began = slow_dataset.find_groups, []

    class NotBefore(TrainerCallback):
        """Lets a search end at the update that needs its groups."""

        needed = threading.Event()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % 3 == 0:
                self.needed.set()

        def on_step_begin(self, args, state, control, **kwargs):
            assert bool(search_threads()) == (3 <= state.global_step < 9)

    def slowly(*arguments, **options):
        began.append(threading.current_thread())
        if threading.current_thread() is not threading.main_thread():
            NotBefore.needed.clear()
            assert NotBefore.needed.wait(60)
        return find_groups(*arguments, **options)

    monkeypatch.setattr(slow_dataset, "find_groups", slowly)
    arguments = quick.args, quick.data_collator, slow_dataset
    callback = RefreshIndexCallback(slow_dataset, 3, progress=False, mode="async")
    torch.manual_seed(0)
    slow = Trainer(model, *arguments, processing_class=TOKENIZER, callbacks=[NotBefore(), callback])
    slow.train()
    assert losses(slow) == losses(quick)
    # The first one before training, at 3 and 6 in the background, where updates went on; 9 would be the last step's.
    assert [thread is threading.main_thread() for thread in began] == [True, False, False]


@pytest.mark.parametrize("when", [4, 6])
def test_an_error_in_the_background_is_raised_once(dataset, model, train, monkeypatch, when):
    """At the next update, or where the groups are needed; with its reason, and where it happened."""
    find_groups = dataset.find_groups

    def failing(*arguments, **options):
        if threading.current_thread() is threading.main_thread():
            return find_groups(*arguments, **options)
        assert Steps.may_fail.wait(60)
        raise ValueError("No vectors today.")

    class Steps(TrainerCallback):
        may_fail = threading.Event()

        def on_step_end(self, args, state, control, **kwargs):
            self.step = state.global_step
            if state.global_step == when:
                self.may_fail.set()
                while when == 4 and not callback._search.failed:
                    time.sleep(0.01)

    monkeypatch.setattr(dataset, "find_groups", failing)
    callback, steps = RefreshIndexCallback(dataset, 3, progress=False, mode="async"), Steps()
    with pytest.raises(ValueError, match=r"^No vectors today\.") as caught:
        train(steps, callback, max_steps=12)
    assert caught.value.__notes__ == ["This happened in the background, to the search for groups begun at step 3."]
    assert steps.step == when
    assert not search_threads()
    monkeypatch.undo()
    train(callback, max_steps=8)


class Breaking(TrainerCallback):
    def __init__(self, error):
        self.error = error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            control.should_training_stop = True
            if self.error is not None:
                raise self.error


@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), RuntimeError("Out of memory.")], ids=repr)
def test_the_thread_ends_with_training(dataset, model, train, monkeypatch, error):
    embed, embedded = Model.embed, []

    def slowly(self, *arguments):
        if self is not model:
            embedded.append(len(search_threads()))
            time.sleep(0.2)
        return embed(self, *arguments)

    monkeypatch.setattr(Model, "embed", slowly)
    callback = RefreshIndexCallback(dataset, 3, batch_size=2, progress=False, mode="async")
    if error is None:
        train(callback, Breaking(error), max_steps=12)
    else:
        with pytest.raises(type(error)):
            train(callback, Breaking(error), max_steps=12)
        (thread,) = search_threads()
        thread.join(60)
    assert not search_threads()
    # There would be 24 calls.
    assert len(embedded) <= 6


def test_another_training_ends_the_search_before_it(dataset, model, train, monkeypatch):
    found = []
    find_groups = dataset.find_groups

    def noting(*arguments, **options):
        found.append(threading.current_thread() is threading.main_thread())
        return find_groups(*arguments, **options)

    monkeypatch.setattr(dataset, "find_groups", noting)
    callback = RefreshIndexCallback(dataset, 3, progress=False, mode="async")
    with pytest.raises(KeyboardInterrupt):
        train(callback, Breaking(KeyboardInterrupt()), max_steps=12)
    trainer = train(callback, max_steps=7)
    assert found == [True, False, False]
    assert [log["step"] for log in trainer.state.log_history if "refresh/groups" in log] == [6]


def test_the_threads_of_the_training_stay(dataset, train, monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        seen, embed = {}, Model.embed

        def noting(self, *arguments):
            seen.setdefault(threading.current_thread() is threading.main_thread(), torch.get_num_threads())
            return embed(self, *arguments)

        monkeypatch.setattr(Model, "embed", noting)
        train(RefreshIndexCallback(dataset, 3, progress=False, mode="async"), max_steps=9)
        assert seen == {True: 8, False: 2} and torch.get_num_threads() == 8
    finally:
        torch.set_num_threads(threads)


def test_in_the_background_with_mixed_precision(dataset, train):
    """Trainer then wraps the model's forward."""
    callback = RefreshIndexCallback(dataset, 3, progress=False, mode="async")
    trainer = train(callback, max_steps=7, bf16=True)
    assert [log["step"] for log in trainer.state.log_history if "refresh/groups" in log] == [1, 6]


def test_batches_that_one_process_reads_for_all_are_refused(dataset, train):
    message = (
        "dispatch_batches must be False, because one process would read the batches of all, and the groups of each "
        "could not be told from its place. Leave it out: every process then reads its own batches."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        train(RefreshIndexCallback(dataset, 3), accelerator_config={"dispatch_batches": True})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refresh_steps": 0}, "refresh_steps must be at least 1, but got 0."),
        (
            {"refresh_steps": 1, "shards_per_refresh": 5},
            "shards_per_refresh must be between 1 and 4, the number of shards of the dataset, but got 5.",
        ),
        ({"refresh_steps": 1, "mode": "thread"}, "mode must be 'blocking' or 'async', but got 'thread'."),
        (
            {"refresh_steps": 1, "shards_per_refresh": 0},
            "shards_per_refresh must be between 1 and 4, the number of shards of the dataset, but got 0.",
        ),
    ],
)
def test_bad_options_are_refused(dataset, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        RefreshIndexCallback(dataset, **options)
