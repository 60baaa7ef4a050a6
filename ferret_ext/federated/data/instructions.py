"""Instruction records made here: small tasks with exact answers, in the formats of four public data sets.

A task is a definition and a function that draws (input, output). The same tasks are written out as records of
CodeAlpaca (`alpaca`), Dolly (`dolly`) or Natural Instructions (`natural_instructions_task`); `gsm8k` has word
problems of its own. Equal arguments give equal records.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

Pair = tuple[str, str]  # input, output

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gita", "Hugo", "Iris", "Jon", "Kira", "Leo")
THINGS = ("apple", "book", "coin", "drum", "egg", "flag", "kite", "lamp", "nut", "pen", "ring", "shell")
WORDS = (
    *THINGS,
    "blue",
    "cold",
    "dark",
    "east",
    "fast",
    "green",
    "hill",
    "moon",
    "rain",
    "sand",
    "tree",
    "wind",
)
CITIES = ("Arden", "Belmont", "Corin", "Dale", "Elster", "Ford", "Gent", "Harbour")
KINDS = {
    "animal": ("cat", "dog", "goat", "hen", "horse", "owl"),
    "colour": ("blue", "green", "grey", "red", "white", "yellow"),
    "tool": ("drill", "file", "hammer", "plane", "rake", "saw"),
}


@dataclass(frozen=True)
class Task:
    """A definition, Dolly's category for it, and how to draw an input and its one right output."""

    name: str
    category: str
    definition: str
    draw: Callable[[Random], Pair]


def _words(random: Random, low: int = 3, high: int = 5) -> list[str]:
    return random.sample(WORDS, random.randint(low, high))


def _numbers(random: Random) -> list[int]:
    return random.sample(range(1, 50), random.randint(3, 5))


def _join(items: list[Any]) -> str:
    return " ".join(map(str, items))


def _add(random: Random) -> Pair:
    a, b = random.randint(1, 20), random.randint(1, 20)
    return f"{a} + {b}", str(a + b)


def _copy(random: Random) -> Pair:
    text = _join(_words(random))
    return text, text


def _sort_numbers(random: Random) -> Pair:
    numbers = _numbers(random)
    return _join(numbers), _join(sorted(numbers))


def _sort_words(random: Random) -> Pair:
    words = _words(random)
    return _join(words), _join(sorted(words))


def _reverse(random: Random) -> Pair:
    words = _words(random)
    return _join(words), _join(words[::-1])


def _count(random: Random) -> Pair:
    words = _words(random, 2, 9)
    return _join(words), str(len(words))


def _largest(random: Random) -> Pair:
    numbers = _numbers(random)
    return _join(numbers), str(max(numbers))


def _uppercase(random: Random) -> Pair:
    text = _join(_words(random))
    return text, text.upper()


def _classify(random: Random) -> Pair:
    kind = random.choice(list(KINDS))
    return random.choice(KINDS[kind]), kind


def _brainstorm(random: Random) -> Pair:
    kind = random.choice(list(KINDS))
    return f"three of the kind {kind}", ", ".join(KINDS[kind][:3])


def _extract_city(random: Random) -> Pair:
    name, city, thing = random.choice(NAMES), random.choice(CITIES), random.choice(THINGS)
    return f"{name} lives in {city} and sells {thing}s.", city


def _answer_who(random: Random) -> Pair:
    (first, second), (thing, other) = random.sample(NAMES, 2), random.sample(THINGS, 2)
    return f"{first} has a {thing}. {second} has a {other}. Who has the {other}?", second


def _summarise(random: Random) -> Pair:
    name, thing, count = random.choice(NAMES), random.choice(THINGS), random.randint(2, 9)
    days = " and ".join(random.sample(("Monday", "Tuesday", "Friday", "Sunday"), 2))
    return (
        f"On {days}, after a long walk, {name} found {count} {thing}s by the road.",
        f"{name} found {count} {thing}s.",
    )


def _python_function(random: Random) -> Pair:
    verb, sign = random.choice((("add", "+"), ("subtract", "-"), ("multiply", "*")))
    number = random.randint(2, 9)
    return f"name: {verb}_{number}", f"def {verb}_{number}(x):\n    return x {sign} {number}"


def _python_loop(random: Random) -> Pair:
    number, word = random.randint(2, 9), random.choice(WORDS)
    return f"{number} times {word}", f'for _ in range({number}):\n    print("{word}")'


TASKS = (
    Task("addition", "open_qa", "Add the two numbers.", _add),
    Task("copying", "closed_qa", "Repeat the text.", _copy),
    Task("sorting_numbers", "closed_qa", "Sort the numbers from small to large.", _sort_numbers),
    Task("sorting_words", "closed_qa", "Sort the words from a to z.", _sort_words),
    Task("reversing", "closed_qa", "Write the words in reverse order.", _reverse),
    Task("counting", "closed_qa", "Count the words.", _count),
    Task("largest_number", "closed_qa", "Write the largest number.", _largest),
    Task("capital_letters", "closed_qa", "Write the text in capital letters.", _uppercase),
    Task("kind_of_thing", "classification", "Is it an animal, a colour or a tool?", _classify),
    Task("three_things", "brainstorming", "Name some things.", _brainstorm),
    Task("city_in_text", "information_extraction", "Which city does the text name?", _extract_city),
    Task("who_has_it", "closed_qa", "Answer the question about the text.", _answer_who),
    Task("summary", "summarization", "Write the text in a few words.", _summarise),
    Task("python_function", "open_qa", "Write a Python function of this name.", _python_function),
    Task("python_loop", "open_qa", "Write a Python loop that prints the word.", _python_loop),
)


def alpaca(count: int, seed: int) -> Iterator[dict[str, str]]:
    """Records with instruction, input and output, the tasks in turn."""
    for task, (given, wanted) in _draw(count, seed):
        yield {"instruction": task.definition, "input": given, "output": wanted}


def dolly(count: int, seed: int) -> Iterator[dict[str, str]]:
    """Records with instruction, context, response and category; a short context goes into the instruction."""
    for task, (given, wanted) in _draw(count, seed):
        fits = len(given) < 12
        instruction = f"{task.definition} {given}" if fits else task.definition
        context = "" if fits else given
        yield {"instruction": instruction, "context": context, "response": wanted, "category": task.category}


def natural_instructions_task(task: Task, count: int, seed: int) -> dict[str, Any]:
    """One task file: Definition, Categories and Instances, each of these with id, input and output."""
    random = Random(f"{task.name} {seed}")
    pairs = [task.draw(random) for _ in range(count)]
    instances = [
        {"id": f"{task.name}-{index}", "input": given, "output": [wanted]}
        for index, (given, wanted) in enumerate(pairs)
    ]
    return {"Definition": [task.definition], "Categories": [task.category], "Instances": instances}


def gsm8k(count: int, seed: int) -> Iterator[dict[str, str]]:
    """Word problems with question and answer: steps with calculator marks, then the number after ####."""
    random = Random(f"word problems {seed}")
    for _ in range(count):
        question, steps, result = random.choice((_buying, _sharing, _saving))(random)
        yield {"question": question, "answer": "\n".join([*steps, f"#### {result}"])}


SETS: dict[str, Callable[..., Iterator[dict[str, str]]]] = {"alpaca": alpaca, "dolly": dolly, "gsm8k": gsm8k}


def write(folder: Path, count: int = 1000, seed: int = 0) -> None:
    """Writes alpaca.jsonl, dolly.jsonl, gsm8k.jsonl and natural_instructions/, laid out like the original.

    That is tasks/NAME.json, and splits/default/train_tasks.txt and test_tasks.txt; the last three are tests.
    """
    tasks, lists = (folder / "natural_instructions" / name for name in ("tasks", "splits/default"))
    tasks.mkdir(parents=True, exist_ok=True)
    lists.mkdir(parents=True, exist_ok=True)
    for split, part in (("train", TASKS[:-3]), ("test", TASKS[-3:])):
        (lists / f"{split}_tasks.txt").write_text("".join(f"{task.name}\n" for task in part), "utf-8")
    for name, make in SETS.items():
        lines = (json.dumps(record) + "\n" for record in make(count, seed))
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    for task in TASKS:
        content = natural_instructions_task(task, count // len(TASKS) + 1, seed)
        (tasks / f"{task.name}.json").write_text(json.dumps(content, indent=1), "utf-8")


def _draw(count: int, seed: int) -> Iterator[tuple[Task, Pair]]:
    random = Random(f"tasks {seed}")
    for index in range(count):
        task = TASKS[index % len(TASKS)]
        yield task, task.draw(random)


def _buying(random: Random) -> tuple[str, list[str], int]:
    name, thing = random.choice(NAMES), random.choice(THINGS)
    have, more, price = random.randint(2, 9), random.randint(2, 9), random.randint(2, 5)
    total = have + more
    question = (
        f"{name} has {have} {thing}s and buys {more} more. Each is worth {price} dollars. "
        f"How many dollars are all {thing}s worth?"
    )
    steps = [
        f"{name} has {have} + {more} = <<{have}+{more}={total}>>{total} {thing}s.",
        f"They are worth {total} * {price} = <<{total}*{price}={total * price}>>{total * price} dollars.",
    ]
    return question, steps, total * price


def _sharing(random: Random) -> tuple[str, list[str], int]:
    name, thing = random.choice(NAMES), random.choice(THINGS)
    friends, each = random.randint(2, 9), random.randint(2, 9)
    total = friends * each
    question = (
        f"{name} shares {total} {thing}s equally among {friends} friends. How many does each friend get?"
    )
    return (
        question,
        [f"Each friend gets {total} / {friends} = <<{total}/{friends}={each}>>{each} {thing}s."],
        each,
    )


def _saving(random: Random) -> tuple[str, list[str], int]:
    name, weeks, rate = random.choice(NAMES), random.randint(2, 9), random.randint(2, 9)
    saved = weeks * rate
    spent = random.randint(1, saved - 1)
    left = saved - spent
    question = (
        f"{name} saves {rate} coins a week for {weeks} weeks and then spends {spent}. "
        "How many coins are left?"
    )
    steps = [
        f"{name} saves {weeks} * {rate} = <<{weeks}*{rate}={saved}>>{saved} coins.",
        f"There are {saved} - {spent} = <<{saved}-{spent}={left}>>{left} coins left.",
    ]
    return question, steps, left
