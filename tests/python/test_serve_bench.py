"""scripts/engines/serve_bench.py against a stand-in for vLLM and SGLang: a server that gets ready, answers and stops, or does not."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "scripts/engines/serve_bench.py"

ENGINE = """#!{python}
import http.server, json, os, pathlib, signal, sys, time
words = sys.argv[1:]
value = lambda name: words[words.index(name) + 1]
if words == ["--version"] or words[0] == "-c":
    print("0.0.stand-in")
elif words[0] == "serve" or words[:2] == ["-m", "sglang.launch_server"]:
    if os.environ.get("STAND_IN") == "ends":
        sys.exit("no GPU for you")
    bits = os.environ.get("BITS", "")
    if bits:
        print(f"flashcomm [1] INFO: rank 0 of 2: on, {{bits}} bits (blocks), exchange host, 66 blocks, from 4096 bytes up", flush=True)
    class Healthy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if os.environ.get("STAND_IN") != "sick" else 503)
            self.end_headers()
        def log_message(self, *words):
            pass
    def end(*_):
        if bits:
            counts = dict.fromkeys(["all_reduces_compressed", "all_reduces_exact", "all_reduces_forwarded", "bytes_in", "bytes_wire"], 5)
            pathlib.Path(os.environ["STATS"].replace("%p", "77")).write_text(json.dumps({{"process": counts}}))
        os._exit(0)
    signal.signal(signal.SIGTERM, end)
    http.server.HTTPServer(("127.0.0.1", int(value("--port"))), Healthy).serve_forever()
else:
    is_vllm = words[:2] == ["bench", "serve"]
    assert is_vllm or words[:2] == ["-m", "sglang.bench_serving"]
    load, n = int(value("--max-concurrency")), int(value("--num-prompts"))
    if os.environ.get("STAND_IN") == "loses":
        n -= 1
    middle = "p50" if is_vllm else "median"
    result = {{"completed": n, "output_throughput": 100.0 * load, middle + "_ttft_ms": 10.0 * load, "p99_ttft_ms": 20.0 * load,
              middle + "_itl_ms": 4.0, "p99_itl_ms": 8.0}}
    file = pathlib.Path(value("--result-dir"), value("--result-filename")) if is_vllm else pathlib.Path(value("--output-file"))
    file.write_text(json.dumps(result) + "\\n")
"""

FLASHCOMM = """#!{python}
import os, sys
words = sys.argv[1:]
value = lambda name: words[words.index(name) + 1]
os.environ.update(BITS=value("--bits"), STATS=value("--stats-file"), RUN=" ".join(words[:words.index("--")]))
os.execvp(words[words.index("--") + 1], words[words.index("--") + 1:])
"""


@pytest.fixture
def bench(tmp_path):
    for name, text in [("vllm", ENGINE), ("python3", ENGINE), ("flashcomm", FLASHCOMM)]:
        (tmp_path / name).write_text(text.format(python=sys.executable))
        (tmp_path / name).chmod(0o755)

    def run(*options, **settings):
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **settings}
        command = [sys.executable, SCRIPT, "--model", "m", "--out", tmp_path / "out", "--concurrency", "1,8", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)
        return done, tmp_path / "out"

    return run


def test_each_way_is_served_driven_and_told_in_turn(bench):
    done, out = bench("--ways", "plain,8,engine-4", "--", "--load-format", "dummy")
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "serve.json").read_text())
    assert [(row["way"], row["concurrency"]) for row in results["rows"]] == [
        (way, load) for way in ["plain", "8", "engine-4"] for load in [1, 8]
    ]
    assert results["rows"][1]["ttft_ms"] == {"p50": 80.0, "p99": 160.0} and results["rows"][1]["output_tokens_per_s"] == 800
    plain, eight, four = results["servers"]
    assert "counts" not in plain and eight["counts"]["all_reduces_exact"] == 5 and eight["counts"]["processes"] == 1
    assert all(server["status"] == 0 for server in results["servers"])
    assert "8 bits (blocks), exchange host" in eight["on"][0] and "4 bits" in four["on"][0]
    commands = [(out / f"{way}-1" / "server.log").read_text().splitlines()[0] for way in ["plain", "8", "engine-4"]]
    assert commands[0].startswith("$ vllm serve m ") and commands[0].endswith("--load-format dummy")
    assert "--plugin 1" in commands[1] and "--engine vllm" not in commands[1] and "--bits 8 " in commands[1]
    assert "--engine vllm" in commands[2] and "--plugin" not in commands[2] and "--bits 4 " in commands[2]
    assert "1.00x" in done.stdout and "engine-4" in done.stdout


def test_sglang_is_served_and_driven_by_its_own_client(bench):
    done, out = bench("--engine", "sglang", "--ways", "plain,8,engine-4", "--", "--load-format", "dummy")
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "serve.json").read_text())
    assert results["run"]["sglang"] == ["0.0.stand-in"] and "vllm" not in results["run"]
    assert len(results["rows"]) == 6 and results["rows"][1]["ttft_ms"] == {"p50": 80.0, "p99": 160.0}
    assert "8 bits (blocks), exchange host" in results["servers"][1]["on"][0]
    commands = [(out / f"{way}-1" / "server.log").read_text().splitlines()[0] for way in ["plain", "8", "engine-4"]]
    assert commands[0].startswith("$ python3 -m sglang.launch_server --model-path m --tp 2 ")
    assert commands[0].endswith("--load-format dummy") and "--plugin 1" in commands[1] and "--engine sglang" in commands[2]


@pytest.mark.parametrize(
    "stand_in, options, said",
    [
        ("ends", [], "no GPU for you"),
        ("sick", ["--start-seconds", "1"], "not ready after 1 s (--start-seconds)"),
        ("loses", [], "3 of 4 requests were answered"),
    ],
)
def test_what_goes_wrong_is_told_and_the_next_way_is_tried(bench, stand_in, options, said):
    done, out = bench("--ways", "plain,8", *options, STAND_IN=stand_in)
    assert done.returncode == 1 and done.stderr.count(said) == 2, done.stderr
    assert not (out / "serve.json").exists()


def test_a_way_that_is_none_is_refused(bench):
    done, _ = bench("--ways", "plain,fast")
    assert done.returncode == 2 and "not 'fast'" in done.stderr
