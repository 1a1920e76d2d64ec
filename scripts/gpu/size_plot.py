"""Draws what never_slower.py, or any `flashcomm bench --json`, measured: time over size.

usage: size_plot.py OUT.svg [TITLE=]BENCH.json...           (or .png); wants matplotlib

A row of panels for each file and number of ranks, NCCL beside the shim: eager on the left, in a
graph on the right. A mark says what the shim does with that size. Below each panel is the speed-up,
NCCL's time over the shim's: above 1 the shim is faster.
"""

import json
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

NCCL = "#000000"
COLORS = {"8": "#0072b2", "4": "#d55e00"}  # as in cli/src/plot.rs
OTHERS = ["#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
MARKS = {"exact": "s", "compressed": "o", "forwarded": "x", None: "."}
WHAT = {"exact": "exact", "compressed": "compressed", "forwarded": "goes to NCCL"}
FINE, COARSE = [0.5, 0.7, 0.8, 0.9, 1, 1.2, 1.5, 2, 2.5, 3, 4, 5], [0.1, 0.25, 0.5, 1, 2, 4, 8, 16]


def in_units(n_bytes, _=None):
    for shift, unit in [(20, "MiB"), (10, "KiB")]:
        if n_bytes >= 1 << shift:
            return f"{n_bytes / (1 << shift):g} {unit}"
    return f"{n_bytes:g} B"


def name(way):
    way = way["flashcomm"]
    return way["bits"] if way["bits"] == "exact" else f"{way['bits']} bits"


def color(way, known):
    bits = way["flashcomm"]["bits"]
    if bits in COLORS:
        return COLORS[bits]
    return known.setdefault(bits, OTHERS[len(known) % len(OTHERS)])


def curves(rows):
    """Of each way of the shim: sizes, microseconds, ratios and routes."""
    found = {}
    for row in rows:
        for ours in row["flashcomm"]:
            if ours["ratio"] is not None:
                point = (row["n_bytes"], ours["us"], ours["ratio"], ours.get("route"))
                found.setdefault(json.dumps(ours["way"]), []).append(point)
    return [(json.loads(way), list(zip(*points))) for way, points in found.items()]


def draw(above, below, rows, known):
    rows = sorted(rows, key=lambda row: row["n_bytes"])
    sizes = [row["n_bytes"] for row in rows]
    above.plot(sizes, [row["nccl_us"] for row in rows], color=NCCL, linewidth=1.6)
    below.axhline(1, color=NCCL, linewidth=1.2)
    for i, (way, (x, us, ratios, routes)) in enumerate(curves(rows)):
        # The first one is wider, since they are one where neither compresses.
        style = {"color": color(way, known), "linewidth": 2.6 - 1.2 * min(i, 1), "zorder": 3 + i}
        for axis, y in [(above, us), (below, ratios)]:
            axis.plot(x, y, **style)
            for route in set(routes):
                points = [(a, b) for a, b, of in zip(x, y, routes) if of == route]
                axis.plot(*zip(*points), color=style["color"], linestyle="", zorder=style["zorder"],
                          marker=MARKS[route], markersize=5.5 - 1.5 * min(i, 1))  # fmt: skip
    for axis in (above, below):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.xaxis.set_major_locator(FixedLocator(sizes[::-4][::-1] if len(sizes) > 8 else sizes))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_minor_locator(NullLocator())
        axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    above.yaxis.set_major_formatter(FuncFormatter(lambda us, _: f"{us:g}"))
    above.tick_params(labelbottom=False)
    below.xaxis.set_major_formatter(FuncFormatter(in_units))
    below.yaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}x"))


def ticks(axes, choose, span=()):
    """Side by side they show the same, so that they compare: the span of all, and what is given."""
    low = min([axis.get_ylim()[0] for axis in axes] + list(span))
    high = max([axis.get_ylim()[1] for axis in axes] + list(span))
    for axis in axes:
        axis.set_ylim(low, high)
        axis.yaxis.set_major_locator(FixedLocator([tick for tick in choose(low, high) if low <= tick <= high]))


def times_from(low, high):
    steps = (1, 3) if high / low > 30 else (1, 2, 5)
    return [step * 10**power for power in range(-1, 7) for step in steps]


def speed_ups_from(low, high):
    if high / low > 8:
        return COARSE
    return FINE if high / low < 3 else [tick for tick in FINE if tick not in (0.8, 0.9, 1.2, 2.5)]


def legend(figure, panels, known, n_columns):
    ways, routes = {}, set()
    for _, rows in panels:
        for way, (*_, of) in curves(rows):
            ways.setdefault(name(way), color(way, known))
            routes |= set(of)
    entries = [Line2D([], [], color=NCCL, linewidth=1.6, label="NCCL")]
    entries += [Line2D([], [], color=shade, linewidth=2.2, label=f"flashcomm, {way}") for way, shade in ways.items()]
    for route in [route for route in WHAT if route in routes]:
        entries.append(Line2D([], [], color="#555555", linestyle="", marker=MARKS[route], label=WHAT[route]))
    figure.legend(handles=entries, loc="upper center", ncols=n_columns, fontsize=12, frameon=False)


def panels_of(arguments):
    """(title, rows) of each pair: a file's number of ranks, eager or in a graph."""
    for argument in arguments:
        title, _, file = argument.rpartition("=")
        comparisons = json.loads(pathlib.Path(file).read_text())["comparisons"]
        for world in sorted({row["world"] for row in comparisons}):
            for graph in sorted({row["graph"] for row in comparisons}):
                rows = [row for row in comparisons if (row["world"], row["graph"]) == (world, graph)]
                rows = [row for row in rows if row["nccl_us"] is not None]
                how = "in a graph" if graph else "eager"
                yield ", ".join(word for word in [title, f"{world} ranks", how] if word), rows


def main():
    panels = list(panels_of(sys.argv[2:]))
    # Columns of panels and of the legend, and its height in inches.
    columns, in_legend, top = (2, 6, 0.5) if len(panels) > 1 else (1, 2, 0.9)
    n_rows = -(-len(panels) // columns)
    pyplot.rcParams.update({"font.size": 12, "svg.fonttype": "path"})
    figure = pyplot.figure(figsize=(6.6 * columns, top + 5.2 * n_rows), facecolor="white", layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - top / figure.get_figheight()), h_pad=0.12, w_pad=0.08)
    grid = figure.add_gridspec(n_rows, columns)
    known, axes = {}, []
    for i, (title, rows) in enumerate(panels):
        above, below = grid[i // columns, i % columns].subgridspec(2, 1, height_ratios=[2, 1]).subplots(sharex=True)
        draw(above, below, rows, known)
        above.set_title(title, fontsize=13)
        if i % columns == 0:
            above.set_ylabel("microseconds")
            below.set_ylabel("speed-up")
        if i >= len(panels) - columns:
            below.set_xlabel("bytes that each rank sums")
        axes.append((above, below))
    for first in range(0, len(axes), columns):
        times, ratios = zip(*axes[first : first + columns])
        ticks(times, times_from)
        ticks(ratios, speed_ups_from, (0.88, 1.12))
    legend(figure, panels, known, in_legend)
    figure.savefig(sys.argv[1], dpi=110)


if __name__ == "__main__":
    main()
