"""What an initialisation did: per-module energies and choices, as a table, a picture and a file.

:class:`FiletReport` is what :func:`filet.initialize_lora_filet_weights` and
:func:`filet.apply_statistics` return. It is plain data on the CPU, so that it can be printed
(:meth:`FiletReport.table`), drawn (:meth:`FiletReport.plot`), saved beside the adapter
(:meth:`FiletReport.save`) and read back later without the model (:meth:`FiletReport.load`).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from filet.report.modules import ModuleReport
from filet.report.names import REPORT_FILE
from filet.report.page import page
from filet.report.plot import caption_of, picture
from filet.report.table import HEADER, cells, entries_of, rows, summary
from filet.report.weights import check_beside, digest_of
from filet.system.files import replaced
from filet.system.tensorfile import write_tensors

__all__ = ["FiletReport"]

_FORMAT = "filet_report"

_VERSION = "2"


@dataclass(frozen=True, eq=False)
class FiletReport:
    """The outcome for a whole model. Every mapping is in the model's order.

    Attributes:
        modules: module name -> what was chosen for it.
        left_default: module name -> why it kept PEFT's default LoRA initialisation.
        seconds: phase -> seconds of wall-clock time.
        peak_memory: bytes; on CUDA the peak allocated, on a CPU the peak resident set.
        samples: samples that went through the model.
        tokens: positions counted, padding excluded.
        loss_terms: labels that entered the loss.
        config: the :class:`filet.FiletConfig` as a JSON-able dict; of how the data were read only
            what the statistics say.
        data: of :class:`filet.Statistics`: which samples they were; 0 where it is not known.
        keep: of the data to keep by which directions were chosen, how many "samples" and "tokens"
            there were and where they came "from" (:class:`filet.Statistics`); empty without.
    """

    modules: dict[str, ModuleReport]
    left_default: dict[str, str]
    seconds: dict[str, float]
    peak_memory: int
    samples: int
    tokens: int
    loss_terms: int
    config: dict[str, Any]
    data: int = 0  # reports of 0.1 do not say it
    keep: dict[str, Any] = field(default_factory=dict)

    def table(self) -> str:
        """A table for a terminal: one row a module, then summary lines.

        Plain ASCII, at most 100 columns wide; names that do not fit lose their common prefix
        first and then as much of their beginning as is needed.
        """
        lines = [*rows(self.modules), ""] if self.modules else []
        return "\n".join([*lines, *summary(self._entries())])

    def _entries(self) -> list[tuple[str, str]]:
        return entries_of(
            list(self.modules.values()),
            samples=self.samples,
            tokens=self.tokens,
            loss_terms=self.loss_terms,
            data=self.data,
            keep=self.keep,
            config=self.config,
            seconds=self.seconds,
            peak_memory=self.peak_memory,
            left_default=self.left_default,
        )

    def page(self, title: str) -> str:
        """The table and the picture as one HTML file, which opens offline.

        Raises ImportError where matplotlib is not installed and there is something to draw.
        """
        pictures = (
            [("energies of every layer, the chosen directions marked", self._picture())]
            if self.modules
            else []
        )
        table = [(name, *cells(module)) for name, module in self.modules.items()]
        return page(title, self._entries(), pictures, ("module", *HEADER), table)

    def _picture(self) -> bytes:
        modules = list(self.modules.values())
        select = str(self.config.get("select", ""))
        return picture(modules, caption_of(modules, select, self.samples, self.tokens))

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the energies of every layer as a PNG file, the chosen directions marked.

        One panel a kind of module (``q_proj``, ``down_proj``, ...), the layer to the right and
        the energy upwards on a log scale: bands for all directions, the middle 90 % and the middle
        half of them, the median, and a mark for every chosen direction. Zero energies are drawn
        on a line below the smallest positive one.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: the report holds no module.
            OSError: the file cannot be written; an existing one is left as it was.
        """
        if not self.modules:
            raise ValueError("the report holds no initialised module: there is nothing to draw")
        drawn = self._picture()
        with replaced(path) as beside:
            beside.write_bytes(drawn)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``filet_report.safetensors`` into ``folder`` and return its path.

        The energies and indices are the tensors ``<module>.energies`` and ``<module>.indices``;
        the rest is JSON under ``report`` in the metadata. Beside it is a hash of the adapter's
        weights where they lie in the folder already, by which :meth:`load` knows them again.

        Raises:
            OSError: the file cannot be written; an existing one is left as it was.
        """
        tensors: dict[str, torch.Tensor] = {}
        described: list[dict[str, Any]] = []
        for name, module in self.modules.items():
            its_tensors, values = module.parts()
            tensors |= its_tensors
            described.append({"key": name, **values})
        content = {each.name: getattr(self, each.name) for each in fields(self)}
        content["data"] = f"{self.data:x}"
        del content["modules"]  # they come last
        content["modules"] = described
        metadata = {"format": _FORMAT, "version": _VERSION, "report": json.dumps(content)}
        metadata["adapter"] = digest_of(Path(folder))
        path = Path(folder) / REPORT_FILE
        write_tensors(path, tensors, metadata)
        return path

    @classmethod
    def load(cls, folder_or_file: str | os.PathLike[str]) -> FiletReport:
        """Read a report that :meth:`save` wrote, from its folder or from the file itself.

        From a folder the adapter beside it is looked at: a warning where that was saved again
        since, which may be after training.

        Raises:
            FileNotFoundError: there is no such file, or no report in the folder.
            ValueError: the file is not a filet report, or of a version this package cannot read; or
                the adapter in the folder has other modules or ranks.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(folder_or_file)
        folder = path if path.is_dir() else None
        if folder is not None:
            path = folder / REPORT_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"no filet report at {path}; expected what filet init wrote, or save_as_lora with "
                "report= (two folders of adapters are compared without)"
            )
        try:
            with safe_open(str(path), framework="pt", device="cpu") as file:
                metadata = file.metadata() or {}
                _check_format(path, metadata)
                content = json.loads(metadata["report"])
                modules: dict[str, ModuleReport] = {}
                for described in content.pop("modules"):
                    key = described.pop("key")
                    modules[key] = ModuleReport.of_parts(file.get_tensor, described)
            content["data"] = int(content.get("data", "0"), 16)
            report = cls(modules=modules, **content)
        except (SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a readable filet report: {error}") from error
        if folder is not None:
            check_beside(folder, modules, metadata.get("adapter", ""))
        return report


def _check_format(path: Path, metadata: dict[str, str]) -> None:
    """ValueError for a file that is not a report, or of another version."""
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            f"{path} is not a filet report: its metadata says "
            f"format={metadata.get('format')!r}, expected {_FORMAT!r}"
        )
    if metadata.get("version") != _VERSION:
        raise ValueError(
            f"{path} is a filet report of version {metadata.get('version')!r}; "
            f"this package reads version {_VERSION!r}"
        )
