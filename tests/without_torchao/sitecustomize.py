"""With this folder on PYTHONPATH, Python and all that it starts finds no torchao.

PEFT 0.18 imports a name from torchao wherever torchao is installed, for a plain layer as well, and
torchao 0.18 has it no longer. PEFT 0.19 does not ask for it, and no test of `oldest_peft.py` is
about torchao.
"""

import sys

sys.modules["torchao"] = None  # type: ignore[assignment]  # find_spec is None, an import fails
