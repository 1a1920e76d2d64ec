#!/usr/bin/env python3
"""A vLLM or SGLang server under load, plain and through the shim in turn: time to first token, between tokens, throughput.

For each way the real server (`vllm serve`, `sglang.launch_server`) is started, driven by the engine's own client (`vllm bench serve`,
`sglang.bench_serving`, random prompts), and stopped by SIGTERM. Nothing of the engine is changed. What runs, and for how long, is told on
standard error.

    serve_bench.py --model FOLDER --out FOLDER [--engine sglang] [OPTION...] [-- OPTIONS OF THE SERVER]
    serve_bench.py --from FOLDER              draws the plot of an earlier run again

A way is `plain`; a width such as `8` or `4`, with the plugin, so that the engine keeps its own kernels; or `engine-8`, by
`flashcomm run --engine`, which turns them off. FOLDER gets serve.json, serve.svg (where there is matplotlib), and for each way
the server's log, the client's results and the shim's statistics.

Needs the engine and, but for plain, `flashcomm` on PATH or by --flashcomm, and its plugin where a way is a width.
"""

import argparse
import collections
import json
import os
import pathlib
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import datetime, timezone

METRICS = ["ttft", "itl"]
PERCENTILES = ["p50", "p99"]
COUNTS = ["all_reduces_compressed", "all_reduces_exact", "all_reduces_forwarded", "bytes_in", "bytes_wire"]
LAST_LINES = 15  # of a log, where something went wrong
STOP_S = 30  # from SIGTERM to SIGKILL


class Failure(Exception):
    """What went wrong, for people."""


class Vllm:
    version = ["vllm", "--version"]

    @staticmethod
    def server(args, port):
        serve = ["vllm", "serve", args.model, "--tensor-parallel-size", str(args.tp), "--port", str(port)]
        return [*serve, "--no-enable-prefix-caching"]

    @staticmethod
    def client(args, load, port, file):
        bench = ["vllm", "bench", "serve", "--model", args.model, "--host", "127.0.0.1", "--port", str(port)]
        bench += ["--dataset-name", "random", "--random-input-len", str(args.input), "--random-output-len", str(args.output)]
        bench += ["--num-prompts", str(load * args.requests), "--max-concurrency", str(load), "--ignore-eos"]
        bench += ["--num-warmups", str(load), "--seed", "1", "--disable-tqdm"]
        bench += ["--percentile-metrics", ",".join(METRICS), "--metric-percentiles", "50,99"]
        return [*bench, "--save-result", "--result-dir", str(file.parent), "--result-filename", file.name]


class Sglang:
    version = ["python3", "-c", "import importlib.metadata as all; print(all.version('sglang'))"]

    @staticmethod
    def server(args, port):
        serve = ["python3", "-m", "sglang.launch_server", "--model-path", args.model, "--tp", str(args.tp)]
        return [*serve, "--port", str(port), "--disable-radix-cache"]

    @staticmethod
    def client(args, load, port, file):
        """Sends the numbers of tokens, not text: a tokenizer may read back more of them than it has written."""
        bench = ["python3", "-m", "sglang.bench_serving", "--backend", "sglang", "--model", args.model]
        bench += ["--host", "127.0.0.1", "--port", str(port), "--dataset-name", "random-ids", "--tokenize-prompt"]
        bench += ["--random-input-len", str(args.input), "--random-output-len", str(args.output), "--random-range-ratio", "1"]
        bench += ["--num-prompts", str(load * args.requests), "--max-concurrency", str(load)]
        return [*bench, "--warmup-requests", str(load), "--seed", "1", "--disable-tqdm", "--output-file", str(file)]


ENGINES = {"vllm": Vllm, "sglang": Sglang}


def parse(arguments):
    parser = argparse.ArgumentParser(description="a server of an engine, plain and through the shim in turn")
    parser.add_argument("--model", help="what is to be served; make_model.py makes one of random weights")
    parser.add_argument("--engine", default="vllm", choices=ENGINES, help="whose server and client (%(default)s)")
    parser.add_argument("--out", type=pathlib.Path, help="the folder of the results")
    parser.add_argument("--from", type=pathlib.Path, dest="earlier", help="draw that folder's results again")
    parser.add_argument("--ways", default="plain,8,4", help="in this order (%(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="how often all of them (%(default)s)")
    parser.add_argument("--tp", type=int, default=2, help="GPUs (%(default)s)")
    parser.add_argument("--concurrency", default="1,8,32", help="requests at once (%(default)s)")
    parser.add_argument("--requests", type=int, default=4, help="requests for each of those at once (%(default)s)")
    parser.add_argument("--input", type=int, default=2048, help="tokens of a prompt (%(default)s)")
    parser.add_argument("--output", type=int, default=128, help="tokens of an answer (%(default)s)")
    parser.add_argument("--exchange", default="auto", help="FLASHCOMM_EXCHANGE (%(default)s)")
    parser.add_argument("--flashcomm", default="flashcomm", help="the command")
    parser.add_argument("--start-seconds", type=int, default=300, help="a server may take to start (%(default)s)")
    parser.add_argument("--client-seconds", type=int, default=300, help="a run of the client may take (%(default)s)")
    parser.add_argument("serve", nargs="*", metavar="-- OPTIONS", help="options of the server")
    args = parser.parse_args(arguments)
    if not args.earlier and not (args.model and args.out):
        parser.error("--model and --out are wanted, or --from")
    for way in args.ways.split(","):
        if way != "plain" and not way.removeprefix("engine-").replace(":", "").isdigit():
            parser.error(f"a way is plain, a width, or engine- and a width, not {way!r}")
    return args


def say(text):
    print(f"[{datetime.now().strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def last_lines(log):
    lines = log.read_text(errors="replace").splitlines()[-LAST_LINES:]
    return "\n".join([f"the last lines of {log}:", *(f"  {line}" for line in lines)])


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def server_command(args, way, folder, port):
    serve = [*ENGINES[args.engine].server(args, port), *args.serve]
    if way == "plain":
        return serve
    bits = way.removeprefix("engine-")
    run = [args.flashcomm, "run", "--bits", bits, "--exchange", args.exchange, "--log", "info"]
    run += ["--stats-file", str(folder / "stats.%p.json")]
    run += ["--engine", args.engine] if bits != way else ["--plugin", "1"]
    return [*run, "--", *serve]


class Server:
    """A running server, in a process group of its own."""

    def __init__(self, command, log, port, seconds):
        self.log, self.port, self.start = log, port, time.monotonic()
        with open(log, "wb") as to:
            to.write(f"$ {' '.join(command)}\n".encode())
            to.flush()
            self.process = subprocess.Popen(command, stdout=to, stderr=to, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            self.wait(seconds)
        except BaseException:
            self.stop()
            raise
        self.start_s = time.monotonic() - self.start

    def wait(self, seconds):
        told = self.start
        while not self.is_healthy():
            now = time.monotonic()
            if self.process.poll() is not None:
                raise Failure(f"the server ended with {self.process.returncode} before it was ready; {last_lines(self.log)}")
            if now - self.start > seconds:
                raise Failure(f"the server was not ready after {seconds} s (--start-seconds); {last_lines(self.log)}")
            if now - told > 10:
                told = now
                say(f"  the server is starting, {now - self.start:.0f} s")
            time.sleep(0.2)

    def is_healthy(self):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def stop(self):
        """Seconds that it took, and its exit status."""
        start = time.monotonic()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            say(f"  the server does not end on SIGTERM within {STOP_S} s, and is killed")
        try:
            os.killpg(self.process.pid, signal.SIGKILL)  # workers that it left
        except ProcessLookupError:
            pass
        return round(time.monotonic() - start, 1), self.process.wait()


def client(args, folder, port, concurrency):
    """The client's own results of one run."""
    file = folder / f"client-{concurrency}.json"
    command = ENGINES[args.engine].client(args, concurrency, port, file)
    log = folder / f"client-{concurrency}.log"
    with open(log, "wb") as to:
        try:
            status = subprocess.run(command, stdout=to, stderr=to, timeout=args.client_seconds, check=False).returncode
        except subprocess.TimeoutExpired:
            raise Failure(f"the client was not done after {args.client_seconds} s (--client-seconds); {last_lines(log)}") from None
    if status != 0 or not file.exists():
        raise Failure(f"the client ended with {status}; {last_lines(log)}")
    result = json.loads(file.read_text())
    wanted = concurrency * args.requests
    if result["completed"] != wanted:
        raise Failure(f"{result['completed']} of {wanted} requests were answered; {last_lines(log)}")
    return result


def value_of(result, percentile, metric):
    """SGLang calls the 50th percentile the median."""
    name = f"{percentile}_{metric}_ms"
    return result[name if name in result else name.replace("p50", "median")]


def row_of(way, number, concurrency, result):
    row = {"way": way, "round": number, "concurrency": concurrency}
    for metric in METRICS:
        row[f"{metric}_ms"] = {p: value_of(result, p, metric) for p in PERCENTILES}
    row["output_tokens_per_s"] = result["output_throughput"]
    return row


def counted(folder):
    """The shim's own counts, summed over the processes that left statistics."""
    totals = collections.Counter({"processes": 0})
    for file in sorted(folder.glob("stats.*.json")):
        process = json.loads(file.read_text())["process"]
        totals.update({name: process.get(name, 0) for name in COUNTS}, processes=1)
    return dict(totals)


def measure(args, way, number):
    """Rows, and what is to be told of the server."""
    folder = args.out / f"{way.replace(':', '-')}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    port = free_port()
    say(f"{way}: the server starts")
    server = Server(server_command(args, way, folder, port), folder / "server.log", port, args.start_seconds)
    rows = []
    try:
        say(f"{way}: ready after {server.start_s:.0f} s")
        for concurrency in map(int, args.concurrency.split(",")):
            rows.append(row_of(way, number, concurrency, client(args, folder, port, concurrency)))
            say(f"{way}, {concurrency} at once: {line(rows[-1])}")
    finally:
        stop_s, status = server.stop()
    told = {"way": way, "round": number, "start_s": round(server.start_s, 1), "stop_s": stop_s, "status": status}
    if way != "plain":
        told["counts"] = counted(folder)
        log = (folder / "server.log").read_text(errors="replace")
        told["on"] = sorted({at.split("INFO: ", 1)[1] for at in log.splitlines() if "INFO: rank " in at and ": on, " in at})
        if told["counts"].get("all_reduces_compressed", 0) == 0:
            say(f"{way}: the shim compressed nothing; {folder / 'server.log'} may say why")
    return rows, told


def line(row):
    ttft, itl = row["ttft_ms"], row["itl_ms"]
    return (f"first token {ttft['p50']:.1f} ms (p99 {ttft['p99']:.1f}), between tokens {itl['p50']:.2f} ms (p99 {itl['p99']:.2f}), "
            f"{row['output_tokens_per_s']:.0f} tokens/s")


def medians(rows):
    """By way and concurrency the medians over the rounds: {metric: value}."""
    cells = collections.defaultdict(list)
    for row in rows:
        cells[row["way"], row["concurrency"]].append(row)
    return {
        case: {
            **{f"{metric} {p}": statistics.median(row[f"{metric}_ms"][p] for row in of) for metric in METRICS for p in PERCENTILES},
            "tokens/s": statistics.median(row["output_tokens_per_s"] for row in of),
        }
        for case, of in cells.items()
    }


def table(rows):
    cells = medians(rows)
    names = ["ttft p50", "ttft p99", "itl p50", "itl p99", "tokens/s"]
    lines = [f"{'at once':>7}  {'way':<10}" + "".join(f"{name:>19}" for name in names) + "   (ms; x: how much better than plain)"]
    for way, concurrency in sorted(cells, key=lambda case: case[1]):
        cell, plain = cells[way, concurrency], cells.get(("plain", concurrency))
        shown = []
        for name in names:
            better = ""
            if plain and way != "plain":
                ratio = cell[name] / plain[name] if name == "tokens/s" else plain[name] / cell[name]
                better = f" {ratio:.2f}x"
            shown.append(f"{cell[name]:.1f}{better}" if name != "itl p50" else f"{cell[name]:.2f}{better}")
        lines.append(f"{concurrency:>7}  {way:<10}" + "".join(f"{text:>19}" for text in shown))
    return "\n".join(lines)


def draw(results, to):
    """Bars of each way for time to first token, between tokens and throughput."""
    try:
        import matplotlib
    except ImportError:
        say("no plot: matplotlib is not installed here; --from draws it elsewhere")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = medians(results["rows"])
    ways = list(dict.fromkeys(way for way, _ in cells))
    loads = sorted({concurrency for _, concurrency in cells})
    panels = [("ttft p50", "time to first token, ms"), ("itl p50", "between tokens, ms"), ("tokens/s", "output tokens a second")]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(12, 3.6), layout="constrained")
    for axis, (name, title) in zip(axes, panels):
        for i, way in enumerate(ways):
            values = [cells[way, load][name] if (way, load) in cells else 0 for load in loads]
            places = [place + (i - (len(ways) - 1) / 2) * 0.8 / len(ways) for place in range(len(loads))]
            axis.bar(places, values, 0.8 / len(ways), label=way if way == "plain" else f"{way} bits")
        axis.set_xticks(range(len(loads)), [f"{load} at once" for load in loads])
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(to)
    say(f"drew {to}")


def facts(args):
    def answer(*command):
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout.strip().splitlines()
        except (OSError, subprocess.TimeoutExpired):
            return []

    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "gpus": answer("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"),
        args.engine: answer(*ENGINES[args.engine].version)[-1:],
        "arguments": {name: str(value) for name, value in vars(args).items()},
        "variables": {name: value for name, value in os.environ.items() if name.startswith(("NCCL_", "VLLM_", "SGLANG_", "FLASHCOMM_"))},
    }


def main(arguments):
    args = parse(arguments)
    if args.earlier:
        results = json.loads((args.earlier / "serve.json").read_text())
        print(table(results["rows"]))
        draw(results, args.earlier / "serve.svg")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    results = {"run": facts(args), "rows": [], "servers": []}
    failed = 0
    for number in range(1, args.rounds + 1):
        for way in args.ways.split(","):
            try:
                rows, told = measure(args, way, number)
            except Failure as failure:
                say(f"{way}: {failure}")
                failed += 1
                continue
            results["rows"] += rows
            results["servers"].append(told)
            (args.out / "serve.json").write_text(json.dumps(results, indent=1))  # whole after every way
    if results["rows"]:
        print(table(results["rows"]))
        draw(results, args.out / "serve.svg")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
