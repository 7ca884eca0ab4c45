"""For each method: the groups it is trained on, its settings here, and what must go up.

A name that is not in `RECIPES` is trained on pairs with its own defaults.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from experiments import quickstart
from paxo.data.records import TokenGroup
from tests.methods.task import STRENGTH, Sampled

Groups = Callable[[Sampled, list[Sampled], frozenset[str]], TokenGroup | list[TokenGroup]]


def beats(rewards: np.ndarray) -> np.ndarray:
    """`[K] -> [K, K]` probability that i beats j."""
    return 1 / (1 + np.exp(-STRENGTH * (rewards[:, None] - rewards[None, :])))


def win_rates(rewards: np.ndarray) -> np.ndarray:
    """`[K]` mean over the others."""
    p = beats(rewards)
    return (p.sum(1) - np.diag(p)) / (len(rewards) - 1)


def extras_of(sample: Sampled, places, wanted: frozenset[str]) -> dict:
    """The arrays that a loss names, for the candidates at these places."""
    rewards, mean = sample.rewards[list(places)], sample.rewards.mean()
    tokens = [len(sample.group.completions[i]) for i in places]
    spread = sample.rewards.std() + 1e-3
    per_candidate = {
        "rewards": (rewards - mean) / spread,
        "margin_rewards": -0.02 * np.array(tokens),
        "win_rates": win_rates(sample.rewards)[list(places)],
        "preference_scores": STRENGTH * (rewards - mean),
        "advantages": (rewards - mean) / spread,
        "flip_rates": np.float32(0.1),
    }
    return {name: value for name, value in per_candidate.items() if name in wanted}


def places(*chosen: int, labels=None, soft: bool = False) -> Groups:
    """A group of the candidates at these places of the ranking, 0 the best."""

    def make(sample: Sampled, others: list[Sampled], wanted: frozenset[str]) -> TokenGroup:
        grades = labels if labels is not None else range(len(chosen), 0, -1)
        if soft:
            grades = win_rates(sample.rewards[list(chosen)])
        return sample.choose(chosen, grades, **extras_of(sample, chosen, wanted))

    return make


pairs = places(0, 5, labels=(1.0, 0.0))
soft_pairs = places(0, 5, soft=True)


def graded(sample: Sampled, others: list[Sampled], wanted: frozenset[str]) -> TokenGroup:
    """Four candidates with grades in [0, 1]."""
    chosen = (0, 1, 3, 5)
    return sample.choose(
        chosen, win_rates(sample.rewards)[list(chosen)], **extras_of(sample, chosen, wanted)
    )


def rewarded(sample: Sampled, others: list[Sampled], wanted: frozenset[str]) -> TokenGroup:
    """All candidates, with their rewards as labels and extras."""
    chosen = range(6)
    return sample.choose(chosen, sample.rewards, **extras_of(sample, chosen, wanted))


def by_token(sample: Sampled, others: list[Sampled], wanted: frozenset[str]) -> TokenGroup:
    """All candidates; the reward is the advantage and the return of every token."""
    group = rewarded(sample, others, frozenset({"advantages"}))
    lengths = [len(c) for c in group.completions]
    spread = lambda x: tuple(np.full(n, v, np.float32) for n, v in zip(lengths, x))  # noqa: E731
    arrays = {
        "advantages": spread(group.extras["advantages"]),
        "returns": spread(sample.rewards),
        "previous_values": spread(np.zeros(6)),
    }
    return dataclasses.replace(
        group, extras={f"{n}:KT": x for n, x in arrays.items() if n in wanted}
    )


def judged(sample: Sampled, others: list[Sampled], wanted: frozenset[str]) -> TokenGroup:
    """All candidates; a judge passes those above the mean, a baseline has the mean reward."""
    group = rewarded(sample, others, frozenset())
    mean = sample.rewards.mean()
    arrays = {
        "rewards": STRENGTH * sample.rewards,
        "baseline_rewards": np.full(6, STRENGTH * mean),
        "passed": sample.rewards > mean,
        "constraint_rewards": (sample.rewards - 1.0) / (sample.rewards.std() + 1e-3),
    }
    arrays = {n: np.asarray(x, np.float32) for n, x in arrays.items() if n in wanted}
    return dataclasses.replace(group, extras=arrays)


def unpaired(sample: Sampled, others: list[Sampled], wanted: frozenset[str]) -> list[TokenGroup]:
    """One desirable and one undesirable completion, a group each."""
    group = [sample.choose((0,), (1.0,)), sample.choose((5,), (-1.0,))]
    if "density_ratios" in wanted:
        group = [dataclasses.replace(g, extras={"density_ratios": np.float32(1)}) for g in group]
    return group


def blind(sample: Sampled, others: list[Sampled], wanted: frozenset[str]) -> TokenGroup:
    """Chosen, rejected, and what is written without looking: the completion of another prompt."""
    other = others[(sample.index + 7) % len(others)].group
    group = pairs(sample, others, wanted)
    return dataclasses.replace(
        group,
        completions=(*group.completions, other.completions[4]),
        finished=(*group.finished, other.finished[4]),
        labels=(1.0, 0.0, 0.0),
    )


def shown_in_any_order(sample: Sampled, others, wanted: frozenset[str]) -> TokenGroup:
    """A pair whose better one comes first or second."""
    return places(*((0, 5), (5, 0))[sample.index % 2], labels=((1, 0), (0, 1))[sample.index % 2])(
        sample, others, wanted
    )


def with_degree(sample: Sampled, others, wanted: frozenset[str]) -> TokenGroup:
    """A pair, and how far apart the two are, in four degrees."""
    gap = sample.rewards[0] - sample.rewards[5]
    return sample.choose(
        (0, 5), (1, 0), degree_labels=np.float32(np.digitize(gap, (0.3, 0.5, 0.7)))
    )


def clauses(completion: np.ndarray) -> np.ndarray:
    """`[T]` 1 on the last token of each clause: before "and", "but" and the end."""
    glue = [quickstart.vocabulary().index(word) for word in ("and", "but")]
    ends = np.zeros(len(completion), np.float32)
    ends[:-1] = np.isin(completion[1:], [*glue, 2])
    ends[-1] = not ends.any()
    return ends


def stepwise(sample: Sampled, others, wanted: frozenset[str]) -> TokenGroup:
    """Four graded completions cut into clauses, and whether each clause is kind."""
    group = graded(sample, others, frozenset())
    ends = tuple(clauses(c) for c in group.completions)
    arrays = {
        "step_ends": ends,
        "step_mask": ends,
        "step_similarities": tuple(np.full(len(e), 0.5, np.float32) for e in ends),
        "step_labels": tuple(_kind(c, e) for c, e in zip(group.completions, ends)),
    }
    return dataclasses.replace(
        group, extras={f"{n}:KT": x for n, x in arrays.items() if n in wanted}
    )


def _kind(completion: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """`[T]` 1 at the end of each clause whose words are good on the whole."""
    words = quickstart.vocabulary()
    values = [quickstart.SENTIMENT.get(words[token], 0.0) for token in completion]
    kind, clause = np.zeros(len(ends), np.float32), 0.0
    for t, value in enumerate(values):
        clause += value
        if ends[t]:
            kind[t], clause = clause > 0, 0.0
    return kind


def segments(sample: Sampled, others, wanted: frozenset[str]) -> TokenGroup:
    """Pairs judged by reward plus the change of a potential, which the scores must not learn."""
    rng = np.random.default_rng(sample.index)
    end = rng.uniform(-0.3, 0.3, 2)
    order = np.argsort(-(sample.rewards[[0, 5]] + end))
    chosen = np.array((0, 5))[order]
    return sample.choose(chosen, (1, 0), start_values=np.zeros(2), end_values=end[order])


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a method is trained here.

    Attributes:
        groups: what it sees of a prompt's samples.
        hyper: hyper-parameters other than its defaults, where those are meant for large models.
        lr: learning rate of Adam.
        steps: of 8 rows of 256 tokens.
        promise: "reward" of the policy's own completions, "accuracy" of a head on held-out pairs.
        head: the head whose accuracy is meant.
    """

    groups: Groups = pairs
    hyper: dict = dataclasses.field(default_factory=dict)
    lr: float = 1e-3
    steps: int = 40
    promise: str = "reward"
    head: str = ""


def _all(recipe: Recipe, *names: str) -> dict[str, Recipe]:
    return dict.fromkeys(names, recipe)


RECIPES = {
    # At a margin of 0 and its usual tau, 0.05, its gradient leads down: a local optimum lies there.
    "discopop": Recipe(hyper={"tau": 1.0}),
    "onpo": Recipe(hyper={"eta": 5.0}),
    **_all(Recipe(unpaired), "apo_zero_unpaired", "nca_unpaired", "bco"),
    "kto": Recipe(unpaired),  # the packer adds the mismatched completions
    "bpo": Recipe(blind),
    **_all(Recipe(places(0, 5, 1)), "rationale_dpo", "triple_po", "triple_po_l"),
    **_all(Recipe(places(0, 5, 2, 3)), "xpo", "vpo", "selm", "hypo"),
    **_all(
        Recipe(graded),
        *("plackett_luce", "pro", "swepo", "mppo", "rrhf", "lipo", "lipo_lambda"),
        *("unique_softmax", "poly1_softmax", "pairwise_mse", "pairwise_quantile"),
        *("pairwise_soft01", "approx_ndcg", "neural_ndcg", "infonca", "nca", "exo"),
        *("diff_ndcg", "drpo_rank"),
    ),
    "online_ipo_v2": Recipe(soft_pairs),
    **_all(Recipe(soft_pairs, {"tau": 0.1}), "online_ipo", "ipo_md"),
    **_all(
        Recipe(rewarded),
        *("nash_md_pg", "sppo", "gpo", "mdpo", "grpo", "cispo", "sapo", "rloo", "copg"),
    ),
    "ppo_policy": Recipe(by_token),
    "rationale_orpo": Recipe(places(0, 5, 1)),
    **_all(Recipe(graded), "slic_list", "gumbel"),
    **_all(Recipe(judged), "cgpo_crpg", "cgpo_codpo", "cgpo_crraft", "constrained_rlhf"),
    **_all(Recipe(rewarded), "brain", "oreo"),
    "oreo_policy": Recipe(rewarded),
    "oreo_value": Recipe(rewarded, promise="accuracy", head="values"),
    "ppo_value": Recipe(by_token, promise="accuracy", head="values"),
    "bradley_terry": Recipe(promise="accuracy", head="scores"),
    "plackett_luce_reward": Recipe(graded, promise="accuracy", head="scores"),
    "pair_preference": Recipe(shown_in_any_order, promise="accuracy", head="scores"),
    "general_preference": Recipe(promise="accuracy", head="embeddings"),
    "regret_preference": Recipe(segments, promise="accuracy", head="scores"),
    "prm": Recipe(stepwise, promise="accuracy", head="step_scores"),
    "tpo_tree": Recipe(stepwise),
    "spo_degree": Recipe(with_degree),
    "opa_dpo": Recipe(places(0, 1, 5, 3, 4)),
}
