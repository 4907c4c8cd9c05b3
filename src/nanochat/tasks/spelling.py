"""Spelling words and counting their letters, which a model that reads tokens has to learn letter by letter."""

import functools
import re
import string
from collections import Counter
from collections.abc import Sequence

from nanochat.corpus.conversation import Conversation, assistant, user
from nanochat.tasks.library_objects import documented_objects
from nanochat.tasks.numerals import last_number
from nanochat.tasks.splits import MAX_TEST_PROBLEMS, pick, split_by_key
from nanochat.tasks.task import Problem, Split, Task

VERSION = 1
TRAIN_PROBLEMS = 4000

WORD = re.compile(r"(?<![\w.`'\\-])[a-z]{3,12}(?![\w`'(\\-])")
# What stands once is often an abbreviation or a slip.
FEWEST_OCCURRENCES = 2
# Of ten questions about letters, one is about a letter that the word may not have.
ANY_LETTER_IN = 10

SPELL = ("Spell the word {word}.", "How do you spell {word}?", "Spell {word} letter by letter.")
COUNT = (
    "How many {letter} are in {word}?",
    "How many times does the letter {letter} appear in {word}?",
    "Count the letter {letter} in the word {word}.",
)


def spelling() -> Task:
    """Half of the problems ask to spell a word, half how often it has a letter."""
    return Task("spelling", "generative", _problems, is_correct=_is_correct)


def words(split: Split) -> list[str]:
    """The words of one split, one for each problem."""
    limit = MAX_TEST_PROBLEMS if split == "test" else TRAIN_PROBLEMS
    return split_by_key(_all_words(), str, split)[:limit]


@functools.cache
def _all_words() -> tuple[str, ...]:
    """The words that the documentation of the standard library uses."""
    described, _ = documented_objects()
    counts = Counter(word for item in described for word in WORD.findall(item.prose))
    return tuple(sorted(word for word, count in counts.items() if count >= FEWEST_OCCURRENCES))


def _problems(split: Split) -> Sequence[Problem]:
    return [_problem(word) for word in words(split)]


def _problem(word: str) -> Problem:
    spelt = ",".join(word)
    if pick((True, False), word):
        question, answer = pick(SPELL, word, "spell").format(word=word), f"{word}:{spelt}"
    else:
        letters = string.ascii_lowercase if pick(range(ANY_LETTER_IN), word, "any") == 0 else word
        letter = pick(letters, word, "letter")
        question = pick(COUNT, word, "count").format(word=word, letter=letter)
        answer = f"{word}:{spelt}\n{letter}:{word.count(letter)}"
    return Problem(Conversation((user(question), assistant(answer))))


def _is_correct(problem: Problem, answer: str) -> bool:
    """A count must be the right number; a spelling must have the right letters after the word."""
    count = last_number(problem.answer)
    if count is not None:
        return last_number(answer) == count
    return _letters(answer) == _letters(problem.answer)


def _letters(text: str) -> list[str]:
    return re.findall(r"\b[a-z]\b", text.lower())
