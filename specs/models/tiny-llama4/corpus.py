"""The problems the tiny Llama 4 learns: four domains that stand for the record's four benchmarks, endless, from a seed.

`code` finishes a Python function and runs it, `math` writes out arithmetic, `facts` recalls an invented world and picks
a letter, `extract` copies fields out of a record. Every answer ends with `Answer: <target>`: one regex scores them all.

Refuses to be a benchmark of anything but the pipeline. Held-out is disjoint from train by construction: a problem's
side is a hash of its content (numbers, entities, options), so the same content in other words stays on the same side.

    python specs/models/tiny-llama4/corpus.py --out DIR      # writes prompts.jsonl and heldout.jsonl
"""

import argparse
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

HELDOUT_SHARE = 16  # one content in sixteen is held out
ANSWER_PATTERN = re.compile(r"^Answer: (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Problem:
    """One question with its reference answer; `target` is what must follow the last `Answer: `."""

    id: str
    domain: str
    prompt: str
    answer: str
    target: str


@dataclass(frozen=True)
class Draw:
    """What a domain's generator returns: the texts, and the `content` that decides the split."""

    content: tuple
    prompt: str
    answer: str
    target: str


# ---------------------------------------------------------------- math

THINGS = ["apples", "books", "coins", "lamps", "stones", "tickets", "shells", "cups"]
PEOPLE = ["Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "Jane", "Kai", "Lena"]
EVENTS = {
    "+": ["buys {} more", "finds {} more"],
    "-": ["gives away {}", "loses {}"],
    "*": ["now has {} times as many"],
}
MATH_FRAMES = ["Compute {}.", "What is {}?", "Work out {} step by step.", "Calculate {}."]


def written_step(value: int, operator: str, operand: int) -> tuple[int, str]:
    """One operation written so that each `=` needs at most one carry: tens first, then ones."""
    tens, ones = operand // 10 * 10, operand % 10
    if operator == "*":
        high, low = value // 10 * 10, value % 10
        if not high or not low:
            return value * operand, f"{value} * {operand} = {value * operand}"
        parts = f"{high} * {operand} = {high * operand}, {low} * {operand} = {low * operand}"
        return value * operand, f"{parts}, {high * operand} + {low * operand} = {value * operand}"
    sign = 1 if operator == "+" else -1
    if not tens or not ones:
        return value + sign * operand, f"{value} {operator} {operand} = {value + sign * operand}"
    middle, result = value + sign * tens, value + sign * operand
    return result, f"{value} {operator} {tens} = {middle}, {middle} {operator} {ones} = {result}"


def draw_operations(rng: random.Random) -> tuple[int, list[tuple[str, int]]]:
    """A start and two or three operations; every intermediate value stays within 0..199."""
    start = rng.randint(11, 49)
    value, operations = start, []
    for position in range(rng.choice([2, 2, 3])):
        choices = ["+", "-"] + (["*"] if position == 0 and value <= 24 else [])
        operator = rng.choice(choices)
        if operator == "-" and value < 4:
            operator = "+"
        limit = {"+": 60, "-": min(value - 1, 60), "*": 5}[operator]
        operand = rng.randint(2, max(2, limit))
        value = {"+": value + operand, "-": value - operand, "*": value * operand}[operator]
        operations.append((operator, operand))
    return start, operations


def math_question(rng: random.Random, start: int, operations: list[tuple[str, int]]) -> str:
    """The operations as an expression, or as a story when a story is as clear."""
    if rng.random() < 0.5:
        expression = str(start)
        for operator, operand in operations:
            # No brackets are needed: a product can only come first.
            expression += f" {operator} {operand}"
        return rng.choice(MATH_FRAMES).format(expression)
    person, thing = rng.choice(PEOPLE), rng.choice(THINGS)
    events = [rng.choice(EVENTS[operator]).format(operand) for operator, operand in operations]
    return f"{person} has {start} {thing}. {person} {', then '.join(events)}. How many {thing} does {person} have?"


def draw_math(rng: random.Random) -> Draw:
    start, operations = draw_operations(rng)
    value, lines = start, []
    for number, (operator, operand) in enumerate(operations, 1):
        value, text = written_step(value, operator, operand)
        lines.append(f"Step {number}: {text}.")
    content = (start, *operations)
    answer = "\n".join([*lines, f"Answer: {value}"])
    return Draw(content, math_question(rng, start, operations), answer, str(value))


# ---------------------------------------------------------------- facts

ATTRIBUTES = {
    "metal": ["iron", "copper", "tin", "zinc", "silver", "gold", "lead", "nickel"],
    "color": ["red", "blue", "green", "yellow", "white", "black", "purple", "orange"],
    "animal": ["fox", "bear", "owl", "wolf", "otter", "heron", "lynx", "stag"],
    "craft": ["weaving", "pottery", "glass", "carving", "baking", "printing", "dyeing", "brewing"],
}
QUESTIONS = {
    "metal": ["Which metal is mined in {}?", "What metal do people mine in {}?", "{} mines which metal?"],
    "color": ["Which color is the flag of {}?", "What color is on the flag of {}?", "The flag of {} has which color?"],
    "animal": ["Which animal is on the seal of {}?", "What animal does {} have on its seal?", "{} has which animal?"],
    "craft": ["Which craft is {} famous for?", "What craft do people learn in {}?", "{} is famous for which craft?"],
}
STATEMENTS = {
    "metal": "The metal mined in {} is {}.",
    "color": "The color on the flag of {} is {}.",
    "animal": "The animal on the seal of {} is the {}.",
    "craft": "The craft that {} is famous for is {}.",
}


def build_world(num_towns: int = 64) -> dict[str, dict[str, str]]:
    """The invented world, always the same: town -> attribute -> value."""
    rng = random.Random("kilotok world")
    heads = ["Vel", "Tor", "Mar", "Kes", "Bran", "Dol", "Fen", "Hal"]
    tails = ["mora", "wick", "dale", "stad", "ria", "gate", "holm", "burg"]
    towns = [head + tail for head in heads for tail in tails][:num_towns]
    return {town: {name: rng.choice(values) for name, values in ATTRIBUTES.items()} for town in towns}


WORLD = build_world()


def draw_facts(rng: random.Random) -> Draw:
    town, attribute = rng.choice(list(WORLD)), rng.choice(list(ATTRIBUTES))
    truth = WORLD[town][attribute]
    options = [truth, *rng.sample([value for value in ATTRIBUTES[attribute] if value != truth], 3)]
    rng.shuffle(options)
    letter = "ABCD"[options.index(truth)]
    lettered = list(zip("ABCD", options, strict=True))
    listing = "\n".join(f"{name}) {option}" for name, option in lettered)
    prompt = f"{rng.choice(QUESTIONS[attribute]).format(town)}\n{listing}"
    checked = [f"{name}) {option} {'yes' if option == truth else 'no'}" for name, option in lettered]
    lines = [
        f"The question asks for the {attribute} of {town}.",
        STATEMENTS[attribute].format(town, truth),
        f"{', '.join(checked)}.",
        f"Answer: {letter}",
    ]
    return Draw((town, attribute, *options), prompt, "\n".join(lines), letter)


# ---------------------------------------------------------------- extract

LAST_NAMES = ["Adler", "Brook", "Costa", "Drake", "Ellis", "Frost", "Grant", "Hayes", "Irwin", "Jansen", "Lopez"]
CITIES = ["Oslo", "Lima", "Cairo", "Paris", "Quito", "Delhi", "Turin", "Kyoto", "Perth", "Dakar", "Milan", "Boston"]
MONTHS = ["January", "March", "April", "June", "July", "August", "October", "November"]
RECORDS = [
    "On {date}, {name} from {city} ordered {item} with code {code}.",
    "{name} of {city} ordered {item} on {date}. The code is {code}.",
    "Order {code}: {item} for {name}, sent to {city} on {date}.",
    "The code {code} stands for {item}. {name} in {city} paid on {date}.",
]
LABELS = {"name": "Name", "city": "City", "date": "Date", "item": "Item", "code": "Code"}


def draw_extract(rng: random.Random) -> Draw:
    fields = {
        "name": f"{rng.choice(PEOPLE)} {rng.choice(LAST_NAMES)}",
        "city": rng.choice(CITIES),
        "date": f"{rng.randint(1, 28)} {rng.choice(MONTHS)}",
        "item": f"{rng.randint(2, 19)} {rng.choice(THINGS)}",
        "code": f"{rng.choice('KMRT')}{rng.randint(100, 999)}",
    }
    record = rng.choice(RECORDS).format(**fields)
    if rng.random() < 0.3:
        wanted = rng.choice(["city", "code", "item"])
        prompt = f"Summarize the order in one line, then answer with the {wanted}.\n{record}"
        lines = [f"Summary: {fields['name']} ({fields['city']}) ordered {fields['item']} on {fields['date']}, "
                 f"code {fields['code']}."]  # fmt: skip
    else:
        asked = rng.sample(list(fields), rng.choice([4, 4, 5]))
        wanted = rng.choice(asked)
        listing = f"{', '.join(asked[:-1])} and {asked[-1]}"
        prompt = f"Extract the {listing}, then answer with the {wanted}.\n{record}"
        lines = [f"{LABELS[key]}: {fields[key]}" for key in asked]
    content = (wanted, *fields.values())
    return Draw(content, prompt, "\n".join([*lines, f"Answer: {fields[wanted]}"]), fields[wanted])


# ---------------------------------------------------------------- code

VERBS = ["get", "make", "find", "compute", "build", "read"]
NOUNS = ["score", "price", "level", "weight", "total", "count", "size", "rank"]
# Parameter, argument, docstring, body lines, the run written down, the result.
Code = tuple[str, str, str, list[str], str, str]


def draw_numbers(rng: random.Random, low: int = 1, high: int = 20) -> list[int]:
    return rng.sample(range(low, high + 1), rng.choice([3, 4]))


def kind_affine(rng: random.Random) -> Code:
    n, a, b = rng.randint(2, 9), rng.randint(2, 9), rng.randint(1, 9)
    sign, word = rng.choice([("+", "plus"), ("-", "minus")])
    if sign == "-":
        b = min(b, n * a - 1)
    result = n * a + b if sign == "+" else n * a - b
    run = f"{n} * {a} = {n * a}, {n * a} {sign} {b} = {result}"
    return "x", str(n), f"Return x times {a} {word} {b}.", [f"return x * {a} {sign} {b}"], run, str(result)


def kind_extreme(rng: random.Random) -> Code:
    values = draw_numbers(rng)
    name, word, function = rng.choice([("max", "largest", max), ("min", "smallest", min)])
    result = str(function(values))
    body, run = [f"return {name}(values)"], f"the {word} is {result}"
    return "values", str(values), f"Return the {word} value.", body, run, result


def kind_index(rng: random.Random) -> Code:
    values = draw_numbers(rng)
    word, index, position = rng.choice([("first", "0", 0), ("second", "1", 1), ("last", "-1", -1)])
    result = str(values[position])
    body, run = [f"return values[{index}]"], f"the {word} is {result}"
    return "values", str(values), f"Return the {word} value.", body, run, result


def kind_count(rng: random.Random) -> Code:
    values, a = draw_numbers(rng), rng.randint(5, 15)
    word, sign = rng.choice([("above", ">"), ("below", "<")])
    hits = [value > a if sign == ">" else value < a for value in values]
    body = ["count = 0", "for value in values:", f"    if value {sign} {a}:", "        count += 1", "return count"]
    run = ", ".join(f"{value} {'yes' if hit else 'no'}" for value, hit in zip(values, hits, strict=True))
    return "values", str(values), f"Count the values {word} {a}.", body, run, str(sum(hits))


def kind_keep(rng: random.Random) -> Code:
    values, a = draw_numbers(rng), rng.randint(5, 15)
    word, sign = rng.choice([("above", ">"), ("below", "<")])
    hits = [value > a if sign == ">" else value < a for value in values]
    run = ", ".join(f"{value} {'yes' if hit else 'no'}" for value, hit in zip(values, hits, strict=True))
    kept = [value for value, hit in zip(values, hits, strict=True) if hit]
    body = [f"return [value for value in values if value {sign} {a}]"]
    return "values", str(values), f"Keep the values {word} {a}.", body, run, str(kept)


def kind_sum(rng: random.Random) -> Code:
    values = draw_numbers(rng, 1, 9)
    total, steps = values[0], []
    for value in values[1:]:
        steps.append(f"{total} + {value} = {total + value}")
        total += value
    body = ["total = 0", "for value in values:", "    total += value", "return total"]
    return "values", str(values), "Return the sum of the values.", body, ", ".join(steps), str(total)


def kind_shift(rng: random.Random) -> Code:
    values, a = draw_numbers(rng, 1, 15), rng.randint(2, 9)
    run = ", ".join(f"{value} + {a} = {value + a}" for value in values)
    body = [f"return [value + {a} for value in values]"]
    return "values", str(values), f"Add {a} to each value.", body, run, str([value + a for value in values])


def kind_clamp(rng: random.Random) -> Code:
    n, a = rng.sample(range(2, 60), 2)
    word, sign = rng.choice([("at most", ">"), ("at least", "<")])
    hit = n > a if sign == ">" else n < a
    body = [f"if x {sign} {a}:", f"    return {a}", "return x"]
    return "x", str(n), f"Return x, but {word} {a}.", body, f"{n} {sign} {a} is {hit}", str(a if hit else n)


def kind_label(rng: random.Random) -> Code:
    n, a = rng.sample(range(2, 60), 2)
    low, high = rng.choice([("small", "big"), ("low", "high"), ("cold", "warm"), ("cheap", "dear")])
    body = [f"if x > {a}:", f'    return "{high}"', f'return "{low}"']
    run = f"{n} > {a} is {n > a}"
    return "x", str(n), f'Return "{high}" if x is above {a}, else "{low}".', body, run, high if n > a else low


CODE_KINDS: list[Callable[[random.Random], Code]] = [
    kind_affine, kind_extreme, kind_index, kind_count, kind_keep, kind_sum, kind_shift, kind_clamp, kind_label,
]  # fmt: skip
CODE_FRAMES = [
    "Complete the function and run {}.",
    "Finish this function, then evaluate {}.",
    "Write the body and give {}.",
]


def draw_code(rng: random.Random) -> Draw:
    parameter, argument, docstring, body, run, result = rng.choice(CODE_KINDS)(rng)
    name = f"{rng.choice(VERBS)}_{rng.choice(NOUNS)}"
    call = f"{name}({argument})"
    prompt = f'{rng.choice(CODE_FRAMES).format(call)}\ndef {name}({parameter}):\n    """{docstring}"""'
    code = "\n".join([f"def {name}({parameter}):", *(f"    {line}" for line in body)])
    answer = f"```python\n{code}\n```\nRun {call}: {run}.\nAnswer: {result}"
    return Draw((docstring, argument), prompt, answer, result)


# ---------------------------------------------------------------- problems, conversations, files

DOMAINS: dict[str, Callable[[random.Random], Draw]] = {
    "code": draw_code, "math": draw_math, "facts": draw_facts, "extract": draw_extract,
}  # fmt: skip


def is_heldout(domain: str, content: tuple) -> bool:
    """Which side a content falls on; independent of seed, wording and order of generation."""
    digest = hashlib.sha256(json.dumps([domain, content]).encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELDOUT_SHARE == 0


def draw_problem(rng: random.Random, domain: str, heldout: bool = False) -> Problem:
    """One problem of `domain` from the asked side of the split; its id is a hash of its prompt."""
    while True:
        draw = DOMAINS[domain](rng)
        if is_heldout(domain, draw.content) == heldout:
            identity = hashlib.sha256(draw.prompt.encode()).hexdigest()[:10]
            return Problem(f"{domain}-{identity}", domain, draw.prompt, draw.answer, draw.target)


def merge_problems(problems: list[Problem]) -> tuple[str, str]:
    """Several problems as one numbered request, so that one long answer can be asked for."""
    asked = "\n\n".join(f"Problem {number}: {problem.prompt}" for number, problem in enumerate(problems, 1))
    answered = "\n\n".join(f"Problem {number}:\n{problem.answer}" for number, problem in enumerate(problems, 1))
    return f"Solve the {len(problems)} problems in order.\n\n{asked}", answered


def draw_turns(rng: random.Random, domains: Sequence[str] = tuple(DOMAINS)) -> Iterator[tuple[str, str]]:
    """Endless (prompt, answer) turns of one conversation, train side: single problems and numbered requests.

    A domain that `domains` names twice is drawn twice as often.
    """
    while True:
        count = rng.choice([1, 1, 1, 1, 2, 3, 4, 5])
        problems = [draw_problem(rng, rng.choice(domains)) for _ in range(count)]
        yield merge_problems(problems) if count > 1 else (problems[0].prompt, problems[0].answer)


def extract_target(text: str) -> str | None:
    """The value after the last `Answer: ` line of a generated text, or None when it has none."""
    found = ANSWER_PATTERN.findall(text)
    return found[-1].strip() if found else None


def draw_unique(seed: str, per_domain: int, heldout: bool) -> list[Problem]:
    """`per_domain` problems of each domain with distinct prompts."""
    rng, chosen = random.Random(seed), {}
    for domain in DOMAINS:
        while sum(problem.domain == domain for problem in chosen.values()) < per_domain:
            problem = draw_problem(rng, domain, heldout)
            chosen[problem.id] = problem
    return list(chosen.values())


def write_prompt_files(out: Path, train_per_domain: int = 600, heldout_per_domain: int = 64) -> None:
    """prompts.jsonl (train side, no answers: the target model writes them) and heldout.jsonl (with answers)."""
    keep = ("id", "domain", "prompt")
    train = [{key: asdict(problem)[key] for key in keep} for problem in draw_unique("prompts", train_per_domain, False)]
    heldout = [asdict(problem) for problem in draw_unique("heldout", heldout_per_domain, True)]
    for name, rows in (("prompts.jsonl", train), ("heldout.jsonl", heldout)):
        (out / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    write_prompt_files(parser.parse_args().out)
