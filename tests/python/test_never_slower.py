"""What scripts/gpu/never_slower.py says of measurements, recorded ones and some that are made up."""

import copy
import json
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts/gpu"))
import never_slower

RECORDED = json.loads((ROOT / "docs/measured/h200x2-exact-peer.json").read_text())
AT_512K = (2, True, "8", 512 << 10)


def test_what_is_slower_is_found_in_a_recorded_measurement():
    found = never_slower.slower(RECORDED)
    in_graph = [n_bytes for world, graph, bits, n_bytes in found if (world, graph, bits) == (2, True, "8")]
    assert in_graph == [256, 1 << 10, 4 << 10], in_graph
    assert [case for case in found if "exact" in case] == [(2, graph, "exact", 16 << 20) for graph in [False, True]]
    assert found[2, True, "8", 256] == "2 ranks, in a graph, 8 bits, 256 bytes, compressed: 6.4 us, NCCL 5.8 us, 0.91x"


class Bench:
    """In the place of a runner: `flashcomm bench` with these results, one after the other."""

    def __init__(self, *results):
        self.results, self.commands = list(results), []

    def measure(self, command, limit, to, **settings):
        self.commands.append([str(word) for word in command])
        to.write_text(json.dumps(self.results.pop(0)))


def with_ratio(ratio):
    """The recorded rows of 512 KiB in a graph, with this ratio for 8 bits and a good one for all others."""
    rows = [row for row in RECORDED["comparisons"] if (row["graph"], row["n_bytes"]) == (True, 512 << 10)]
    rows = copy.deepcopy(rows)
    for row in rows:
        for ours in row["flashcomm"]:
            ours["ratio"] = ratio if ours["way"]["flashcomm"]["bits"] == "8" else 1.5
    return {"comparisons": rows}


def check(bench, folder):
    never_slower.check(bench, "libnccl.so.2", folder / "all.json", "2")


def test_nothing_is_measured_twice_where_nothing_is_slower(tmp_path):
    bench = Bench(with_ratio(0.98))
    check(bench, tmp_path)
    assert len(bench.commands) == 1 and "256..256M" in bench.commands[0]


def test_what_is_slower_once_is_measured_again_and_told(tmp_path, capsys):
    bench = Bench(with_ratio(0.9), with_ratio(1.0))
    check(bench, tmp_path)
    again = bench.commands[1]
    assert again[again.index("--sizes") + 1] == str(512 << 10) and again[again.index("--rounds") + 1] == "3"
    assert "524288 bytes" in capsys.readouterr().out and (tmp_path / "all-again0.json").exists()


@pytest.mark.parametrize("ratio", [0.9, None])
def test_what_is_slower_each_time_or_never_measured_fails(tmp_path, ratio):
    bench = Bench(*[with_ratio(ratio)] * 4)
    with pytest.raises(AssertionError, match="524288 bytes"):
        check(bench, tmp_path)
    assert not bench.results
    assert list(never_slower.slower(with_ratio(ratio))) == [AT_512K]
