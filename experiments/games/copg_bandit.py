"""CoPG's bandit: which loss finds the best policy from pairs that other policies drew.

    paxo run experiments/games/copg_bandit.py

Flet-Berliac et al. 2024, arXiv:2406.19185: three arms with rewards (2.5, 2, 1), 10,000 pairs drawn
from two policies that prefer the worst arm, KL weight 1/2 to a uniform reference. CoPG regresses
differences of rewards and is right from any pairs; IPO sees labels only; a policy gradient that
takes the pairs for its own is wrong, with the policy's value as baseline less so. Regret of the
regularised value, mean of three seeds, and where the exact expected loss comes to rest.

On a CPU, 30 seconds of CPU time. Regret after 100 epochs at the paper's learning rate 1e-3: CoPG
0.0129, IPO 0.155, policy gradient 0.636, with the policy's value as baseline 0.0279; at 1e-2: 0,
0.155, 0.640, 0.0146. At rest: 0, 0.152531, 0.637793, 0.014817.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import optax

from paxo.evaluation.report import write_results
from paxo.games import builders
from paxo.games.expected import expected_loss
from paxo.games.plots import by_method, plot_tables
from paxo.losses.nash import nash_md_pg_loss
from paxo.losses.pairwise import ipo_loss
from paxo.losses.regression import copg_loss

BANDIT = builders.copg_bandit
RESTING_STEPS = 60000  # of gradient descent on the exact expectation
METHODS = ("copg", "ipo", "policy gradient", "policy gradient, value baseline")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
        learning_rates: of Adam; the paper's is 1e-3.
        num_pairs: offline pairs.
        batch_size: pairs a step.
        num_epochs: passes over the pairs.
        num_seeds: runs.
    """

    learning_rates: tuple[float, ...] = (1e-3, 1e-2)
    num_pairs: int = 10000
    batch_size: int = 512
    num_epochs: int = 100
    num_seeds: int = 3


def experiment() -> Settings:
    """The settings."""
    return Settings()


def run(settings: Settings, workdir: pathlib.Path) -> None:
    """Every method at every learning rate, then the exact resting points."""
    tables = {}
    keys = jax.random.split(jax.random.key(0), settings.num_seeds)
    for rate in settings.learning_rates:
        table = tables[f"Adam {rate:g}"] = {}
        for method in METHODS:
            train = jax.jit(jax.vmap(functools.partial(regrets, settings, rate, method)))
            found = train(keys).mean(0)
            table[method] = {epoch: float(x) for epoch, x in enumerate(found)}
            print(f"Adam {rate:g}  {method:32s} regret {float(found[-1]):.4f}")
    with jax.enable_x64(True):
        resting = {method: resting_regret(method) for method in METHODS}
    for method, regret in resting.items():
        print(f"at rest     {method:32s} regret {regret:.6f}")
    at_rest = {"exact steps of 0.5": {m: {RESTING_STEPS: x} for m, x in resting.items()}}
    write_results(workdir / "results.json", by_method(tables | at_rest))
    plot_tables(workdir / "regret.png", tables, xlabel="epoch", ylabel="regret", floor=1e-6)


def loss_of(method: str, logps: jax.Array, reference: jax.Array, rewards: jax.Array, value):
    """`[...]` the loss of pairs `[..., 2]`; for IPO the winner stands first."""
    beta = 0.5
    if method == "copg":
        return copg_loss(logps, reference, rewards, beta=beta)
    if method == "ipo":
        return ipo_loss(logps, reference, tau=beta)
    baseline = value if "baseline" in method else 0.0
    # The loss weighs log-probs with win rate - 1/2 - tau log-ratio; rewards stand for win rates.
    return nash_md_pg_loss(logps, reference, rewards - baseline + 0.5, tau=beta)


def regrets(settings: Settings, rate: float, method: str, key: jax.Array) -> jax.Array:
    """`[epochs + 1]` regret of one run."""
    bandit, optimizer = BANDIT(), optax.adam(rate)
    for_pairs, for_labels, for_order = jax.random.split(key, 3)
    pairs = jax.random.categorical(
        for_pairs, bandit.offline_logps, axis=-1, shape=(settings.num_pairs, 2)
    )
    if method == "ipo":
        wins = jax.nn.sigmoid(bandit.rewards[pairs[:, 0]] - bandit.rewards[pairs[:, 1]])
        first = jax.random.uniform(for_labels, wins.shape) < wins
        pairs = jnp.where(first[:, None], pairs, pairs[:, ::-1])
    steps = -(-settings.num_pairs // settings.batch_size)

    def loss(logits, batch):
        logps = jax.nn.log_softmax(logits)
        value = jax.lax.stop_gradient(jnp.exp(logps) @ bandit.rewards)
        arrays = (logps[batch], bandit.reference_logps[batch], bandit.rewards[batch])
        return jnp.mean(loss_of(method, *arrays, value))

    def step(carry, batch):
        logits, state = carry
        change, state = optimizer.update(jax.grad(loss)(logits, batch), state)
        return (logits + change, state), None

    def epoch(carry, key):
        order = jax.random.permutation(key, settings.num_pairs)
        # The last batch is filled up with the epoch's first pairs.
        order = jnp.resize(order, steps * settings.batch_size)
        carry, _ = jax.lax.scan(step, carry, pairs[order].reshape(steps, -1, 2))
        return carry, bandit.regret(carry[0])

    start = jnp.zeros(3)
    keys = jax.random.split(for_order, settings.num_epochs)
    _, found = jax.lax.scan(epoch, (start, optimizer.init(start)), keys)
    return jnp.append(bandit.regret(start), found)


def resting_regret(method: str) -> float:
    """Regret where gradient descent on the exact expectation stops."""
    bandit = BANDIT()

    def loss(logits):
        value = jax.lax.stop_gradient(jax.nn.softmax(logits) @ bandit.rewards)

        def of_pairs(policy_logps, reference_logps, rewards):
            return loss_of(method, policy_logps, reference_logps, rewards, value)

        return expected_loss(
            of_pairs, bandit.game(), logits, sampler=list(bandit.offline_logps),
            extras={"rewards": bandit.rewards},
        )  # fmt: skip

    def descend(logits, _):
        return logits - 0.5 * jax.grad(loss)(logits), None

    logits, _ = jax.jit(lambda x: jax.lax.scan(descend, x, None, length=RESTING_STEPS))(
        jnp.zeros(3)
    )
    return float(bandit.regret(logits))
