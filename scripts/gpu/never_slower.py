"""Whether the shim, set as users have it, is anywhere slower than NCCL: from 256 bytes to 256 MiB.

`flashcomm bench` measures both in one run, eager and in a graph. The shim is left to decide: small sums are exact or go to
NCCL, large ones are compressed, at 8 bits and at 4. Medians of one round differ by some percent from
run to run, most where both do the same. So sizes that seem slower are measured again, in three
rounds, and those that are slower each time count.
"""

import json

from harness import FLASHCOMM

SIZES = "256..256M"  # every power of two
DEFAULTS = ["--bits", "8,4", "--exchanges", "auto", "--min-bytes", "auto", "--graph", "--batches", 7]
SLOWER = 0.97  # NCCL's time over ours, from there down
AGAIN = 3  # how often at most


def slower(result):
    """What is slower: (ranks, in a graph, bits, bytes), each with what is said of it."""
    found = {}
    for row in result["comparisons"]:
        for ours in row["flashcomm"]:
            ratio = ours["ratio"]
            if ratio is None or ratio < SLOWER:
                bits = ours["way"]["flashcomm"]["bits"]
                found[row["world"], row["graph"], bits, row["n_bytes"]] = in_words(row, ours, bits)
    return found


def in_words(row, ours, bits):
    how = "in a graph" if row["graph"] else "eager"
    case = f"{row['world']} ranks, {how}, {bits} bits, {row['n_bytes']} bytes, {ours.get('route') or 'mixed'}"
    if ours["ratio"] is None:
        return f"{case}: NCCL was not measured"
    return f"{case}: {ours['us']:.1f} us, NCCL {row['nccl_us']:.1f} us, {ours['ratio']:.2f}x"


def check(runner, nccl, to, worlds, *options, **settings):
    """Measures to the file `to`, and fails where a size is slower each time; what was measured again is beside it."""
    command = [FLASHCOMM, "bench", "--nccl-lib", nccl, "--worlds", worlds, *DEFAULTS, *options]
    runner.measure([*command, "--sizes", SIZES, "--rounds", 1], 300, to, **settings)
    left = slower(json.loads(to.read_text()))
    print(f"below {SLOWER}x of NCCL's speed in one round:", *left.values(), sep="\n  ")
    for number in range(AGAIN):
        if not left:
            return
        sizes = ",".join(str(n_bytes) for n_bytes in sorted({n_bytes for *_, n_bytes in left}))
        again = to.with_name(f"{to.stem}-again{number}.json")
        runner.measure([*command, "--sizes", sizes, "--rounds", 3], 280, again, **settings)
        now = slower(json.loads(again.read_text()))
        left = {case: now[case] for case in left if case in now}
    assert not left, "\n  ".join([f"below {SLOWER}x of NCCL's speed each time:", *left.values()])
