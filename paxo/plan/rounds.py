"""What a run does between one drawing of completions and the next, as numbers."""

import dataclasses

from paxo.sampling import SamplingConfig


@dataclasses.dataclass(frozen=True)
class Drawing:
    """One sampler's program.

    Attributes:
        config: how it draws; `num_candidates` completions of each prompt.
        policies: that are decoded side by side; 2 for a mixture.
    """

    config: SamplingConfig
    policies: int = 1


@dataclasses.dataclass(frozen=True)
class Round:
    """A round of self-play; of a run on a data set, what one would be with the rows of one step.

    Attributes:
        prompts: that are answered.
        batch: prompts that a sampler draws for at a time, over all devices.
        width: tokens of a prompt as it is padded.
        calls: batches in which a sampler takes a round's prompts.
        draws: samplers of the candidates.
        opponents: samplers of those that they are judged against.
        steps: optimiser steps.
        turns: times that all of this is done from one state: 2 for an extragradient round.
        batches: steps whose rows lie on the devices at a time.
        anchors: copies of the trained parameters that lie beside the state.
        number: rounds of the run; 0 for a run on a data set, which plays none.
    """

    prompts: int
    batch: int
    width: int
    calls: int
    draws: tuple[Drawing, ...]
    opponents: tuple[Drawing, ...] = ()
    steps: int = 1
    turns: int = 1
    batches: int = 1
    anchors: tuple[str, ...] = ()
    number: int = 0

    @property
    def drawn(self) -> int:
        """Prompts that a sampler draws for in a round: its batches are filled up."""
        return self.calls * self.batch

    @property
    def programs(self) -> dict[str, Drawing]:
        """Name -> largest sampler of the candidates, and that of the opponents if it differs."""
        found = {}
        for name, drawings in (("sampler", self.draws), ("opponents", self.opponents)):
            largest = max(drawings, key=_size, default=None)
            if largest is not None and largest not in found.values():
                found[name] = largest
        return found


def _size(drawing: Drawing) -> int:
    return drawing.policies * drawing.config.num_candidates
