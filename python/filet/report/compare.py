"""Two adapters or two files of statistics, module by module: how alike they are.

Of adapters: the overlap of the spaces that their A span, the mean squared cosine of the principal
angles,
    ‖Q₁ᵀ Q₂‖²_F / min(r₁, r₂),
with orthonormal bases Q (n, r) of A's rows: 1 where one space holds the other, max(r₁, r₂)/n on
average by chance. Beside it the energies of what either chose, from the reports. Of statistics:
    ⟨S₁, S₂⟩_F / (‖S₁‖_F ‖S₂‖_F)
of the two sides' second moments, which is 1 where they are the same but for a factor.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from filet.report.names import FILET_FILE, MARK, REPORT_FILE, WEIGHTS_FILE
from filet.report.page import page
from filet.report.report import FiletReport
from filet.report.table import lines_of, scientific, summary
from filet.report.weights import PREFIX, SUFFIX
from filet.system.tensorset import find_index, metadata_of, opened
from filet.system.text import plural

__all__ = [
    "Alike",
    "Comparison",
    "basis",
    "compare_adapters",
    "compare_statistics",
    "is_statistics",
    "mean_squared_cosine",
    "overlap",
]

_STATISTICS = "filet-statistics-"  # how the format of such a file begins


@dataclass(frozen=True)
class Alike:
    """Two things of one module. What does not apply, or is not known, is None.

    Attributes:
        name: of the module.
        ranks: of the two adapters; the spaces of the two input moments, of statistics.
        overlap: of the two spaces of A; of statistics, the cosine of the input moments.
        chance: what the overlap is on average for random spaces.
        output: of statistics, the cosine of the output moments.
        common: how many directions of W both chose, where both chose by energy.
        energies: medians of the energies (or eigenvalues) of what each chose.
    """

    name: str
    ranks: tuple[int | str, int | str]
    overlap: float | None
    chance: float | None = None
    output: float | None = None
    common: int | None = None
    energies: tuple[float | None, float | None] = (None, None)


def overlap(first: Tensor, second: Tensor) -> float:
    """Of the spaces that the rows of two factors (r, n) span. Rows of zeros span nothing.

    NaN where either spans nothing.
    """
    return mean_squared_cosine(basis(first), basis(second))


def mean_squared_cosine(Q: Tensor, other: Tensor) -> float:
    """Of the principal angles between two spaces, by orthonormal bases (n, r); NaN for an empty."""
    least = min(Q.shape[1], other.shape[1])
    return float((Q.T @ other).square().sum() / least) if least else float("nan")


def basis(A: Tensor) -> Tensor:
    """An orthonormal basis (n, at most r), float64, of A's rows (r, n), whatever their lengths.

    What rounding adds is no direction. Rounded to a dtype of machine epsilon ε, rows of length 1
    that span less than r dimensions get singular values up to about 0.4 ε beyond; the cut-off is ε
    of the largest, and at least 1e-6, as A may have been computed in float32.
    """
    rows = A.double()
    rows = torch.nn.functional.normalize(rows[rows.any(1)], dim=1)
    _, sigma, Vh = torch.linalg.svd(rows, full_matrices=False)
    least = max(1e-6, torch.finfo(A.dtype).eps)
    found: Tensor = Vh[sigma > least * sigma[:1].sum()].T
    return found


def compare_adapters(first: Path, second: Path) -> list[Alike]:
    """The modules that both folders' adapters have, in the order of the model.

    Raises FileNotFoundError for a folder without an adapter, ValueError where no module is in both
    or one is of another width.
    """
    factors = [_factors(folder) for folder in (first, second)]
    reports = [_report(folder) for folder in (first, second)]
    found = []
    for name in _in_order(factors[0], reports):
        A, other = factors[0][name], factors[1].get(name)
        if other is None:
            continue
        if other.shape[1] != A.shape[1]:
            raise ValueError(
                f"{name} takes vectors of {A.shape[1]} in {first} and of {other.shape[1]} in "
                f"{second}; expected adapters of one model"
            )
        modules = [None if report is None else report.modules.get(name) for report in reports]
        medians = [
            float(m.chosen().median()) if m is not None and m.rank else None for m in modules
        ]
        one, two = modules
        common = None
        if one is not None and two is not None and one.kind == two.kind == "energy":
            common = len(set(one.indices.tolist()) & set(two.indices.tolist()))
        ranks, n = (len(A), len(other)), A.shape[1]
        found.append(
            Alike(
                name,
                ranks,
                overlap(A, other),
                max(ranks) / n,
                common=common,
                energies=(medians[0], medians[1]),
            )
        )
    if not found:
        raise ValueError(f"{first} and {second} have no module in common")
    return found


def _in_order(names: Iterable[str], reports: Iterable[FiletReport | None]) -> list[str]:
    """As a report has them; a file sorts them by their letters."""
    known = [name for report in reports if report is not None for name in report.modules]
    places = {name: place for place, name in reversed(list(enumerate(known)))}

    def key(name: str) -> tuple[int, list[tuple[int, str]]]:
        parts = [(int(p), "") if p.isdecimal() else (-1, p) for p in name.split(".")]
        return places.get(name, len(known)), parts

    return sorted(names, key=key)


def _factors(folder: Path) -> dict[str, Tensor]:
    """Module → the A that trains: of an adapter with a frozen half, the first rows."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no {WEIGHTS_FILE} in {folder}; expected an adapter's folder")
    halves: dict[str, int] = {}
    if (folder / FILET_FILE).is_file():
        layers = json.loads((folder / FILET_FILE).read_text())["layers"]
        halves = {name: layer["rank"] for name, layer in layers.items()}
    found = {}
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            if halves and MARK not in (file.metadata() or {}):
                raise ValueError(
                    f"{folder / FILET_FILE} describes another adapter than lies beside it, which "
                    "has no frozen half; expected them of one save"
                )
            for key in file.keys():
                if key.startswith(PREFIX) and key.endswith(SUFFIX):
                    name = key.removeprefix(PREFIX).removesuffix(SUFFIX)
                    found[name] = file.get_tensor(key)[: halves.get(name)]
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    if not found:
        raise ValueError(f"{path} has no LoRA factor of a linear layer")
    return found


def _report(folder: Path) -> FiletReport | None:
    return FiletReport.load(folder) if (folder / REPORT_FILE).is_file() else None


def is_statistics(path: Path) -> bool:
    """Whether it is a file, or the name of several, that :meth:`filet.Statistics.save` wrote."""
    if not path.is_file() and find_index(path) is None:
        return False
    try:
        return str(metadata_of(path).get("format")).startswith(_STATISTICS)
    except ValueError:
        return False


def compare_statistics(first: Path, second: Path) -> list[Alike]:
    """The modules that both files have, in the first one's order; one moment in memory at a time.

    Moments in two spaces are not compared. ValueError where no module is in both, and
    as :meth:`filet.Statistics.load`.
    """
    found: list[Alike] = []
    with opened(first) as one, opened(second) as two:
        modules = [json.loads(f.metadata["statistics"])["modules"] for f in (one, two)]
        cosines: dict[tuple[str, str], float | None] = {}
        for name, mine in modules[0].items():
            theirs = modules[1].get(name)
            if theirs is None:
                continue
            for side in ("input", "output"):
                keys = mine[side], theirs[side]
                if keys not in cosines:
                    spaces = [key.rpartition(".")[2] for key in keys]
                    sums = [file[f"{key}.sum"] for file, key in zip((one, two), keys, strict=True)]
                    alike = spaces[0] == spaces[1] and sums[0].shape == sums[1].shape
                    cosines[keys] = _cosine(*sums) if alike else None
            spaces = [each["input"].rpartition(".")[2] for each in (mine, theirs)]
            sides = [cosines[mine[side], theirs[side]] for side in ("input", "output")]
            found.append(Alike(name, (spaces[0], spaces[1]), sides[0], output=sides[1]))
    if not found:
        raise ValueError(f"{first} and {second} have no module in common")
    return found


def _cosine(first: Tensor, second: Tensor) -> float:
    """Of two symmetric matrices, of which the lower triangles are there."""

    def product(a: Tensor, b: Tensor) -> float:
        # Row by row: a float64 copy of 28672² would take 6.6 GB.
        off, on = 0.0, 0.0
        for start in range(0, len(a), 1024):
            rows = slice(start, start + 1024)
            off += float((a[rows].double() * b[rows].double()).sum())
            on += float((a.diagonal()[rows].double() * b.diagonal()[rows].double()).sum())
        return 2 * off - on

    lengths = product(first, first) * product(second, second)
    return product(first, second) / lengths**0.5 if lengths > 0 else float("nan")


@dataclass(frozen=True)
class Comparison:
    """Two adapters' folders, or two files of statistics, and what both have."""

    first: Path
    second: Path
    modules: list[Alike]
    adapters: bool

    @classmethod
    def of(cls, first: Path, second: Path) -> Comparison:
        """Read the two. Raises as :func:`compare_adapters` and :func:`compare_statistics`."""
        kinds = [is_statistics(path) for path in (first, second)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"{(second, first)[kinds[0]]} is no file of statistics and "
                f"{(first, second)[kinds[1]]} is one; expected two of a kind"
            )
        compare = compare_statistics if kinds[0] else compare_adapters
        return cls(first, second, compare(first, second), adapters=not kinds[0])

    def table(self) -> str:
        """For a terminal, as :meth:`filet.FiletReport.table`."""
        names, cells = [each.name for each in self.modules], list(map(self._cells, self.modules))
        return "\n".join([*lines_of(self._header(), names, cells), "", *summary(self._said())])

    def picture(self) -> bytes:
        """The overlaps (of statistics the inputs' cosines) as a PNG file."""
        return self._pictures()[0][1]

    def _pictures(self) -> list[tuple[str, bytes]]:
        """What each shows, and it."""
        from filet.report.heat import heat_map

        shown = {"overlap of the spaces of A": [(m.name, m.overlap) for m in self.modules]}
        if not self.adapters:
            shown = {
                "cosine of the input moments": [(m.name, m.overlap) for m in self.modules],
                "cosine of the output moments": [(m.name, m.output) for m in self.modules],
            }
        names = " and ".join(path.name for path in (self.first, self.second))
        return [
            (f"{what}, of every layer", heat_map(values, f"{names}: {what}"))
            for what, values in shown.items()
        ]

    def page(self) -> str:
        """Table and picture as one HTML file, which opens offline."""
        rows = [(each.name, *self._cells(each)) for each in self.modules]
        title = f"FILet: {self.first.name} and {self.second.name}"
        return page(title, self._said(), self._pictures(), ("module", *self._header()), rows)

    def _header(self) -> tuple[str, ...]:
        if not self.adapters:
            return ("moments", "input", "output")
        return ("ranks", "overlap", "chance", "common", "chosen 1", "chosen 2")

    def _cells(self, each: Alike) -> tuple[str, ...]:
        kinds = " ".join(map(str, each.ranks))
        if not self.adapters:
            return (kinds, _ratio(each.overlap), _ratio(each.output))
        common = "-" if each.common is None else str(each.common)
        energies = ["-" if energy is None else scientific(energy) for energy in each.energies]
        return (kinds, _ratio(each.overlap), _ratio(each.chance), common, *energies)

    def _said(self) -> list[tuple[str, str]]:
        entries = [("first", str(self.first)), ("second", str(self.second))]
        if self.adapters:
            chance = statistics.median(_known(each.chance for each in self.modules))
            of = f"mean squared cosine of the spaces of A, {chance:.3f} by chance"
            entries += self._extent("overlap", [each.overlap for each in self.modules], of)
            entries.append(("common", "directions of W that both chose by their energy"))
            entries.append(("chosen 1, 2", "median energies (or eigenvalues) of what each chose"))
            return entries
        of = "cosine of the second moments of x or y"
        entries += self._extent("input", [each.overlap for each in self.modules], of)
        of = "cosine of the second moments of g or h"
        return entries + self._extent("output", [each.output for each in self.modules], of)

    def _extent(self, label: str, values: list[float | None], of: str) -> list[tuple[str, str]]:
        known = _known(values)
        if not known:
            return []
        least, most = min(known), max(known)
        text = f"{of}; median {statistics.median(known):.3f}, {least:.3f} to {most:.3f}"
        return [(label, f"{text}, of {plural(len(known), 'module')}")]


def _ratio(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.3f}"


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and value == value]
