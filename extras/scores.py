"""The scores of the benchmarks that LLaVA-1.5 reports: from answers and ground truth to a table.

Sources: LLaVA-1.5 (arXiv 2310.03744), section 4, and its released evaluation scripts; VQA v2's official evaluation
(arXiv 1612.00837) for the accuracy over ten answers; POPE (arXiv 2305.10355).
"""

import re
from collections.abc import Callable, Sequence

# Scores of one answer, from 0 to 1; `answers` are the ground truth


def plain(text: str) -> str:
    """The text in lower case, with single spaces and without a final full stop."""
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


def exact_match(text: str, answers: Sequence[str]) -> float:
    """1 if the text equals one of the answers, ignoring case, white space and a final full stop (as for GQA)."""
    return float(plain(text) in map(plain, answers))


NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
NUMBERS = {word: str(number) for number, word in enumerate(NUMBER_WORDS)} | {"none": "0"}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
# Each contraction without one of its apostrophes. Those that would become another word ("well", "shed") are not listed.
MISSPELLED = {
    word[:i] + word[i + 1 :]: word for word in CONTRACTIONS.split() for i in range(len(word)) if word[i] == "'"
}


def vqa_normalised(text: str) -> str:
    """Normalises a text as VQA's evaluation does: no punctuation or articles, numbers as digits, apostrophes restored.

    A punctuation mark is removed if it is next to a space anywhere in the text, or if the text contains a comma between
    digits (1,000); otherwise it becomes a space. A full stop is removed unless a digit follows.
    """
    text = " ".join(text.split())
    joined = re.search(r"\d,\d", text)
    result = text
    for mark in PUNCTUATION:
        result = result.replace(mark, "" if f"{mark} " in text or f" {mark}" in text or joined else " ")
    result = re.sub(r"\.(?!\d)", "", result)
    words = [NUMBERS.get(word, word) for word in result.lower().split()]
    return " ".join(MISSPELLED.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(text: str, answers: Sequence[str]) -> float:
    """VQA's accuracy: the mean of min(matches / 3, 1) over all ways to leave out one of the (ten) human answers."""
    text, answers = vqa_normalised(text), [vqa_normalised(answer) for answer in answers]
    matches = answers.count(text)
    return sum(min((matches - (answer == text)) / 3, 1) for answer in answers) / len(answers)


def option_letter(text: str) -> str | None:
    """The option named in an answer to a multiple-choice question: "B", "b.", "(B) a cat", "The answer is B." -> "B".

    It is the first standalone capital from A to H; a lower-case letter counts only if the answer has no other text.
    """
    found = re.search(r"(?<![\w'])([A-H])(?![\w'])", text) or re.fullmatch(r"\W*([a-h])\W*", text)
    return found and found[1].upper()


def letter_match(text: str, answers: Sequence[str]) -> float:
    """1 if the text names the right option."""
    return float(option_letter(text) in [answer.strip().upper() for answer in answers])


def scienceqa_letter(text: str) -> str | None:
    """The option as the released ScienceQA script reads it: "B", "B. a cat", or one "The answer is B." anywhere.

    It is stricter than `option_letter`: "B.", "(B)" and "b" name no option.
    """
    if found := re.fullmatch(r"([A-E])(\. .*)?", text, re.DOTALL):
        return found[1]
    named = re.findall(r"The answer is ([A-Z]).", text)
    return named[0] if len(named) == 1 else None


def scienceqa_match(text: str, answers: Sequence[str]) -> float:
    """1 if the text names the right option of a ScienceQA problem."""
    return float(scienceqa_letter(text) in [answer.strip().upper() for answer in answers])


def says_yes(text: str) -> bool:
    """How POPE reads an answer: as no if its first sentence contains the word "No", "no" or "not", otherwise as yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


# Scores of many answers: from (text, ground truth) pairs to the columns of the table


def mean_of(score: Callable[[str, Sequence[str]], float]) -> Callable[[list], dict[str, float]]:
    """The table's columns for a score that is averaged over the answers."""
    return lambda pairs: {"accuracy": sum(score(text, answers) for text, answers in pairs) / len(pairs)}


def pope(pairs: list[tuple[str, Sequence[str]]]) -> dict[str, float]:
    """POPE's metrics, with yes as the positive class; a division by zero counts as 0."""
    outcomes = [(says_yes(text), answers[0].strip().lower() != "no") for text, answers in pairs]
    tp, fp, fn, tn = (outcomes.count(kind) for kind in [(True, True), (True, False), (False, True), (False, False)])
    precision, recall = tp / max(1, tp + fp), tp / max(1, tp + fn)
    return {
        "accuracy": (tp + tn) / len(pairs),
        "precision": precision,
        "recall": recall,
        "F1": 2 * tp / max(1, 2 * tp + fp + fn),
        "yes ratio": (tp + fp) / len(pairs),
    }


METRICS = {
    "exact": mean_of(exact_match),
    "vqa": mean_of(vqa_accuracy),
    "pope": pope,
    "letter": mean_of(letter_match),
    "scienceqa": mean_of(scienceqa_match),
}
# What the ground truth of a metric must look like, and how many answers it needs: VQA's accuracy cannot reach 1 with
# fewer than four.
TRUTH = {"pope": r"(?i)\s*(yes|no)\s*", "letter": r"\s*[A-Ha-h]\s*", "scienceqa": r"\s*[A-Ea-e]\s*"}
FEWEST = {"vqa": 4}


def score_table(questions: list[dict], texts: list[str], metric: str) -> str:
    """One line per named category, in order of first appearance, and one for all questions; in percent."""
    groups: dict[str, list] = {}
    for question, text in zip(questions, texts, strict=True):
        groups.setdefault(str(question.get("category", "")), []).append((text, question["answers"]))
    pairs = [pair for group in groups.values() for pair in group]
    groups = ({} if set(groups) == {""} else groups) | {"all": pairs}
    width = max(8, *map(len, groups))
    columns = list(METRICS[metric](pairs))
    lines = [f"{'category':{width}}  questions  " + "  ".join(f"{name:>9}" for name in columns)]
    for name, group in groups.items():
        figures = METRICS[metric](group)
        lines.append(f"{name:{width}}  {len(group):9}  " + "  ".join(f"{100 * figures[name]:9.2f}" for name in columns))
    return "\n".join(lines)
