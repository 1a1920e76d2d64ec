"""scripts/engines/quality.py without PyTorch: the ranks' parts, text, questions, jobs and table."""

import json
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts/engines"), str(ROOT / "scripts/gpu")]
import quality
import quality_tasks as tasks
from shards import cut

FOLDER = ["--model", "folder", "--out", "out.json"]
WORDS = {}


def encode(text):
    """A stand-in for a tokenizer: a token for each word, digit, space and sign."""
    return [
        WORDS.setdefault(word, len(WORDS)) for word in re.findall(r"[A-Za-z]+|.", text, re.DOTALL)
    ]


def decode(ids):
    words = list(WORDS)
    return "".join(words[token] for token in ids)


@pytest.mark.parametrize("world, heads", [(1, [9]), (2, [6, 3]), (3, [3, 3, 3])])
def test_heads_stay_with_their_key_value_head(world, heads):
    """SmolLM2: 9 heads in groups of 3."""
    assert [3 * (end - start) for start, end in cut(3, world)] == heads
    assert [unit for start, end in cut(3, world) for unit in range(start, end)] == [0, 1, 2]
    assert {end - start for start, end in cut(1536, world)} == {1536 // world}


@pytest.fixture
def questions():
    return tasks.Questions(encode)


@pytest.mark.parametrize("n_tokens", [400, 1000, 4072])
def test_a_question_has_its_length_and_its_fact_at_its_depth(questions, n_tokens):
    asked = questions.of_context(n_tokens, 2)
    assert [question.depth for question in asked] == [
        depth for depth in tasks.DEPTHS for _ in range(2)
    ]
    for question in asked:
        text = decode(question.prompt)
        assert (
            len(question.prompt) == n_tokens
            and text.startswith(tasks.BEFORE)
            and text.endswith(tasks.BEHIND)
        )
        fact = f" The access code of {question.name} is {question.digits}."
        assert text.count(fact) == 1 and re.findall(r"\d+", text.replace("SmolLM2", "")) == [
            question.digits
        ]
        at = text.index(fact) - len(tasks.BEFORE + tasks.TASK)
        whole = len(text) - len(tasks.BEFORE + tasks.TASK)
        assert abs(at / whole - question.depth) < 0.3 * 1000 / n_tokens
    assert len({question.digits for question in asked}) > 15


def test_facts_of_others_have_other_names_and_leave_the_length():
    question = tasks.Questions(encode, n_others=7).ask(1000, 0.55, 0)
    told = re.findall(
        r" The access code of ([A-Z]\w+ [A-Z]\w+) is (\d{5}).", decode(question.prompt)
    )
    assert len(question.prompt) == 1000 and len({name for name, _ in told}) == 8
    assert dict(told)[question.name] == question.digits


def test_questions_are_the_same_again_and_others_with_another_seed(questions):
    digest = lambda made: tasks.digest([question.prompt for question in made.of_context(600, 1)])
    assert (
        digest(questions)
        == digest(tasks.Questions(encode))
        != digest(tasks.Questions(encode, seed=2))
    )


def test_too_short_a_context_is_refused(questions):
    with pytest.raises(ValueError, match="more than [0-9]+ tokens, not 50"):
        questions.ask(50, 0.5, 0)


def test_an_answer_is_right_where_it_has_the_digits(questions):
    question = questions.ask(400, 0.5, 0)
    assert question.found(f"It is {question.digits}.") and not question.found(
        "It is " + question.digits[:-1]
    )


def test_text_is_prose():
    markdown = (
        "# Title\n\nOne\nparagraph.\n\n```sh\ncode\n```\n\n| a | b |\n|---|---|\n\nThe last.\n"
    )
    assert tasks.of_markdown(markdown) == ["# Title", "One paragraph.", "The last."]
    source = "//! What it\n//! is.\n//!\n//! More.\nuse x;\n\n    /// Of f.\n    fn f() {} // not\n"
    assert tasks.of_source(source) == ["What it is.", "More.", "Of f."]
    text = tasks.documentation(ROOT)
    assert len(text) > 200_000 and "```" not in text and "fn " not in text[:20_000]


def test_windows_share_only_the_token_at_their_edge():
    assert tasks.windows(list(range(10)), 3, 9) == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert (
        tasks.windows(list(range(10)), 3, 1) == [[0, 1, 2, 3]]
        and tasks.windows([1, 2, 3], 3, 9) == []
    )


def test_plain_is_without_flashcomm_and_a_width_through_it():
    args = quality.parse([*FOLDER, "--world", "3", "--flashcomm", "at/flashcomm"])
    command, settings = quality.job(args, "plain", "/scratch", ["--world", "3"])
    assert (
        command[:2] == ["timeout", "150"]
        and command[-2:] == ["--world", "3"]
        and "at/flashcomm" not in command
    )
    ranks, settings = quality.job(args, "4", "/scratch", ["--world", "3"])
    assert ranks[:2] == ["at/flashcomm", "run"] and ranks[ranks.index("--") + 1 :] == command
    assert " --bits 4 " in " ".join(ranks) and " --min-bytes 0 " in " ".join(ranks)
    assert settings == {"FLASHCOMM_SCRATCH": "/scratch"}


def test_ranks_that_share_a_gpu_have_blocks_for_all():
    args = quality.parse([*FOLDER, "--share-gpu"])
    command, settings = quality.job(args, "8", "/scratch", [])
    assert (
        any(word.endswith("launch.py") for word in command)
        and settings["FLASHCOMM_MAX_CTAS"] == "16"
    )
    assert command[command.index("--exchange") + 1] == "peer"


@pytest.mark.parametrize(
    "options, said",
    [
        (["--widths", "plain,9"], "not '9'"),
        (["--widths", "plain,45"], "not '45'"),
        (["--backend", "gloo"], "no shim with gloo"),
    ],
)
def test_what_cannot_be_is_refused(options, said, capsys):
    with pytest.raises(SystemExit):
        quality.parse([*FOLDER, *options])
    assert said in capsys.readouterr().err


def a_run(width, perplexity, answers):
    """As a job leaves it, with two questions in each of two contexts."""
    part = lambda context, n_found: {
        "context": context,
        "others": 7,
        "asked": 2,
        "found": n_found,
        "found_by_depth": [n_found],
        "answers": answers,
    }
    return {
        "width": width,
        "world": 2,
        "wire_bits": 16.0 if width == "plain" else int(width) + 0.75,
        "text": {"perplexity": perplexity, "tokens": 4096, "length": 2048},
        "needles": [part(1024, 2), part(8192, 1)],
    }


def test_the_table_compares_with_plain(tmp_path, capsys):
    runs = [a_run("plain", 20.0, ["a", "b"]), a_run("4", 20.1, ["a", "c"])]
    (tmp_path / "out.json").write_text(json.dumps({"run": {}, "runs": runs}))
    assert quality.main(["--from", str(tmp_path / "out.json")]) == 0
    head, plain, four = capsys.readouterr().out.splitlines()[:3]
    assert "1024+7" in head and "8192+7" in head
    assert plain.split() == ["plain", "2", "16.000", "20.0000", "2/2", "1/2", "3/4"]
    assert four.split() == ["4", "2", "4.750", "20.1000", "+0.500%", "2/2", "1/2", "3/4", "50.0%"]


def ranks(monkeypatch, *results, compressed=60, n_wire=None):
    """In the place of the ranks: they leave these results, and the shim its counts."""

    class Ended:
        returncode = 0

    def run(command, env, check):
        scratch = env["FLASHCOMM_SCRATCH"]
        for rank, result in enumerate(results):
            leave = lambda name, told: pathlib.Path(scratch, name).write_text(json.dumps(told))
            pid, bytes_in = 70 + rank, 1600
            leave(f"result.{rank}.json", result)
            issued = {"compressed": 60, "bytes_in": bytes_in, "others": 0}
            leave(f"issued.{rank}.json", {"rank": rank, "pid": pid, **issued})
            counts = {"all_reduces_forwarded": 0, "all_reduces_exact": 60 - compressed}
            counts |= {"all_reduces_compressed": compressed, "bytes_in": bytes_in}
            leave(f"stats.{pid}.json", {"process": {**counts, "bytes_wire": n_wire}})
        return Ended()

    monkeypatch.setattr(quality.subprocess, "run", run)


@pytest.fixture
def result():
    """Of a rank."""
    run = a_run("plain", 20.0, ["a", "b"])
    return {"text": run["text"], "needles": run["needles"], "told": {"seconds": {"start": 1.0}}}


def test_results_of_ranks_must_be_the_same(monkeypatch, result):
    args = quality.parse(FOLDER)
    ranks(monkeypatch, result, result)
    measured = quality.measure(args, "plain", FOLDER)
    assert (
        measured["text"] == result["text"]
        and measured["wire_bits"] == 16.0
        and "all" in measured["seconds"]
    )
    ranks(monkeypatch, result, {**result, "needles": []})
    with pytest.raises(quality.Failure, match="different results"):
        quality.measure(args, "plain", FOLDER)
    ranks(monkeypatch, result)
    with pytest.raises(quality.Failure, match="the job ended with 0"):
        quality.measure(args, "plain", FOLDER)


def test_the_shim_must_have_compressed_every_sum(monkeypatch, result):
    args = quality.parse(FOLDER)
    ranks(monkeypatch, result, result, n_wire=475)
    measured = quality.measure(args, "4", FOLDER)
    assert (measured["width"], measured["world"], measured["wire_bits"]) == ("4", 2, 4.75)
    assert (measured["compressed"], measured["not_compressed"]) == (60, 0)
    ranks(monkeypatch, result, result, compressed=59, n_wire=475)
    with pytest.raises(quality.Failure, match="the shim counted"):
        quality.measure(args, "4", FOLDER)
    ranks(monkeypatch, result, result, n_wire=875)
    with pytest.raises(quality.Failure, match="of the bytes, not"):
        quality.measure(args, "4", FOLDER)


def test_a_width_that_fails_is_told_and_the_next_is_measured(monkeypatch, tmp_path, capsys):
    def measure(args, width, arguments):
        if width == "8":
            raise quality.Failure("no GPU for you")
        return {**a_run(width, 20.0, ["a", "b"]), "seconds": {"all": 1.0}}

    monkeypatch.setattr(quality, "measure", measure)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    out = tmp_path / "new/out.json"
    options = ["--model", str(tmp_path), "--out", str(out), "--widths", "plain,8,4"]
    assert quality.main(options) == 1
    told = capsys.readouterr()
    assert "8: no GPU for you" in told.err and told.out.splitlines()[2].split()[0] == "4"
    written = json.loads(out.read_text())
    assert [run["width"] for run in written["runs"]] == ["plain", "4"]
    assert {"commit", "date", "machine", "command"} <= set(written["run"])
