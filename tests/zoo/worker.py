"""A process that judges cases: one fork each, so that neither a crash nor a leak reaches the next.

It reads names on standard input and answers each with one line of JSON on standard output; with ``--reasons``
every dimension that stays is explained.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import warnings
from importlib import import_module
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: its names are plain words

import torch  # noqa: E402

torch.set_num_threads(1)
warnings.simplefilter("ignore")

from zoo.operators import import_torchvision  # noqa: E402

import_torchvision()  # lightning imports it where it finds one, so it comes first

from zoo.catalogue import CASES  # noqa: E402
from zoo.judge import Verdict, judge  # noqa: E402

_LIBRARIES = {
    "hard_ops": ("scipy.optimize", "scipy.sparse.csgraph"),
    "timm": ("timm",),
    "huggingface": (
        "transformers.modeling_utils",
        "transformers.generation.utils",
        "transformers.pytorch_utils",
    ),
}
WALL = 1800  # seconds that a case may take in all, on a busy machine
HARD = 16 * 2**30


def answer(name: str) -> Verdict:
    """Judge a case in a child of its own."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing that a library prints may reach the protocol
        resource.setrlimit(resource.RLIMIT_DATA, (HARD, HARD))
        resource.setrlimit(resource.RLIMIT_CPU, (WALL, WALL))
        with os.fdopen(write, "w") as out:
            json.dump(judge(CASES[name], reasons="--reasons" in sys.argv).as_dict(), out)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as source:
        text = source.read()
    _, status = os.waitpid(child, 0)
    if text:
        return Verdict(**json.loads(text))
    return Verdict(name, "crash", f"the process ended with status {status}")


def warm(name: str) -> None:
    """Import a case's library here, once for all of its cases."""
    library = name.partition("/")[0]
    for module in _LIBRARIES.get(library, ()):
        import_module(module)


def main() -> None:
    """Serve until standard input ends."""
    for line in sys.stdin:
        warm(line.strip())
        sys.stdout.write(json.dumps(answer(line.strip()).as_dict()) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
