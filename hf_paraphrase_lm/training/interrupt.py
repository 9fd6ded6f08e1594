"""Stops a training run at Ctrl-C without breaking what is being written."""

import signal
import sys
import threading

from transformers import TrainerCallback


class StopOnInterruptCallback(TrainerCallback):
    """At Ctrl-C (SIGINT) the running update is finished, a checkpoint is saved, and `trainer.train()` returns.

    Without it Ctrl-C may hit Trainer while it writes, and leave a checkpoint that cannot be resumed from. A second
    Ctrl-C stops at once, as usual, but for one during a save, which is let finish. No checkpoint is saved with
    `save_strategy="no"`.

        stop = StopOnInterruptCallback()
        trainer = Trainer(model=model, callbacks=[stop], ...)
        trainer.train()
        if stop.interrupted:
            ...  # trainer.train(resume_from_checkpoint=True) goes on from here another time

    Python delivers signals to its main thread only; in another thread the callback does nothing.

    Attributes:
        interrupted (`bool`): Whether Ctrl-C ended the last training run.
    """

    def __init__(self):
        self.interrupted = False
        self._saving = False
        self._previous = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.interrupted = self._saving = False
        if threading.current_thread() is threading.main_thread() and self._previous is None:
            self._previous = signal.signal(signal.SIGINT, self._remember)

    def on_step_end(self, args, state, control, **kwargs):
        if self.interrupted:
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no"
        # Callbacks that ask for a save come before this one; Trainer's own does.
        self._saving = control.should_save

    def on_save(self, args, state, control, **kwargs):
        self._saving = False
        if self.interrupted:
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _remember(self, number, frame):
        if self.interrupted and not self._saving:
            # Trainer tells nobody of an exception, so the handler goes now.
            self.on_train_end(None, None, None)
            raise KeyboardInterrupt
        self.interrupted = True
        print("\nCtrl-C: stopping after this update. Press it again to stop at once.", file=sys.stderr)
