"""Draws what scripts/eval_accuracy.sh measured: perplexity and embeddings against bits per element.

usage: eval_plot.py EVAL.json OUT.svg           (or .png); wants matplotlib
"""

import json
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.lines import Line2D

COLORS = {2: "#4c78a8", 4: "#e4572e", 8: "#54a24b"}
MARKS = {
    "INT8, group 32": "s",
    "INT6, group 32": "s",
    "INT4, group 32": "s",
    "INT8 with spikes, group 128": "v",
    "INT6 with spikes, group 128": "v",
    "INT4 with spikes, group 128": "v",
    "INT2 with spikes, group 128": "v",
    "FP8 e4m3, group 128": "D",
    "MXFP4": "^",
}
CODES = {
    "plain": "#333333",
    "spikes": "#b279a2",
    "blocks": "#72b7b2",
}
FLOOR = {"perplexity": 1e-3, "cosine": 1e-6}


def loss(setup, figure):
    """In percent, and what lacks to a cosine of 1; an axis in logarithms has no place for a perplexity that fell."""
    if figure == "perplexity":
        return max(abs(100 * setup["perplexity_difference"]), FLOOR[figure])
    return max(1 - setup["embedding"]["cosine_mean"], FLOOR[figure])


def draw(axis, jobs, figure):
    for job in jobs:
        is_default = job["code"] == "default"
        color = COLORS.get(job["ranks"], "#666666") if is_default else CODES.get(job["code"], "#666666")
        widths = [(name, setup) for name, setup in job["setups"].items() if name.isdigit()]
        widths.sort(key=lambda pair: pair[1]["bits_per_element"])
        x = [setup["bits_per_element"] for _, setup in widths]
        y = [loss(setup, figure) for _, setup in widths]
        style = {"marker": "o"} if is_default else {"marker": "x", "linestyle": "--", "linewidth": 1.2, "markersize": 5}
        axis.plot(x, y, color=color, **style)
        if figure == "perplexity":
            # Hollow where the perplexity fell.
            better = [(a, b) for (a, b), (_, setup) in zip(zip(x, y), widths) if setup["perplexity_difference"] < 0]
            if better:
                axis.plot(
                    *zip(*better),
                    color=color,
                    linestyle="",
                    marker="o" if is_default else "x",
                    markerfacecolor="white",
                    zorder=3,
                )
        mixed = [setup for name, setup in job["setups"].items() if ":" in name]
        for setup in mixed:
            axis.plot(
                setup["bits_per_element"], loss(setup, figure), color=color, marker="*", markersize=9, linestyle=""
            )
        for name, setup in job["references"].items():
            if name in MARKS:
                axis.plot(setup["bits_per_element"], loss(setup, figure), color=color, marker=MARKS[name], markersize=6,
                          markerfacecolor="none", linestyle="", alpha=0.9)  # fmt: skip
    axis.set_yscale("log")
    axis.set_xlabel("bits per element on the wire")
    axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def main():
    whole = json.loads(pathlib.Path(sys.argv[1]).read_text())
    jobs = whole["jobs"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11.5, 4.8))
    draw(left, jobs, "perplexity")
    draw(right, jobs, "cosine")
    for limit in (0.1, 1.0):
        left.axhline(limit, color="#999999", linewidth=0.8, linestyle=(0, (2, 3)))
    left.set_ylabel("change of perplexity, %")
    parameters = whole.get("train", {}).get("parameters")
    left.set_title(
        "Llama" + (f" of {parameters / 1e6:.0f}M parameters" if parameters else "") + ", held-out text", fontsize=11
    )
    right.set_ylabel("1 - mean cosine to the uncompressed embeddings")
    right.set_title("all-MiniLM-L6-v2, held-out sentences", fontsize=11)
    entries = []
    for code, ranks in dict.fromkeys((job["code"], job["ranks"]) for job in jobs):
        if code == "default":
            entries.append(
                Line2D([], [], color=COLORS.get(ranks, "#666666"), marker="o", label=f"default code, {ranks} ranks")
            )
        else:
            style = {"color": CODES.get(code, "#666666"), "linestyle": "--", "marker": "x", "markersize": 5}
            entries.append(Line2D([], [], **style, label=f"{code}, {ranks} ranks"))
    if any(":" in name for job in jobs for name in job["setups"]):
        entries.append(Line2D([], [], color="#555555", linestyle="", marker="*", markersize=9, label="4:8"))
    if any(job["references"] for job in jobs):
        marks = {
            "s": "INT4, 6, 8, group 32",
            "v": "INT2, 4, 6, 8 with spikes",
            "D": "FP8 e4m3, group 128",
            "^": "MXFP4",
        }
        drawn = {MARKS.get(name) for job in jobs for name in job["references"]}
        for mark, label in marks.items():
            if mark not in drawn:
                continue
            entries.append(
                Line2D(
                    [],
                    [],
                    color="#555555",
                    linestyle="",
                    marker=mark,
                    markerfacecolor="none",
                    label=label + " (emulated)",
                )
            )
    entries.append(
        Line2D([], [], color="#555555", linestyle="", marker="o", markerfacecolor="white", label="perplexity fell")
    )
    figure.legend(handles=entries, loc="center right", fontsize=8.5, frameon=False)
    figure.tight_layout(rect=(0, 0, 0.83, 1))
    figure.savefig(sys.argv[2], dpi=110)


if __name__ == "__main__":
    main()
