"""What a client issued, and whether the shim's statistics say the same.

A client counts with Issued, and writes to FLASHCOMM_SCRATCH at its end. When it has ended, `check` compares
with what the shim wrote there (FLASHCOMM_STATS_FILE=FOLDER/stats.%p.json), for each of the ranks.
"""

import json
import os
import pathlib


class Issued:
    def __init__(self, rank, world):
        self.rank, self.world = rank, world
        self.compressed = self.bytes_in = self.others = 0

    def sum16(self, n_bytes):
        """A sum all-reduce of fp16 or bf16."""
        self.compressed += 1
        self.bytes_in += n_bytes

    def other_all_reduce(self):
        self.others += 1

    def write(self):
        path = pathlib.Path(os.environ["FLASHCOMM_SCRATCH"], f"issued.{self.rank}.json")
        path.write_text(json.dumps(dict(vars(self), pid=os.getpid())))


def counted(path):
    """The shim's own counts: (compressed, bytes in, bytes on the wire, other all-reduces: forwarded, and exact ones)."""
    stats = json.loads(path.read_text())["process"]
    compressed, bytes_in, bytes_wire = (stats[name] for name in ["all_reduces_compressed", "bytes_in", "bytes_wire"])
    return compressed, bytes_in, bytes_wire, stats["all_reduces_forwarded"] + stats["all_reduces_exact"]


def check(folder, ranks, bits):
    """Wants each of the ranks to have issued what the shim counted, with the bytes of a width."""
    folder, bits = pathlib.Path(folder), float(bits)
    files = sorted(folder.glob("issued.*.json"))
    assert len(files) == ranks, f"{len(files)} of {ranks} ranks came to their end"
    for file in files:
        issued = json.loads(file.read_text())
        compressed, bytes_in, bytes_wire, others = counted(folder / f"stats.{issued['pid']}.json")
        said = (compressed, bytes_in, others)
        expected = (issued["compressed"], issued["bytes_in"], issued["others"])
        assert said == expected, f"rank {issued['rank']}: the shim counted {said}, the client issued {expected}"
        # Both hops together: every rank sends all chunks but its own, and its own to all others.
        share = 2 * (ranks - 1) / ranks * (bits + 0.75) / 16  # blocks of 8, groups of 64
        assert abs(bytes_wire / bytes_in - share) < 0.05 * share, f"{bytes_wire / bytes_in:.4f} of the bytes, not {share:.4f}"
    print(f"{ranks} ranks: {compressed} all-reduces compressed each, {bytes_wire / bytes_in:.3f} of their bytes on the wire, "
          f"{others} not compressed; as issued")


def check_devices(folder):
    """Wants one process, whose devices are the ranks, to have issued no more than the shim counted: its library may
    sum for itself, too."""
    folder = pathlib.Path(folder)
    issued = json.loads((folder / "issued.0.json").read_text())
    path = folder / f"stats.{issued['pid']}.json"
    assert path.exists(), "no call of NCCL came to the shim"
    compressed, bytes_in, bytes_wire, others = counted(path)
    said = (compressed, bytes_in, others)
    expected = (issued["compressed"], issued["bytes_in"], issued["others"])
    assert all(s >= e for s, e in zip(said, expected)), f"the shim counted {said}, the client issued {expected}"
    print(f"{issued['world']} devices: {compressed} all-reduces compressed, {bytes_wire / bytes_in:.3f} of their bytes on the "
          f"wire, {others} not compressed")
