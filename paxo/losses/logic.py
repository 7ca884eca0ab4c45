r"""The logic of preference losses: symbolic specifications, and what they have in common.

A loss is read as a statement about which completions a model predicts. The variables are `w` and
`l` (the policy predicts the chosen, the rejected), `rw` and `rl` (the reference does). A world
gives each a truth value; its weight is the product of $p$ or $1 - p$ over the variables. The loss
is a link of the log-odds between the worlds that are favourable to the policy and the adverse ones
(`paxo.losses.semantic` compiles it). A specification has three formulas in the operators `~`, `&`,
`^`, `|` and `->`, from tightest to loosest: what should hold (`core`), in which worlds it is asked
(`given`), and which worlds count on both sides (`also`).

>>> cpo, orpo = SPECIFICATIONS["cpo"], SPECIFICATIONS["orpo"]
>>> cpo.favourable, cpo.adverse  # worlds (w, l)
(((1, 0), (1, 1)), ((0, 1), (1, 1)))
>>> equivalent(cpo, Specification("w", given="w | l", also="w & l")), equivalent(cpo, orpo)
(True, False)

Experimental. Richardson, Srikumar and Sabharwal 2024, arXiv:2412.17696, whose triple (P, P_C, P_A)
is `core`, `given`, `also`. The paper was not read in full: the specifications below are re-derived
and checked against the losses they name; the paper's names for its new losses are not verified.
"""

import ast
import dataclasses
import fractions
import functools
import itertools
import math
from collections.abc import Iterable, Mapping

POLICY, REFERENCE = ("w", "l"), ("rw", "rl")
World = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Specification:
    """Three formulas over `w`, `l` and perhaps `rw`, `rl`.

    Attributes:
        core: what should hold.
        given: condition under which it is asked; other worlds count on no side.
        also: worlds that count on both sides, if they are given.

    Raises:
        ValueError: when the worlds are asked for, if a formula cannot be read, or if no world is
            left on one side.
    """

    core: str
    given: str = "true"
    also: str = "false"

    @functools.cached_property
    def variables(self) -> tuple[str, ...]:
        """`("w", "l")`, and `("rw", "rl")` if a formula names one of them."""
        trees = [_parsed(formula) for formula in (self.core, self.given, self.also)]
        names = {x.id for tree in trees for x in ast.walk(tree) if isinstance(x, ast.Name)}
        return POLICY + REFERENCE if names & set(REFERENCE) else POLICY

    @functools.cached_property
    def favourable(self) -> tuple[World, ...]:
        """Worlds of (core or also) and given: truth values in the order of `variables`."""
        return self._worlds(wanted=True)

    @functools.cached_property
    def adverse(self) -> tuple[World, ...]:
        """Worlds of (not core or also) and given."""
        return self._worlds(wanted=False)

    @property
    def unnormalised(self) -> "Specification":
        r"""The core alone. With the logistic link and beta 1 its loss is $-\log P(core)$."""
        return Specification(self.core)

    def _worlds(self, wanted: bool) -> tuple[World, ...]:
        found = []
        for world in _all_worlds(len(self.variables)):
            values = dict(zip(self.variables, map(bool, world)))
            holds = _evaluated(_parsed(self.core), values) == wanted
            both = _evaluated(_parsed(self.also), values)
            if (holds or both) and _evaluated(_parsed(self.given), values):
                found.append(world)
        if not found:
            side = "favourable" if wanted else "adverse"
            raise ValueError(f"{self} leaves no {side} world, so it has no log-odds")
        return tuple(found)


SPECIFICATIONS = {
    "cross_entropy": Specification("w"),
    "unlikelihood": Specification("w & ~l"),  # ASFT's bracket
    "implication": Specification("l -> w"),  # CPO and ORPO, un-normalised
    "cpo": Specification("l -> w", given="w | l", also="w & l"),
    "orpo": Specification("l -> w", given="w ^ l"),
    "dpo": Specification("l & rw -> w & rl", given="(w & rl) | (l & rw)", also="w & l & rw & rl"),
}


def specification_of(
    favourable: Iterable[World], adverse: Iterable[World], variables: tuple[str, ...] = POLICY
) -> Specification:
    """A specification with these worlds: the way back from a loss, as a disjunction of worlds.

    >>> specification_of([(1, 0)], [(0, 1)])
    Specification(core='w & ~l', given='w & ~l | ~w & l', also='false')
    """
    favourable, adverse = set(favourable), set(adverse)

    def formula(worlds: set[World]) -> str:
        literals = ([n if x else f"~{n}" for n, x in zip(variables, world)] for world in worlds)
        return " | ".join(sorted(" & ".join(x) for x in literals)) or "false"

    return Specification(
        formula(favourable), formula(favourable | adverse), formula(favourable & adverse)
    )


def distinguish(a: Specification, b: Specification) -> dict[str, fractions.Fraction] | None:
    """Probabilities of the variables at which two specifications have other odds; None if nowhere.

    Different worlds may still give the same odds ({TT} against {FT} is {TT, TF} against {FT, FF}),
    so the weighted counts decide, in exact fractions. The cross product of the two odds is of
    degree 2 at most in each probability: agreement at three values of each is a proof.

    >>> distinguish(SPECIFICATIONS["cpo"], SPECIFICATIONS["orpo"])
    {'w': Fraction(1, 4), 'l': Fraction(1, 2)}
    """
    variables = max(a.variables, b.variables, key=len)
    values = [fractions.Fraction(i, 4) for i in (1, 2, 3)]
    for chosen in itertools.product(values, repeat=len(variables)):
        point = dict(zip(variables, chosen))
        if odds(a, point) != odds(b, point):
            return point
    return None


def equivalent(a: Specification, b: Specification) -> bool:
    """Whether two specifications are the same loss, whatever the probabilities."""
    return distinguish(a, b) is None


def entails(a: Specification, b: Specification) -> bool:
    """Whether b asks no more than a: its loss is then never above a's, for every falling link.

    Favourable worlds of a are b's, and adverse worlds of b are a's.

    >>> entails(SPECIFICATIONS["unlikelihood"], SPECIFICATIONS["orpo"])
    True
    """
    variables = max(a.variables, b.variables, key=len)
    favourable = [_widened(x.favourable, variables) for x in (a, b)]
    adverse = [_widened(x.adverse, variables) for x in (a, b)]
    return favourable[0] <= favourable[1] and adverse[1] <= adverse[0]


def odds(
    spec: Specification, probabilities: Mapping[str, fractions.Fraction]
) -> fractions.Fraction:
    """Weighted count of the favourable worlds over that of the adverse ones, exactly."""

    def count(worlds: tuple[World, ...]) -> fractions.Fraction:
        p = [probabilities[name] for name in spec.variables]
        return sum(math.prod(q if x else 1 - q for q, x in zip(p, world)) for world in worlds)

    return count(spec.favourable) / count(spec.adverse)


def symmetric(worlds: Iterable[World], i: int) -> bool:
    """Whether variable i does not matter: flipping it maps the worlds onto themselves."""
    worlds = set(worlds)
    return {(*world[:i], 1 - world[i], *world[i + 1 :]) for world in worlds} == worlds


def _all_worlds(n: int) -> Iterable[World]:
    return itertools.product((0, 1), repeat=n)


def _widened(worlds: tuple[World, ...], variables: tuple[str, ...]) -> set[World]:
    """The worlds over more variables, whose values are free."""
    free = len(variables) - len(worlds[0])
    return {world + rest for world in worlds for rest in _all_worlds(free)}


@functools.cache
def _parsed(formula: str) -> ast.expr:
    """Python's own grammar, with `->` as its loosest operator `<=`."""
    try:
        return ast.parse(formula.replace("->", "<="), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"cannot read the formula {formula!r}: {error.msg}") from None


_OPERATORS = {ast.BitAnd: bool.__and__, ast.BitOr: bool.__or__, ast.BitXor: bool.__xor__}


def _evaluated(node: ast.expr, world: Mapping[str, bool]) -> bool:
    match node:
        case ast.Name(id="true" | "false"):
            return node.id == "true"
        case ast.Name(id=name) if name in world:
            return world[name]
        case ast.UnaryOp(op=ast.Invert()):
            return not _evaluated(node.operand, world)
        case ast.BinOp() if type(node.op) in _OPERATORS:
            left, right = _evaluated(node.left, world), _evaluated(node.right, world)
            return _OPERATORS[type(node.op)](left, right)
        case ast.Compare(ops=[ast.LtE()], comparators=[right]):
            return not _evaluated(node.left, world) or _evaluated(right, world)
    raise ValueError(
        f"cannot read {ast.unparse(node).replace('<=', '->')!r} in a formula: it knows w, l, rw, "
        "rl, true, false, ~ & ^ | and -> (with parentheses when there are two)"
    )
