"""How people ask: a grammar of English questions about the small world (talk.py decides what to ask and what is right).

    Voice(rng).ask("colour", the="red circle") -> "whats the color of the red circle"

A question is made in three steps: one construction of its kind is chosen; its alternatives in square brackets are
resolved, and its noun phrases worded; then come the speaker's manners: greetings, contractions, missing articles, lower
case, typos. The constructions are in wordings/: known.txt for training, held_out.txt for the test alone.
"""

import random
import re
from collections.abc import Sequence
from pathlib import Path

# In a construction: [a|b] is one of the alternatives, possibly empty; <word> is looked up here; {slot} is filled in.
# A construction is a question, unless it ends with a full stop.
MACROS = {
    "ask": "[[can|could] you tell me|tell me|please tell me|do you know|i[ wonder| want to know|'d like to know]|say]",
    "beg": "[would you mind telling me|i was wondering|let me know|any idea]",  # held out
    "do": "[can|could|do] you",
    "see": "[see|spot|find|notice|make out]",
    "name": "[name|give me|tell me|say|write]",
    "picture": "[picture|image|scene|drawing]",
    "colour": "[colour|color]",
    "what": "[what|which]",
    "big": "[big|large]",
    "bigger": "[bigger|larger]",
    "thing": "[thing|object|shape|item]",
    "things": "[things|objects|shapes|items]",
    "object": "[thing|object|item]",
    "objects": "[things|objects|items]",
    "all": "[all [of|] the|all]",
    "in": "[in|at|on]",
}
# Words for the same thing; the first is the one that answers use.
SYNONYMS = {
    "purple": ["violet"],
    "cyan": ["turquoise", "aqua", "teal"],
    "pink": ["rose"],
    "circle": ["disc", "dot", "ball"],
    "square": ["box"],
    "cross": ["plus", "plus sign"],
    "diamond": ["rhombus"],
    "small": ["little", "tiny", "little", "small"],
    "large": ["big", "big", "huge"],
    "centre": ["center", "middle"],
}
COMMON = {"small", "large", "centre"}  # as often called by another name
THINGS = ["object", "thing", "shape", "item", "one", "thing", "object", "figure", "thingy"]
PLURALS = {"box": "boxes", "cross": "crosses", "plus": "plusses", "rhombus": "rhombuses", "thingy": "thingies"}
DIRECTIONS = {
    "left of": "[[just|] left of|[just|immediately|] to the left of|on the left of|on the left side of]",
    "right of": "[[just|] right of|[just|immediately|] to the right of|on the right of|on the right side of]",
    "above": "[above|over|higher than|higher up than|on top of|further up than]",
    "below": "[below|under|beneath|underneath|lower than|lower down than|further down than]",
}
SIDES = {
    "left": "[on the left|[on|at|to] the left[| side|-hand side| hand side]|in the left column]",
    "right": "[on the right|[on|at|to] the right[| side|-hand side| hand side]|in the right column]",
    "top": "[at the top|in the top row|in the upper row|in the top part|in the upper part]",
    "bottom": "[at the bottom|in the bottom row|in the lower row|in the bottom part|in the lower part]",
    "middle row": "in the [middle|centre|center] row",
    "centre column": "in the [middle|centre|center] column",
}

GREETINGS = ["hi, ", "hey, ", "hello, ", "ok, ", "so ", "and ", "now ", "please, ", "well, ", "um, "]
ENDINGS = [" please", " in the picture", " in this image", " here", " in the scene", ", please", " in the drawing"]
CONTRACTIONS = [("what is ", "what's "), ("where is ", "where's "), ("is not", "isn't"), ("what is ", "whats ")]


def read(name: str) -> dict[str, list[str]]:
    """The constructions of each kind, from a file of the folder wordings/."""
    kinds: dict[str, list[str]] = {}
    for line in (Path(__file__).parent / "wordings" / name).read_text().splitlines():
        if line.startswith("  "):
            kinds[list(kinds)[-1]].append(line.strip())
        elif line and not line.startswith("#"):
            kinds[line.removesuffix(":")] = []
    return kinds


KNOWN, HELD_OUT = read("known.txt"), read("held_out.txt")
NOUNS = {  # of things that are not of this world
    kind: [noun for line in lines for noun in (line.split(", ") if "," in line else line.split())]
    for kind, lines in read("nouns.txt").items()
}


def choose(values: Sequence[str], rng: random.Random | None) -> str:
    """A random one, or without `rng` the first."""
    return rng.choice(values) if rng else values[0]


def expand(text: str, rng: random.Random | None) -> str:
    """Replaces macros, then one pair of brackets after the other, innermost first, by one of its alternatives.

    Without `rng`, that is the first.
    """
    while "<" in text:
        text = re.sub(r"<(\w+)>", lambda match: MACROS[match[1]], text)
    while "[" in text:
        text = re.sub(r"\[([^\[\]]*)\]", lambda match: choose(match[1].split("|"), rng), text, count=1)
    return re.sub(r" +([,.]|$)", r"\1", re.sub(" +", " ", text)).strip()


def plural(text: str) -> str:
    """red circles, boxes"""
    return next((text.removesuffix(one) + many for one, many in PLURALS.items() if text.endswith(one)), text + "s")


def misspell(text: str, rng: random.Random) -> str:
    """One typo in a word of four or more letters: a letter is missing, doubled, wrong or swapped with the next."""
    places = [i for match in re.finditer("[a-zA-Z]{4,}", text) for i in range(match.start() + 1, match.end() - 1)]
    if not places:
        return text
    i = rng.choice(places)
    middle = rng.choice(["", text[i] * 2, rng.choice("abcdefghijklmnopqrstuvwxyz"), text[i + 1] + text[i]])
    return text[:i] + middle + text[i + (2 if len(middle) == 2 and middle[0] != middle[1] else 1) :]


class Voice:
    """One speaker: words noun phrases and questions at random.

    Args:
        rng: the only source of randomness.
        held_out: whether to use only constructions that training never uses.
        typos: the share of questions with a typo.
        plain: whether to use only the first wording of everything: "What colour is the circle?"
    """

    def __init__(self, rng: random.Random, held_out: bool = False, typos: float = 0.18, plain: bool = False) -> None:
        self.rng, self.held_out, self.typos, self.plain = rng, held_out, typos, plain
        self.choice = None if plain else rng

    def word(self, word: str) -> str:
        """A word or one of its synonyms."""
        others = None if self.plain else SYNONYMS.get(word)
        return self.rng.choice(others) if others and self.rng.random() < (0.5 if word in COMMON else 0.12) else word

    def noun(
        self, colour: str | None = None, shape: str | None = None, size: str | None = None, placed: bool = False
    ) -> str:
        """ "small red circle", "red one", "thing"; `placed`: whether a place follows, as in "one at the top" """
        words = [self.word(word) for word in (size, colour) if word]
        things = THINGS if words or placed else [thing for thing in THINGS if thing != "one"]
        return " ".join([*words, self.word(shape) if shape else choose(things, self.choice)])

    def cell(self, cell: str) -> str:
        """ "in the top left corner", "at the upper left" """
        if self.plain:
            return f"in the {cell}"
        if cell == "centre":
            return f"in the {self.word(cell)}{self.rng.choice(['', '', ' of the picture'])}"
        row, column = (self.word(word) for word in cell.split())
        row = {"top": "upper", "bottom": "lower"}.get(row, row) if self.rng.random() < 0.15 else row
        both = f"{row} {column}" if self.rng.random() < 0.9 else f"{column} {row}"
        corner = " corner" if "middle" not in cell and "centre" not in cell and self.rng.random() < 0.4 else ""
        return f"{self.rng.choice(['in', 'in', 'at', 'on'])} the {both}{corner}"

    def side(self, side: str) -> str:
        """ "on the left", "at the bottom" """
        return expand(SIDES[side], self.choice)

    def direction(self, direction: str) -> str:
        """ "left of", "underneath" """
        return expand(DIRECTIONS[direction], self.choice)

    def ask(self, kind: str, **slots: str) -> str:
        """A question of a kind, with the worded phrases in its slots."""
        lines = (HELD_OUT if self.held_out else KNOWN)[kind]
        return self.speak(expand(choose(lines, self.choice), self.choice).format(**slots).strip())

    def speak(self, text: str) -> str:
        """Gives a question in lower case the speaker's manners."""
        chance, rng = self.rng.random, self.rng
        ending = "" if text.endswith(".") else "?"
        text = text.removesuffix(".")
        if self.plain:
            return text[:1].upper() + text[1:] + (ending or ".")
        if chance() < 0.1:
            text = rng.choice(GREETINGS) + text
        if chance() < 0.1 and len(text) > 12:
            text += rng.choice(ENDINGS)
        for long, short in CONTRACTIONS:
            text = text.replace(long, short) if chance() < 0.2 else text
        if chance() < 0.08:
            text = re.sub(r"\b(the|a|an) ", "", text)
        if chance() < self.typos:
            text = misspell(text, rng)
        if chance() < 0.7:
            text = text[:1].upper() + text[1:]
        if chance() < 0.02:
            text = text.upper()
        return text + (ending or ".") if chance() < 0.65 else text
