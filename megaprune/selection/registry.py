"""Registry of methods: what each one does, needs and takes. Imports no torch, because `--help` lists the methods.

`--help`, the checks of the flags, the stages of a run and the table in docs/methods.md follow from it.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from megaprune.selection.budget import Budget
from megaprune.selection.segments import cut_positions
from megaprune.utils.errors import MegapruneError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from megaprune.selection.evaluator import Evaluator
    from megaprune.selection.selector import Selector

# A number of layers (--num-layers-to-prune, --prune-ratio), of parameters (--target-params), or the user's own list of
# layers (--prune-layers).
BudgetKind = Literal["layers", "parameters", "list"]
# What a method's evaluations compute gradients of: a mask, all weights, or nothing.
Gradients = Literal["mask", "weights"] | None
# Held-out calibration windows per calibration window, for methods that take them.
HELD_OUT_WINDOWS = 4
# Flags of every method that trains its scores together with the weights.
SEARCH_FLAGS = frozenset({"search_iters", "search_weights"})
# Flags of every method whose best candidates are trained for a while before one of them is chosen.
HEAL_FLAGS = frozenset({"heal_candidates", "heal_iters"})
# Keywords of a method that are not flags.
_INPUTS = frozenset({"kl", "scores", "held_out"})

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass
class Choice:
    """Layers that a method keeps.

    `scores` are [num_layers], higher = keep, if layers are scored one by one. `candidates` are copied to `report.json`.
    """

    kept_layers: list[int]
    scores: list[float] | None = None
    candidates: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Method:
    """Method of selection: its function and its traits (see `register`)."""

    name: str
    function: Callable[..., Any]
    description: str = ""
    aliases: tuple[str, ...] = ()
    calibrated: bool = False
    searches: bool = False
    contiguous: bool = False
    budgets: tuple[BudgetKind, ...] = ("layers", "parameters")
    recovers: Literal["all", "endpoints"] = "all"
    check: Callable[[Budget, Set[int]], None] | None = None
    windows: Callable[[Budget, Set[int], int, int, bool], int] | None = None
    heals: bool = False
    gradients: Callable[[Mapping[str, Any]], Gradients] | None = None

    @property
    def takes(self) -> frozenset[str]:
        """Return the names of the function's keyword-only parameters."""
        parameters = inspect.signature(self.function).parameters.values()
        return frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)

    @property
    def flags(self) -> frozenset[str]:
        """Return the flags that the method takes, by field name."""
        searching = SEARCH_FLAGS if self.searches else frozenset[str]()
        return (self.takes - _INPUTS) | searching | (HEAL_FLAGS if self.heals else frozenset())

    @property
    def needs_scores(self) -> bool:
        """Return whether a search starts from the KL without each layer, which needs calibration data."""
        return self.searches and bool({"kl", "scores"} & self.takes)

    @property
    def needs_held_out(self) -> bool:
        """Return whether the method compares its candidates on windows that it did not use to find them."""
        return self.calibrated and "held_out" in self.takes

    @property
    def needs_data(self) -> bool:
        """Return whether the method uses calibration data."""
        return self.calibrated or self.needs_scores

    @property
    def names_layers(self) -> bool:
        """Return whether the user names the layers, so that there is nothing to select."""
        return "list" in self.budgets

    def options(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of the flags that the function takes by keyword.

        Raises:
            MegapruneError: the function takes a keyword without a default that is not a flag.
        """
        parameters = inspect.signature(self.function).parameters
        options = {name: values[name] for name in self.takes - _INPUTS if name in values}
        for name in sorted(self.takes - _INPUTS - options.keys()):
            if parameters[name].default is inspect.Parameter.empty:
                raise MegapruneError(
                    f"--method {self.name}: its function takes {name!r} as a keyword, which is not a flag"
                )
        return options

    def choose(
        self,
        budget: Budget,
        protected: Set[int],
        options: Mapping[str, Any],
        evaluator: "Evaluator | None" = None,
        held_out: "Evaluator | None" = None,
    ) -> Choice:
        """Return the layers that the method keeps, checked.

        Args:
            options: values of the flags that the function takes, see `options`.
            evaluator: for a calibrated method.
            held_out: an evaluator on other windows, for a method that takes one.

        Raises:
            MegapruneError: the method can't choose within the budget, or its choice does not fit the budget.
        """
        inputs = {"held_out": held_out} if self.needs_held_out else {}
        arguments = (evaluator, budget, protected) if self.calibrated else (budget, protected)
        found = self.function(*arguments, **options, **inputs)
        choice = found if isinstance(found, Choice) else Choice(found)
        choice.kept_layers = self.checked(choice.kept_layers, budget, protected)
        choice.scores = None if choice.scores is None else [float(score) for score in choice.scores]
        return choice

    def selector(
        self, budget: Budget, protected: Set[int], num_steps: int, options: Mapping[str, Any], kl: "Tensor | None"
    ) -> "Selector":
        """Return the selector of a method that searches.

        Args:
            kl: KL without each layer, [num_layers], for a method that takes it or the scores made of it.
        """
        inputs: dict[str, Any] = {}
        if "kl" in self.takes:
            inputs["kl"] = kl
        if "scores" in self.takes:
            from megaprune.selection.initial_scores import scores_from_kl

            assert kl is not None
            inputs["scores"] = scores_from_kl(kl, protected, 1.0, budget.costs)
        return self.function(budget, protected, num_steps, **options, **inputs)

    def checked(self, kept: Iterable[int], budget: Budget, protected: Set[int]) -> list[int]:
        """Return the layers that the method keeps, ascending.

        Raises:
            MegapruneError: they do not fit the budget, or contradict the method's traits.
        """
        said = f"--method {self.name} chose layers that "
        try:
            layers = sorted(int(layer) for layer in kept)
        except (TypeError, ValueError):
            raise MegapruneError(
                f"--method {self.name} must return the kept layers as numbers, or a Choice, not {kept!r}"
            ) from None
        if len(set(layers)) != len(layers) or not set(layers) <= set(range(budget.num_layers)):
            raise MegapruneError(f"{said}are not those of a model of {budget.num_layers}, each once: {layers}")
        if self.names_layers:
            return layers
        if not protected <= set(layers):
            gone = sorted(protected - set(layers))
            raise MegapruneError(f"{said}lack layer {gone[0]}, which --protect-layers keeps")
        cost = sum(budget.costs[layer] for layer in layers)
        if cost > budget.limit or (budget.counts_layers and cost != budget.limit):
            unit = "layers" if budget.counts_layers else budget.unit
            raise MegapruneError(f"{said}have {cost:,} {unit} where the budget is {budget.limit:,}")
        if self.contiguous and len(cut_positions(layers, budget.num_layers)) > 1:
            raise MegapruneError(f"{said}leave more than one cut, and it is registered as contiguous: {layers}")
        return layers


_methods: dict[str, Method] = {}


def register(
    name: str,
    *,
    description: str = "",
    aliases: Sequence[str] = (),
    calibrated: bool = False,
    searches: bool = False,
    contiguous: bool = False,
    budgets: Sequence[BudgetKind] = ("layers", "parameters"),
    recovers: Literal["all", "endpoints"] = "all",
    check: Callable[[Budget, Set[int]], None] | None = None,
    windows: Callable[[Budget, Set[int], int, int, bool], int] | None = None,
    heals: bool = False,
    gradients: Callable[[Mapping[str, Any]], Gradients] | None = None,
) -> Callable[[_Function], _Function]:
    """Register a function as a method for `--method`.

    The function is called with

    - `(evaluator, budget, protected)` if it is calibrated, and returns the kept layers or a `Choice`;
    - `(budget, protected, num_steps)` if it searches, and returns a `Selector`;
    - `(budget, protected)` otherwise, and returns the kept layers or a `Choice`.

    Keyword-only parameters are flags of the run, by name with underscores, such as `seed`. A search may take
    `kl` by keyword, [num_layers], the KL without each layer, or `scores`, its standardized logarithms. A calibrated
    method may take `held_out`, an evaluator on other windows. Every rank calls the function and must get the same
    answer.

    Args:
        description: one line for `--help` and the docs; by default the first line of the docstring.
        aliases: other names of the method.
        calibrated: uses calibration data, and trains nothing.
        searches: trains its scores together with the weights.
        contiguous: leaves one cut.
        budgets: the kinds of budget that the method supports.
        recovers: what recovery trains unless `--recovery-layers` says otherwise.
        check: raises if the method can't choose within a budget, before the model is loaded.
        windows: the number of calibration windows for a budget, protected layers, a number of tokens, a sequence
            length, and whether the user asked for that number; for methods with `--selection-budget`.
        heals: the best candidates of the `Choice`, by their `kl`, are trained for a few iterations, and the best one
            then is kept.
        gradients: what its evaluations compute gradients of, given the values of its flags; for `plan`, which counts
            their memory. None for forward passes alone.

    Raises:
        MegapruneError: the name is taken, or the function's parameters do not have this form.
    """

    def add(function: _Function) -> _Function:
        text = description or (inspect.getdoc(function) or "").partition("\n")[0]
        method = Method(
            name,
            function,
            text,
            tuple(aliases),
            calibrated,
            searches,
            contiguous,
            tuple(budgets),
            recovers,
            check,
            windows,
            heals,
            gradients,
        )
        _check(method)
        _methods[name] = method
        return function

    return add


def methods() -> list[Method]:
    """Return all methods by name: built-in ones, those of installed plugins, and the user's."""
    _load()
    return [_methods[name] for name in sorted(_methods)]


def names() -> list[str]:
    """Return the names that `--method` takes, aliases included."""
    return sorted(name for method in methods() for name in (method.name, *method.aliases))


def find(name: str) -> Method:
    """Return the method with this name or alias.

    Raises:
        UsageError: there is none.
    """
    for method in methods():
        if name in (method.name, *method.aliases):
            return method
    raise UsageError(f"--method: invalid choice: {name!r} (choose from {', '.join(names())})")


@contextmanager
def registrations_undone() -> Iterator[None]:
    """Forget the methods that the block registers when it ends. For tests of a method."""
    _load()  # the built-in methods stay
    before = dict(_methods)
    try:
        yield
    finally:
        _methods.clear()
        _methods.update(before)


def _load() -> None:
    from megaprune.selection.plugins import load_builtin, load_installed

    load_builtin()
    load_installed()


def _check(method: Method) -> None:
    for name in (method.name, *method.aliases):
        if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name):
            raise MegapruneError(f"a method cannot be named {name!r}: use letters, digits and dashes")
        for other in _methods.values():
            # a module may be executed again, like a cell of a notebook
            if name in (other.name, *other.aliases) and _origin(other) != _origin(method):
                raise MegapruneError(f"the method {name!r} is registered already, by {other.function.__module__}")
    if method.calibrated and method.searches:
        raise MegapruneError(f"the method {method.name!r} can't be both calibrated and searching")
    if not method.budgets or ("list" in method.budgets and len(method.budgets) > 1):
        raise MegapruneError(
            f"the method {method.name!r} must have budgets of layers, parameters or both, or only a list"
        )
    wanted = ["budget", "protected"]
    wanted = ["evaluator", *wanted] if method.calibrated else [*wanted, "num_steps"] if method.searches else wanted
    parameters = inspect.signature(method.function).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) != len(wanted):
        raise MegapruneError(
            f"the method {method.name!r} must take ({', '.join(wanted)}), and flags as keyword-only parameters"
        )


def _origin(method: Method) -> tuple[str, str]:
    return method.function.__module__, method.function.__qualname__
