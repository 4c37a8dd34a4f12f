"""Few configs that serve all tuned problems: a minimum set cover over measured losses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..spec import Config
from .cells import Row, Table, mean_loss, missing_cells
from .space import config_key

NODE_LIMIT = 100_000  # of the exact search; beyond it the best cover so far is kept and said to be one
LOSS_STEP = 0.01  # losses closer than that are not told apart
UNKNOWN_REGISTERS = 256  # more than a thread can have: what is known goes first

Rank = tuple[float, ...]  # of a config among those that cover alike; smaller is better


@dataclass(frozen=True)
class Served:
    """A problem, the config of the cover that loses least on it, and that loss."""

    row: Row
    config: Config
    loss: float


@dataclass(frozen=True)
class Cover:
    """The smallest set found whose loss is at most `bound` on every problem of the table."""

    table: Table
    bound: float
    configs: tuple[Config, ...]  # those that serve most problems first
    served: tuple[Served, ...]
    exact: bool  # proven to be the smallest for what is measured
    unknown: int  # cells of today's winners that nobody measured: with them the set might be smaller

    @property
    def before(self) -> int:
        """Different configs that serve today."""
        return len(self.table.winner_configs)

    @property
    def worst(self) -> Served:
        """The problem that loses most."""
        return max(self.served, key=lambda served: served.loss)

    @property
    def mean(self) -> float:
        """Geometric mean of the losses."""
        return mean_loss([served.loss for served in self.served])


def choose_cover(table: Table, bound: float) -> Cover:
    """A cover of all rows: each has a cell that loses nothing; what is not measured is not relied on."""
    configs: dict[str, Config] = {}
    rows_of: dict[str, set[int]] = {}
    for index, row in enumerate(table.rows):
        for key, cell in row.cells.items():
            if cell.loss <= bound:
                configs[key] = cell.config
                rows_of.setdefault(key, set()).add(index)
    keys = sorted(configs)
    ranks = [_rank(table, configs[key], rows_of[key]) for key in keys]
    chosen, exact = solve_cover([frozenset(rows_of[key]) for key in keys], ranks, NODE_LIMIT)
    found = [keys[index] for index in chosen]
    todays = [config_key(config) for config in table.winner_configs]
    if len(found) == len(todays) and all(row.cells[row.own_key].loss <= bound for row in table.rows):
        found = todays  # as many configs as now would save nothing for what they lose
    served = tuple(_serve(row, found) for row in table.rows)
    count = Counter(config_key(one.config) for one in served)
    order = sorted(found, key=lambda key: (-count[key], key))
    return Cover(table, bound, tuple(configs[key] for key in order), served, exact, len(missing_cells(table)))


def _serve(row: Row, keys: Sequence[str]) -> Served:
    """The config that loses least; the stored winner where others are as good."""
    best = min((key for key in keys if key in row.cells), key=lambda k: (row.cells[k].loss, k != row.own_key, k))
    return Served(row, row.cells[best].config, row.cells[best].loss)


def _rank(table: Table, config: Config, rows: set[int]) -> Rank:
    """Mean loss as far as it is told from noise, registers of a thread, parameters that differ from the default."""
    key = config_key(config)
    registers = [_registers(table.rows[index], key) for index in rows]
    defaults = [table.spec.default_config(table.rows[index].problem) for index in rows]
    steps = sum(config.get(name) != value for default in defaults for name, value in default.items())
    loss = mean_loss([table.rows[index].cells[key].loss for index in rows])
    return float(loss // LOSS_STEP), float(min(registers)), steps / len(rows)


def _registers(row: Row, key: str) -> int:
    trial = row.cells[key].trial
    resources = row.winner.resources if trial is None and key == row.own_key else trial.resources if trial else None
    return int((resources or {}).get("registers", UNKNOWN_REGISTERS))


def solve_cover(sets: Sequence[frozenset[int]], ranks: Sequence[Rank], node_limit: int) -> tuple[list[int], bool]:
    """Indices of the best cover of the union of `sets`, and whether it is proven.

    Best is the fewest sets, then the most elements counted by set, then the smallest sum of ranks. The proof is given
    up after `node_limit` steps.
    """
    usable = _undominated(sets, ranks)
    best = _greedy(sets, usable)
    score = _score(best, sets, ranks)
    for nodes, found in enumerate(_covers(sets, usable, len(best)), start=1):
        if found is not None and _score(found, sets, ranks) < score:
            best, score = found, _score(found, sets, ranks)
        if nodes >= node_limit:
            return sorted(best), False
    return sorted(best), True


def _undominated(sets: Sequence[frozenset[int]], ranks: Sequence[Rank]) -> list[int]:
    """Indices without those whose elements another set has too: exchanging the two never makes a cover worse."""
    kept: list[int] = []
    for index in sorted(range(len(sets)), key=lambda i: (-len(sets[i]), ranks[i], i)):
        if sets[index] and not any(sets[index] <= sets[other] for other in kept):
            kept.append(index)
    return kept


def _greedy(sets: Sequence[frozenset[int]], usable: Sequence[int]) -> list[int]:
    left = set().union(*(sets[index] for index in usable))
    found: list[int] = []
    while left:
        index = max(usable, key=lambda i: len(sets[i] & left))  # the first of equals has the better rank
        found.append(index)
        left -= sets[index]
    return found


def _covers(sets: Sequence[frozenset[int]], usable: Sequence[int], limit: int) -> Iterator[list[int] | None]:
    """Every cover of at most as many sets as the smallest so far, depth first; None for steps on the way."""
    everything = frozenset().union(*(sets[index] for index in usable))
    holders = {element: [index for index in usable if element in sets[index]] for element in everything}
    largest = max((len(sets[index]) for index in usable), default=1)
    size = limit
    stack: list[tuple[list[int], frozenset[int]]] = [([], everything)]
    while stack:
        chosen, left = stack.pop()
        if not left:
            size = min(size, len(chosen))
            yield chosen
            continue
        yield None
        if len(chosen) + -(-len(left) // largest) > size:
            continue
        hardest = min(left, key=lambda element: (len(holders[element]), element))
        stack += [([*chosen, index], left - sets[index]) for index in reversed(holders[hardest])]


def _score(chosen: Sequence[int], sets: Sequence[frozenset[int]], ranks: Sequence[Rank]) -> tuple[object, ...]:
    totals = tuple(sum(column) for column in zip(*(ranks[index] for index in chosen), strict=True))
    return len(chosen), -sum(len(sets[index]) for index in chosen), totals, sorted(chosen)
