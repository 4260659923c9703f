"""Judge cases from the command line: ``python tests/zoo/run.py 'timm/*vit*' [--to results.jsonl]``."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: its names are plain words
from zoo.operators import import_torchvision  # noqa: E402

import_torchvision()  # lightning imports it where it finds one, so it comes first

from zoo.catalogue import matching  # noqa: E402
from zoo.judge import Verdict  # noqa: E402
from zoo.server import Server  # noqa: E402


def line(v: Verdict) -> str:
    """One line of the table."""
    share = v.after / v.before if v.before else 1.0
    unknown = f" unknown: {v.unknown[0]} (+{len(v.unknown) - 1})" if v.unknown else ""
    return f"{v.name:42} {v.status:10} {share:5.2f} {v.analysis:6.1f} {v.cut:6.1f}  {v.detail[:150]}{unknown}"


def main() -> None:
    """Run what matches, print a table, append the verdicts to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("globs", nargs="*")
    parser.add_argument("--to", type=Path)
    parser.add_argument("--trace", action="store_true", help="print the last frames of errors")
    parser.add_argument("--reasons", action="store_true", help="have what stays explained, in the file")
    given = parser.parse_args()
    found: Counter[str] = Counter()
    with Server(reasons=given.reasons) as server:
        for name in matching(given.globs):
            v = server.verdict(name)
            found[v.status] += 1
            sys.stdout.write(line(v) + "\n" + "".join(f"      {t}\n" for t in v.trace if given.trace))
            sys.stdout.flush()
            if given.to is not None:
                with given.to.open("a") as out:
                    out.write(json.dumps(v.as_dict()) + "\n")
    sys.stdout.write(", ".join(f"{n} {status}" for status, n in found.most_common()) + "\n")


if __name__ == "__main__":
    main()
