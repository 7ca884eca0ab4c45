"""What a run's rounds were trained on: `rounds/0003.jsonl` and `rounds/0003.json`.

They lie where the checkpoints do, in the run's folder or its bucket: both are needed to go on. A
round counts as drawn once its groups are there, which are written last, whole or not at all.
"""

import functools
import json
import logging
import pathlib
from collections.abc import Callable

import numpy as np
from etils import epath

from paxo.online.collect import Collected, RoundError
from paxo.online.groups import Decode, Group, read_groups, write_groups
from paxo.online.method import Schedule
from paxo.rows import from_first
from paxo.training.checkpoint import kept_folder

logger = logging.getLogger(__name__)

ROUNDS = "rounds"


class RoundFiles:
    """The files of a run.

    Args:
        workdir: of the run.
        decode: token ids -> text, for people; None writes none.
    """

    def __init__(self, workdir: pathlib.Path, decode: Decode | None = None):
        self.folder, self._decode = kept_folder(workdir) / ROUNDS, decode

    def groups(self, name: str) -> epath.Path:
        """The file of a round's groups."""
        return self.folder / f"{name}.jsonl"

    def kept(self, name: str, draw: Callable[[], Collected]) -> Collected:
        """What was drawn for a round, from its files; drawn and written where they are missing.

        Args:
            name: of the round: its number, and "-half" behind it for EGPO's first half.
            draw: draws the round.

        Raises:
            ValueError: for a damaged file.
        """
        found = from_first(lambda: self._read(name))
        if found is None:
            found = draw()
            from_first(lambda: self._write(name, found))
        return found

    def _read(self, name: str) -> Collected | None:
        file = self.groups(name)
        figures = file.with_suffix(".json")
        if not (file.exists() and figures.exists()):
            return None
        logger.info("round %s: its groups are read from %s", name, file)
        return Collected(read_groups(file), _figures(figures))

    def _write(self, name: str, found: Collected) -> None:
        file = self.groups(name)
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found.figures, indent=2) + "\n"
        file.with_suffix(".json").write_text(text, encoding="utf-8")
        write_groups(file, found.groups, self._decode)

    def replayed(self, number: int, size: int, schedule: Schedule, seed: int) -> list[Group]:
        """Groups of earlier rounds that a round is trained on besides its own.

        Args:
            number: of the round.
            size: its own groups.
            schedule: `replay` says how many.
            seed: of the choice.

        Raises:
            RoundError: for an earlier round whose file is damaged or gone.
        """
        shares = [None] * number if schedule.replay == "all" else schedule.replay
        added = []
        for earlier, share in zip(range(number - 1, -1, -1), shares):
            known = from_first(functools.partial(self._earlier, number, earlier))
            if share is not None:
                rng = np.random.default_rng((seed, number, earlier))
                count = min(round(share * size), len(known))
                known = [known[i] for i in sorted(rng.choice(len(known), count, replace=False))]
            added += known
        return added

    def _earlier(self, number: int, earlier: int) -> list[Group]:
        file = self.groups(f"{earlier:04d}")
        try:
            return read_groups(file)
        except (OSError, ValueError) as error:
            raise RoundError(
                f"round {number:04d} is trained on groups of round {earlier:04d} too, but {file} "
                f"cannot be read ({type(error).__name__}: {error}). Its policy is gone, so it "
                "cannot be drawn again: put the file back, or start in another folder"
            ) from error


def _figures(file: epath.Path) -> dict[str, float]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(
            f"{file}: not a round's figures ({error}); remove it: the round is then sampled anew"
        ) from error
