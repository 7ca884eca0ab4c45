"""A run that is killed with signal 9 in every phase of a round, and started again each time.

    python -m tests.online.killed FOLDER

Attempts are forked from one process that has imported everything and started no backend.
"""

import os
import pathlib
import signal
import sys

from paxo.online import RoundSettings, groups, method
from paxo.training.checkpoint import Checkpointer
from paxo.training.writers import JsonlWriter
from tests.online import playing

# What is being done -> how many times it is begun in that attempt before the kill.
KILLED = (
    *(("drawing", 1), ("judging", 1), ("writing", 5), ("packing", 1), ("training", 3)),
    *(("saving", 2), ("evaluating", 1), ("drawing", 2), ("writing", 2), ("saving", 1)),
)


class Until:
    """Passes calls on, and kills this process before the n-th one, or after it."""

    def __init__(self, inner, at, *, after=False):
        self.inner, self.left, self.after = inner, at, after

    def __call__(self, *args, **given):
        self.left = self.left and self.left - 1
        if self.left == 0 and not self.after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = self.inner(*args, **given)
        if self.left == 0 and self.after:  # what goes on in the background is cut short
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    def __getattr__(self, name):
        return getattr(self.inner, name)


def attempt(folder, phase=None, at=0):
    """Plays, or goes on; the result if nobody kills it."""
    import optax

    def until(name, inner, **given):
        return Until(inner, at if name == phase else None, **given)

    game, row = playing.a_game(), method("online_dpo")
    judges = playing.judges_of(game)
    if phase == "writing":  # a row of the round's file
        groups._row = until("writing", groups._row)

    def make_writer(step, rounds):
        writer = JsonlWriter(folder / "metrics.jsonl")
        writer.truncate_after(step or -1, rounds)
        writer.write = until("training", writer.write)
        return writer

    with Checkpointer(folder / "checkpoints", every=2, keep=2) as saver:
        saver.save = until("saving", saver.save, after=True)
        return playing.play_game(
            game,
            row,
            folder,
            settings=RoundSettings(3, prompts_per_round=12, epochs=2, minibatches=2),
            judges=playing.judges_of(game, judge=until("judging", judges.judge)),
            optimizer=optax.adam(0.05),
            draw=until("drawing", playing.TableDrawer()),
            pack=until("packing", playing.packer(row.group_size)),
            evaluate=until("evaluating", lambda params, last, number: {"number": float(number)}),
            checkpointer=saver,
            make_writer=make_writer,
        )


def main(folder: pathlib.Path) -> None:
    """Prints a line for each attempt that was killed as it should be."""
    for phase, at in KILLED:
        child = os.fork()
        if child == 0:
            attempt(folder, phase, at)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != -signal.SIGKILL:
            sys.exit(f"{phase} {at}: not killed")
        print(phase, flush=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
