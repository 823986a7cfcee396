"""Fuzz every file that a user can hand in: `python -m tests.fuzz [--inputs N] [--seed N] [--kind KIND] [--replay KIND SEED]`."""

import argparse
import os
import sys
import tempfile
import time

from tests.fuzz.campaign import campaign
from tests.fuzz.child import command, examine
from tests.fuzz.kinds import KINDS


def main() -> int:
    """Returns 1 where an input did what none may do."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--replay", nargs=2, metavar=("KIND", "SEED"))
    asked = parser.parse_args()
    if asked.replay:
        kind, seed = asked.replay[0], int(asked.replay[1])
        arguments, files = command(kind, seed)
        print("crossdock", *arguments)
        for name, data in files.items():
            print(f"--- {name} ({len(data)} bytes)\n{data[:4000]!r}")
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            print(examine(kind, seed))
        return 0
    begin_s = time.monotonic()
    tally = campaign(asked.inputs, asked.seed, tuple(asked.kind or KINDS))
    for kind in KINDS:
        codes = {code: count for (of, code), count in sorted(tally.codes.items()) if of == kind}
        print(f"{kind:>14}  {sum(codes.values()):>6} inputs; exit codes", ", ".join(f"{code}: {count}" for code, count in codes.items()))
    for finding in tally.findings:
        print(f"\n{finding.kind} {finding.seed}: {finding.problem}")
    print(f"\n{tally.inputs} inputs in {time.monotonic() - begin_s:.0f} s; slowest {tally.slowest[0]:.2f} s of CPU ({tally.slowest[1]})")
    print(f"{len(tally.findings)} of them did what none may do")
    return 1 if tally.findings else 0


if __name__ == "__main__":
    sys.exit(main())
