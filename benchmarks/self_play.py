"""What a round of EGPO costs against a round of online IPO: sampling, judging, scoring, step.

    python -m benchmarks.self_play --rounds 30

Both play the task of three styles (`experiments/cyclic_prompts.py`) from the same model, in turns,
with the same prompts, candidates and opponents. EGPO draws and steps twice a round.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Mapping

from paxo import rounds
from paxo.experiment import load
from paxo.models.sharding import make_mesh, param_shardings
from paxo.online import Draw, Drawer, RoundSettings, method, play

CYCLIC = load(pathlib.Path(__file__).parent.parent / "experiments" / "cyclic_prompts.py")
METHODS = ("online_ipo_v1", "egpo")
SKIPPED = 6  # rounds in which something is still compiled


def main() -> None:
    """Prints one JSON line: CPU seconds a round, their ratio in each turn."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=30, help="rounds of a turn that are counted")
    parser.add_argument("--turns", type=int, default=3, help="turns of each method")
    options = parser.parse_args()
    task = Task()
    found: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(options.turns):
        for name, seconds in found.items():
            seconds.append(statistics.median(task.seconds_a_round(name, options.rounds)))
    ratios = [two / one for one, two in zip(*found.values())]
    line = {
        "benchmark": "self_play",
        "cpu_seconds_a_round": {name: round(statistics.median(x), 4) for name, x in found.items()},
        "egpo_over_online_ipo": round(statistics.median(ratios), 3),
        "ratios": [round(x, 3) for x in ratios],
        "rounds": options.rounds,
    }
    print(json.dumps(line))


class Task:
    """The task of three styles, its model trained for a moment."""

    def __init__(self) -> None:
        self.folder = pathlib.Path(tempfile.mkdtemp())
        self.settings = dataclasses.replace(CYCLIC.experiment(), sft_steps=20)
        self.mesh = make_mesh(**dataclasses.asdict(self.settings.mesh))
        self.model = CYCLIC.first_model(self.settings, self.folder, self.mesh)
        self.prompts = CYCLIC.some_prompts(self.settings, self.model)

    def seconds_a_round(self, name: str, count: int) -> list[float]:
        """Own CPU seconds of each counted round."""
        row = method(name, beta=self.settings.beta, opponents=4)
        row = dataclasses.replace(row, draws=(Draw("reference", 2),))
        chosen = dataclasses.replace(self.settings, method=row)
        policy, clock = self.model.policy, _Clock()
        drawer = Drawer(
            policy, chosen.sampling, self.model.tokenizer.stop_ids, mesh=self.mesh, batch_size=96
        )
        with tempfile.TemporaryDirectory() as folder:
            play(
                policy,
                self.model.params,
                row,
                chosen.optimizer,
                self.prompts,
                RoundSettings(count + SKIPPED, prompts_per_round=96),
                draw=drawer,
                judges=CYCLIC.style_judges(chosen),
                pack=rounds.make_pack(chosen, self.prompts, self.mesh),
                mesh=self.mesh,
                param_shardings=param_shardings(policy.logical_axes, self.model.params, self.mesh),
                workdir=pathlib.Path(folder),
                make_writer=lambda step, number: clock,
            )
        return clock.seconds()


class _Clock:
    """Takes the metrics of rounds and notes the time instead."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Notes the end of a round."""
        if "round" in metrics:
            self.at.append(time.process_time())

    def close(self) -> None:
        """Nothing to close."""

    def seconds(self) -> list[float]:
        """From the end of one round to that of the next."""
        return [after - before for before, after in itertools.pairwise(self.at[SKIPPED - 1 :])]


if __name__ == "__main__":
    main()
