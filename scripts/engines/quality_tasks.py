"""What quality.py asks a model: text whose next tokens it predicts, and questions about a fact in a
long context.

The text is this project's own documentation: its Markdown and the doc comments of its sources,
without code and tables. It was written after the model was trained, it comes with the project, and
its licence is the project's.

A question is a chat prompt of an exact number of tokens: sentences of no meaning, made of the words
below, among which "The access code of NAME is DIGITS." stands at one of ten depths, and n_others
times the same of others, anywhere. An answer is right where it has the digits.

Nothing here needs PyTorch, and the same seed gives the same questions. `encode` makes a list of
token ids of a text.
"""

import dataclasses
import hashlib
import itertools
import random
import re

DEPTHS = [(2 * i + 1) / 20 for i in range(10)]  # of a fact: 0 would be before all else, 1 behind it
N_DIGITS = 5
ANSWER = 24  # tokens of an answer at most; those asked for have some 15

# SmolLM2's chat template, with the system prompt that it has where none is given.
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
BEFORE = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
BEHIND = "<|im_end|>\n<|im_start|>assistant\n"
TASK = "Remember the access code that is told in this text.\n\n"


def phrases(*lines):
    return "".join(lines).split("|")


FIRST_NAMES = phrases(
    "Anna|Boris|Clara|David|Elena|Felix|Greta|Henry|Irene|Jacob|Karen|Louis|Maria|Nina|Oscar|",
    "Paula|Robert|Sarah",
)
LAST_NAMES = phrases(
    "Adler|Baker|Carter|Dalton|Fischer|Grant|Harper|Keller|Lambert|Mason|Novak|Parker|Quinn|Shaw|",
    "Turner|Walker",
)
WHEN = phrases(
    "In the morning|After the rain|Late in the evening|On market day|Before the snow came|",
    "At the end of summer|Most days",
)
WHO = phrases(
    "the miller|an old sailor|the baker's daughter|a tired gardener|the schoolteacher|",
    "the blacksmith|a young shepherd|the ferryman|the widow on the hill|a travelling tailor|",
    "the librarian|the beekeeper",
)
DID = phrases(
    "walked down to|looked across|told stories about|painted|measured|slept near|cleaned|",
    "drew a map of|sang about|sat beside|swept the path to|hurried past",
)
WHAT = phrases(
    "the river|the stone bridge|the orchard|the empty barn|the harbour|the church tower|",
    "the narrow lane|the wooden gate|the flower market|the old well|the lighthouse|",
    "the quiet valley",
)
THEN = phrases(
    "and went home|while the bells rang|and nobody noticed|before the wind turned|",
    "and thought of nothing else|as the others had done|and bought some bread|until it was dark|",
    "and whistled a tune",
)


# ---- the text ------------------------------------------------------------------------------------


def of_markdown(text):
    """Paragraphs without code and tables, each on a line."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def of_source(text):
    """The paragraphs of doc comments, `//!` and `///`."""
    comments = [re.fullmatch(r"\s*//[/!](?: (.*)|)", line) for line in text.splitlines()]
    return of_markdown("\n".join((found[1] or "") if found else "" for found in comments))


def documentation(root):
    """One text of a checkout of this project."""
    markdown = [*root.glob("*.md"), *root.glob("docs/**/*.md")]
    sources = [
        file
        for top in ["src", "wire", "cli", "sim", "kernels"]
        for file in root.glob(f"{top}/**/*.[rc]*")
    ]
    sources = [
        file
        for file in sources
        if file.suffix in (".rs", ".cu", ".cuh") and "target" not in file.parts
    ]
    paragraphs = [part for file in sorted(markdown) for part in of_markdown(file.read_text())]
    paragraphs += [part for file in sorted(sources) for part in of_source(file.read_text())]
    return "\n\n".join(dict.fromkeys(paragraphs))


def windows(ids, length, most):
    """Pieces of length + 1 tokens, which predict `length`, one after the other: `most` of them."""
    starts = range(0, len(ids) - length, length)
    return [ids[start : start + length + 1] for start in starts][:most]


# ---- the questions -------------------------------------------------------------------------------


@dataclasses.dataclass
class Question:
    n_tokens: int  # of the prompt
    depth: float
    name: str
    digits: str
    prompt: list  # token ids

    def found(self, answer):
        return self.digits in answer


def sentence(rng):
    first, *others = (rng.choice(words) for words in (WHEN, WHO, DID, WHAT, THEN))
    return f"{first}, {' '.join(others)}."


class Questions:
    def __init__(self, encode, n_others=0, seed=1, n_sentences=1024):
        self.encode, self.n_others, self.seed = encode, n_others, seed
        rng = random.Random(seed)
        self.filler = [encode(" " + sentence(rng)) for _ in range(n_sentences)]

    def ask(self, n_tokens, depth, number):
        """One question; `number` chooses filler, names and digits."""
        rng = random.Random(f"{self.seed} {n_tokens} {depth} {number}")
        everyone = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]
        names = rng.sample(everyone, 1 + self.n_others)
        codes = ["".join(rng.choice("0123456789") for _ in range(N_DIGITS)) for _ in names]
        told = zip(names, codes)
        fact, *others = [self.encode(f" The access code of {who} is {code}.") for who, code in told]
        begin = self.encode(BEFORE + TASK)
        end = self.encode(f"\n\nWhat is the access code of {names[0]}?{BEHIND}")
        room = n_tokens - sum(map(len, [begin, fact, *others, end]))
        if room < 1:
            raise ValueError(f"a question wants more than {n_tokens - room} tokens, not {n_tokens}")
        parts, at = [], rng.randrange(len(self.filler))
        while (left := room - sum(map(len, parts))) > 0:
            parts.append(self.filler[at % len(self.filler)][:left])
            at += 1
        for other in others:
            parts.insert(rng.randrange(len(parts)), other)
        ends = list(itertools.accumulate(map(len, parts)))
        parts.insert(sum(end_at < depth * ends[-1] for end_at in ends), fact)
        prompt = begin + list(itertools.chain(*parts)) + end
        return Question(n_tokens, depth, names[0], codes[0], prompt)

    def of_context(self, n_tokens, n_each):
        """All questions of one length, `n_each` at each depth."""
        return [self.ask(n_tokens, depth, number) for depth in DEPTHS for number in range(n_each)]


def digest(*parts):
    """Tells whether two runs had the same text or questions."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
