"""Any number of seeded programs against their joint tables: `make fuzz N=3000 SEED=1000`.

Prints how many were right, refused and wrong, why programs that have an answer were refused, and each wrong one with
its seed, what it is made of and what came of it. The exit status is 1 where any was wrong.
"""

import argparse
import re
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import torch
from seeded_checks import Verdict, verdict_on
from seeded_programs import KINDS, program_spec

PER_TASK = 25
WORDS = ("right", "refused", "wrong")


def verdicts(seeds: range, without: tuple[str, ...]) -> list[Verdict]:
    """What came of some programs."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    return [verdict_on(program_spec(seed, without)) for seed in seeds]


def nameless(message: str) -> str:
    """A message without names and numbers, which differ from program to program."""
    return re.sub(r"-?\d+(\.\d+)?", "#", re.sub(r"'[^']*'|\[[^\]]*\]", "'...'", message))


def main() -> int:
    """Runs the programs that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=3000, help="how many")
    parser.add_argument("--seed", type=int, default=1000, help="the first seed; the others follow it")
    parser.add_argument("--without", nargs="*", default=[], choices=KINDS, help="kinds that no program is to have")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    words, kinds, reasons = Counter[str](), Counter[tuple[str, str]](), Counter[str]()
    seeds = range(options.seed, options.seed + options.programs)
    tasks = [seeds[n : n + PER_TASK] for n in range(0, len(seeds), PER_TASK)]
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        for found in pool.map(partial(verdicts, without=tuple(options.without)), tasks):
            for verdict in found:
                words[verdict.word] += 1
                kinds.update((kind, verdict.word) for kind in verdict.spec.kinds)
                reasons.update({nameless(f.found): 1 for f in verdict.findings if f.verdict == "refused"})
                if verdict.word == "wrong":
                    print(verdict, "\n", flush=True)
            if sys.stderr.isatty():
                print(f"\r{sum(words.values())} of {len(seeds)}", end="\r", file=sys.stderr)
    print(f"seeds {seeds.start} to {seeds.stop - 1}:", ", ".join(f"{words[word]} {word}" for word in WORDS))
    for kind in sorted({kind for kind, _ in kinds}):
        print(f"  {kind:10}", ", ".join(f"{kinds[kind, word]:5} {word}" for word in WORDS))
    for reason, count in reasons.most_common():
        print(f"{count:5} refused: {reason}")
    return 1 if words["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
