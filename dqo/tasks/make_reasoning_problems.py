"""Writes the reasoning task's bundled problems: `python -m dqo.tasks.make_reasoning_problems`.

Word problems of one or two steps from the templates below, with small numbers, each with two solutions that go
different ways where arithmetic offers two (the terms the other way round, repeated addition, division checked by
multiplication, two steps in another order). Nothing is read but this file, and the seed is fixed, so the same bytes
come out each time.

A template is a function that draws its names, things and numbers, and returns a problem, or `None` where the numbers
that it drew do not fit.
"""

import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from dqo.files import write_text

SEED = 0
PER_TEMPLATE = 15
LARGEST = 50
"""No answer is larger: a small model has to be able to learn this."""
PATH = Path(__file__).with_name("reasoning_problems.jsonl")


@dataclass(frozen=True)
class Problem:
    """A word problem.

    Attributes:
        question: What is asked, with all numbers that are needed.
        answer: The result in digits.
        references: Worked solutions, each of which ends in the answer.
    """

    question: str
    answer: str
    references: list[str]


@dataclass(frozen=True)
class Person:
    """Somebody in a problem, with what stands for them in a sentence."""

    name: str
    he: str
    his: str


@dataclass(frozen=True)
class Thing:
    """Something that is counted."""

    one: str
    many: str


Template = Callable[[random.Random], Problem | None]


def _people(text: str, he: str, his: str) -> list[Person]:
    return [Person(name, he, his) for name in text.split()]


_PEOPLE = [
    *_people("Tom Ben Omar Leo Jack Raj Finn Noah Peter Sam Diego Kofi Hugo Adam Ivan", "he", "his"),
    *_people("Anna Mia Lena Zoe Sara Ruth Nina Amy Emma Maria Yuki Rosa Ella Priya Hana", "she", "her"),
]


def _things(text: str) -> list[Thing]:
    """Read "box, apple, city:cities": the plural takes an s where none is given."""
    pairs = (item.strip().partition(":") for item in text.split(","))
    return [Thing(one, many or f"{one}s") for one, _, many in pairs]


_TOYS = _things("marble, sticker, shell, stamp, button, bead, toy car, card, coin, balloon, crayon, postcard, ribbon")
_FOOD = _things(
    "apple, cookie, pear, plum, muffin, peach:peaches, cherry:cherries, grape, nut, pancake, strawberry:strawberries"
)
_BAKED = _things("cookie, muffin, roll, pancake, bun, cupcake, loaf:loaves, pie")
_WARES = _things("pen, ticket, notebook, mug, kite, candle, sandwich:sandwiches, toy, book, hat")
_HOLDERS = _things("box:boxes, bag, basket, jar, shelf:shelves, drawer, tray, crate")
_PACKING = _things("box:boxes, crate, basket, tray, parcel")
_FRAGILE = _things("egg, cup, plate, glass:glasses, vase, bulb, tile, bowl")
_PLANTS = _things("tulip, rose, daisy:daisies, bean, carrot, onion, sunflower, cabbage")
_ANIMALS = _things("duck, sheep:sheep, goat, hen, cow, goose:geese, rabbit, pony:ponies")
_GROUP = _things("child:children, friend, girl, boy, player, pupil, woman:women, man:men")

_GOALS = [
    ("win the game", "points"),
    ("buy a lamp", "dollars"),
    ("fill the album", "photos"),
    ("finish the wall", "bricks"),
    ("get the badge", "stars"),
]
_HABITS = [
    ("reads", "read", "pages"),
    ("learns", "learn", "words"),
    ("runs", "run", "laps"),
    ("solves", "solve", "puzzles"),
    ("paints", "paint", "tiles"),
]
_DEEDS = [
    ("walks", "walk", "miles"),
    ("swims", "swim", "laps"),
    ("picks", "pick", "plums"),
    ("writes", "write", "letters"),
    ("sells", "sell", "tickets"),
]
_PARTS = [
    ("spider", "legs", 8),
    ("beetle", "legs", 6),
    ("tricycle", "wheels", 3),
    ("chair", "legs", 4),
    ("house", "windows", 7),
    ("flower", "petals", 5),
    ("van", "seats", 9),
]


def _count(number: int, thing: Thing) -> str:
    """Write "1 box" or "3 boxes"."""
    return f"{number} {thing.one if number == 1 else thing.many}"


def _problem(question: str, answer: int, *solutions: str) -> Problem | None:
    """Put the solutions into the form that the task asks for; `None` where the answer is too large."""
    if answer > LARGEST:
        return None
    return Problem(question, str(answer), [f"{solution} The answer is {answer}." for solution in solutions])


def _repeated(term: int, times: int) -> str:
    """Write 6 + 6 + 6."""
    return " + ".join([str(term)] * times)


def _gets_more(rng: random.Random) -> Problem | None:
    (who, other), thing = rng.sample(_PEOPLE, 2), rng.choice(_TOYS)
    have, more = rng.randint(2, 25), rng.randint(2, 20)
    gives = rng.choice(["gives", "sends", "hands"])
    return _problem(
        f"{who.name} has {_count(have, thing)}. {other.name} {gives} {who.name} {more} more. How many {thing.many} "
        f"does {who.name} have now?",
        have + more,
        f"{who.name} starts with {have} and gets {more} more: {have} + {more} = {have + more}.",
        f"The {more} new {thing.many} join the old ones, which makes {more} + {have} = {have + more} in all.",
    )


def _loses(rng: random.Random) -> Problem | None:
    who, thing = rng.choice(_PEOPLE), rng.choice(_TOYS)
    left, gone = rng.randint(1, 20), rng.randint(2, 15)
    loses = rng.choice(["loses", "gives away", "sells", "lends out"])
    return _problem(
        f"{who.name} has {_count(left + gone, thing)} and {loses} {gone} of them. How many {thing.many} are left?",
        left,
        f"Take {gone} away from {left + gone}: {left + gone} - {gone} = {left}.",
        f"{gone} + {left} = {left + gone}, so without the {gone} that are gone, {who.name} still has {left}.",
    )


def _eats_and_gives(rng: random.Random) -> Problem | None:
    (who, other), thing = rng.sample(_PEOPLE, 2), rng.choice(_FOOD)
    have, first, second = rng.randint(12, 30), rng.randint(2, 5), rng.randint(2, 6)
    rest = have - first - second
    if rest < 2:
        return None
    return _problem(
        f"{who.name} has {_count(have, thing)}. {who.he.capitalize()} eats {first} and gives {second} to {other.name}. "
        f"How many {thing.many} does {who.he} have left?",
        rest,
        f"After eating there are {have} - {first} = {have - first}. After giving, {have - first} - {second} = {rest}.",
        f"Altogether {first} + {second} = {first + second} are gone, so {have} - {first + second} = {rest} are left.",
    )


def _how_many_more(rng: random.Random) -> Problem | None:
    (who, other), thing = rng.sample(_PEOPLE, 2), rng.choice(_TOYS)
    less, difference = rng.randint(2, 20), rng.randint(2, 18)
    return _problem(
        f"{who.name} has {_count(less + difference, thing)} and {other.name} has {less}. How many more {thing.many} "
        f"does {who.name} have than {other.name}?",
        difference,
        f"{who.name} is ahead by {less + difference} - {less} = {difference} {thing.many}.",
        f"{other.name} would need {difference} more, because {less} + {difference} = {less + difference}.",
    )


def _equal_groups(rng: random.Random) -> Problem | None:
    holder, thing = rng.choice(_HOLDERS), rng.choice(_TOYS + _FOOD)
    groups, size = rng.randint(2, 5), rng.randint(3, 9)
    total = groups * size
    return _problem(
        f"There are {_count(groups, holder)} with {_count(size, thing)} in each. How many {thing.many} are there in "
        "all?",
        total,
        f"{groups} {holder.many} of {size} make {groups} x {size} = {total}.",
        f"Counting all {groups} {holder.many} gives {_repeated(size, groups)} = {total} {thing.many}.",
    )


def _shared_equally(rng: random.Random) -> Problem | None:
    group, thing = rng.choice(_GROUP), rng.choice(_FOOD)
    people, each = rng.randint(2, 8), rng.randint(2, 9)
    total = people * each
    if total > LARGEST:
        return None
    return _problem(
        f"{_count(total, thing)} are shared equally among {_count(people, group)}. How many {thing.many} "
        f"does each {group.one} get?",
        each,
        f"Divide the {total} {thing.many} by {people}: {total} / {people} = {each}.",
        f"Each {group.one} gets {each}, since {people} x {each} = {total}.",
    )


def _two_prices(rng: random.Random) -> Problem | None:
    who, (first, second) = rng.choice(_PEOPLE), rng.sample(_WARES, 2)
    one, two = rng.randint(2, 20), rng.randint(2, 20)
    return _problem(
        f"{who.name} buys a {first.one} for {one} dollars and a {second.one} for {two} dollars. How many dollars does "
        f"{who.he} spend?",
        one + two,
        f"Together they cost {one} + {two} = {one + two} dollars.",
        f"Add the {second.one} to the {first.one}: {two} + {one} = {one + two}.",
    )


def _price_of_several(rng: random.Random) -> Problem | None:
    ware = rng.choice(_WARES)
    price, number = rng.randint(3, 9), rng.randint(2, 5)
    total = price * number
    return _problem(
        f"A {ware.one} costs {price} dollars. How many dollars do {_count(number, ware)} cost?",
        total,
        f"{number} {ware.many} at {price} dollars each cost {number} x {price} = {total} dollars.",
        f"Pay {price} dollars {number} times: {_repeated(price, number)} = {total}.",
    )


def _change(rng: random.Random) -> Problem | None:
    who, ware, bill = rng.choice(_PEOPLE), rng.choice(_WARES), rng.choice([10, 20, 50])
    price = rng.randint(3, bill - 1)
    back = bill - price
    return _problem(
        f"{who.name} pays for a {ware.one} with a {bill}-dollar bill. The {ware.one} costs {price} dollars. How many "
        f"dollars does {who.name} get back?",
        back,
        f"{bill} - {price} = {back}, so {who.he} gets {back} back.",
        f"From {price} up to {bill} it takes {back} more, as {price} + {back} = {bill}.",
    )


def _older(rng: random.Random) -> Problem | None:
    who, sibling = rng.choice(_PEOPLE), rng.choice(["brother", "sister", "cousin"])
    age, years = rng.randint(5, 16), rng.randint(2, 9)
    return _problem(
        f"{who.name} is {age} years old. {who.his.capitalize()} {sibling} is {years} years older. How old is "
        f"{who.his} {sibling}?",
        age + years,
        f"Older than {who.name} means adding: {age} + {years} = {age + years}.",
        f"The {sibling} is {years} years ahead of {age}: {years} + {age} = {age + years}.",
    )


def _younger(rng: random.Random) -> Problem | None:
    (who, other), years = rng.sample(_PEOPLE, 2), rng.randint(2, 9)
    age = rng.randint(years + 2, 30)
    return _problem(
        f"{who.name} is {age} years old. {other.name} is {years} years younger than {who.name}. How old is "
        f"{other.name}?",
        age - years,
        f"Younger than {who.name} means taking away: {age} - {years} = {age - years}.",
        f"{other.name} is {age - years}, because {age - years} + {years} = {age}.",
    )


def _age_later(rng: random.Random) -> Problem | None:
    who, age, years = rng.choice(_PEOPLE), rng.randint(4, 30), rng.randint(3, 15)
    return _problem(
        f"{who.name} is {age} years old. How old will {who.he} be in {years} years?",
        age + years,
        f"In {years} years {who.name} will be {age} + {years} = {age + years}.",
        f"Count {years} years on from {age}: {years} + {age} = {age + years}.",
    )


def _twice_as_many(rng: random.Random) -> Problem | None:
    (who, other), thing = rng.sample(_PEOPLE, 2), rng.choice(_TOYS)
    have = rng.randint(3, 25)
    return _problem(
        f"{who.name} has {_count(have, thing)}. {other.name} has twice as many. How many {thing.many} does "
        f"{other.name} have?",
        2 * have,
        f"{other.name} has 2 x {have} = {2 * have}, which is twice as many.",
        f"Doubling {have} gives {have} + {have} = {2 * have} {thing.many}.",
    )


def _twice_together(rng: random.Random) -> Problem | None:
    (who, other), thing = rng.sample(_PEOPLE, 2), rng.choice(_TOYS)
    have = rng.randint(2, 16)
    return _problem(
        f"{who.name} finds {_count(have, thing)} and {other.name} finds twice as many. How many {thing.many} do they "
        "find together?",
        3 * have,
        f"{other.name} finds 2 x {have} = {2 * have}. Together that is {have} + {2 * have} = {3 * have}.",
        f"{who.name} has one share of {have} and {other.name} has 2 shares: {have} + {have} + {have} = {3 * have}.",
    )


def _half(rng: random.Random) -> Problem | None:
    (who, other), thing = rng.sample(_PEOPLE, 2), rng.choice(_TOYS + _FOOD)
    part = rng.randint(2, 25)
    return _problem(
        f"{who.name} has {_count(2 * part, thing)} and gives half of them to {other.name}. How many {thing.many} does "
        f"{who.name} keep?",
        part,
        f"Half of the {thing.many} is {2 * part} / 2 = {part}.",
        f"Two equal parts of {part} make {part} + {part} = {2 * part}, and {who.name} keeps one part.",
    )


def _bus(rng: random.Random) -> Problem | None:
    vehicle, rider = rng.choice(["bus", "train", "tram", "ferry"]), rng.choice(["passengers", "people"])
    start, off, on = rng.randint(12, 35), rng.randint(2, 9), rng.randint(2, 12)
    end = start - off + on
    return _problem(
        f"There are {start} {rider} on a {vehicle}. At the next stop {off} get off and {on} get on. How many {rider} "
        f"are on the {vehicle} now?",
        end,
        f"First {start} - {off} = {start - off} stay on. Then {start - off} + {on} = {end}.",
        f"If they get on first, {start} + {on} = {start + on}, and then {start + on} - {off} = {end}.",
    )


def _rows_and_more(rng: random.Random) -> Problem | None:
    who, (first, second) = rng.choice(_PEOPLE), rng.sample(_PLANTS, 2)
    rows, each, more = rng.randint(2, 4), rng.randint(3, 8), rng.randint(2, 9)
    total = rows * each + more
    return _problem(
        f"{who.name} plants {rows} rows of {each} {first.many} and then {_count(more, second)}. How many plants is "
        "that in all?",
        total,
        f"The rows hold {rows} x {each} = {rows * each}, and {rows * each} + {more} = {total}.",
        f"Add {rows} rows to the {more} {second.many}: {more} + {_repeated(each, rows)} = {total}.",
    )


def _some_break(rng: random.Random) -> Problem | None:
    holder, thing = rng.choice(_PACKING), rng.choice(_FRAGILE)
    groups, size, broken = rng.randint(2, 3), rng.randint(4, 9), rng.randint(2, 9)
    total = groups * size
    whole = total - broken
    if total > LARGEST or whole < 2:
        return None
    return _problem(
        f"A shop gets {_count(groups, holder)} with {_count(size, thing)} in each. {broken} of them break. How many "
        f"{thing.many} are still whole?",
        whole,
        f"There were {groups} x {size} = {total}. Now {total} - {broken} = {whole} are whole.",
        f"Of {_repeated(size, groups)} = {total}, all but {broken} are whole: {total} - {broken} = {whole}.",
    )


def _still_needed(rng: random.Random) -> Problem | None:
    who = rng.choice(_PEOPLE)
    goal, unit = rng.choice(_GOALS)
    have, missing = rng.randint(3, 25), rng.randint(2, 20)
    return _problem(
        f"{who.name} needs {have + missing} {unit} to {goal} and has {have}. How many more {unit} does {who.he} need?",
        missing,
        f"What {who.name} is missing is {have + missing} - {have} = {missing} {unit}.",
        f"{have} + {missing} = {have + missing}, so {missing} more {unit} are needed.",
    )


def _per_day(rng: random.Random) -> Problem | None:
    who = rng.choice(_PEOPLE)
    does, do, unit = rng.choice(_HABITS)
    each, days = rng.randint(3, 9), rng.randint(2, 5)
    total = each * days
    return _problem(
        f"{who.name} {does} {each} {unit} a day. How many {unit} does {who.he} {do} in {days} days?",
        total,
        f"{days} days with {each} {unit} each make {days} x {each} = {total}.",
        f"Add {each} for each of the {days} days: {_repeated(each, days)} = {total}.",
    )


def _pages_left(rng: random.Random) -> Problem | None:
    who, pages, days = rng.choice(_PEOPLE), rng.randint(5, 12), rng.randint(2, 3)
    left = rng.randint(2, 25)
    read = pages * days
    return _problem(
        f"A book has {read + left} pages. {who.name} reads {pages} pages a day for {days} days. How many pages are "
        "left?",
        left,
        f"{who.name} reads {days} x {pages} = {read} pages, so {read + left} - {read} = {left} are left.",
        f"{_repeated(pages, days)} = {read} pages are done, and {read + left} - {read} = {left} remain.",
    )


def _three_days(rng: random.Random) -> Problem | None:
    who, (does, do, unit) = rng.choice(_PEOPLE), rng.choice(_DEEDS)
    one, two, three = (rng.randint(2, 15) for _ in range(3))
    return _problem(
        f"{who.name} {does} {one} {unit} on Monday, {two} on Tuesday and {three} on Friday. How many {unit} does "
        f"{who.he} {do} in all?",
        one + two + three,
        f"{who.name} {does} {one} + {two} + {three} = {one + two + three} {unit} on the three days.",
        f"Tuesday and Friday make {two} + {three} = {two + three}. With Monday it is {two + three} + {one} = "
        f"{one + two + three}.",
    )


def _wages(rng: random.Random) -> Problem | None:
    who, ware = rng.choice(_PEOPLE), rng.choice(_WARES)
    rate, hours = rng.randint(4, 9), rng.randint(2, 3)
    earned = rate * hours
    spent = rng.randint(2, min(earned - 1, 15))
    left = earned - spent
    return _problem(
        f"{who.name} earns {rate} dollars an hour and works {hours} hours. Then {who.he} buys a {ware.one} for {spent} "
        f"dollars. How many dollars are left?",
        left,
        f"The pay is {hours} x {rate} = {earned} dollars, and {earned} - {spent} = {left}.",
        f"{_repeated(rate, hours)} = {earned} is earned and {spent} is spent: {earned} - {spent} = {left}.",
    )


def _two_kinds_shared(rng: random.Random) -> Problem | None:
    holder, (first, second) = rng.choice(_PACKING), rng.sample(_FOOD, 2)
    groups, one, two = rng.randint(2, 5), rng.randint(1, 6), rng.randint(1, 6)
    firsts, seconds, each = groups * one, groups * two, one + two
    if one == two:
        return None
    return _problem(
        f"{firsts} {first.many} and {seconds} {second.many} are put into {groups} {holder.many}, the same number in "
        f"each. How many pieces go into one {holder.one}?",
        each,
        f"There are {firsts} + {seconds} = {firsts + seconds} pieces, and {firsts + seconds} / {groups} = {each}.",
        f"One {holder.one} gets {firsts} / {groups} = {one}, {seconds} / {groups} = {two}: {one} + {two} = {each}.",
    )


def _parts(rng: random.Random) -> Problem | None:
    thing, part, number = rng.choice(_PARTS)
    many = rng.randint(2, 5)
    total = number * many
    return _problem(
        f"Every {thing} has {number} {part}. How many {part} do {many} {thing}s have?",
        total,
        f"{many} {thing}s with {number} {part} each have {many} x {number} = {total}.",
        f"One {thing} after the other gives {_repeated(number, many)} = {total} {part}.",
    )


def _teams(rng: random.Random) -> Problem | None:
    group, teams, size = rng.choice(_GROUP), rng.randint(2, 9), rng.randint(2, 6)
    total = teams * size
    if total > LARGEST or teams == size:
        return None
    return _problem(
        f"{_count(total, group)} form teams of {size}. How many teams are there?",
        teams,
        f"Split {total} into parts of {size}: {total} / {size} = {teams} teams.",
        f"{teams} teams of {size} use up everyone, as {teams} x {size} = {total}.",
    )


def _at_first(rng: random.Random) -> Problem | None:
    who, thing = rng.choice(_PEOPLE), rng.choice(_TOYS + _FOOD)
    gone, left = rng.randint(2, 18), rng.randint(2, 25)
    return _problem(
        f"After giving away {_count(gone, thing)}, {who.name} has {left} left. How many {thing.many} did {who.he} have "
        "at first?",
        gone + left,
        f"Put the {thing.many} back together: {left} + {gone} = {gone + left}.",
        f"At first there were {gone + left}, because {gone + left} - {gone} = {left}.",
    )


def _degrees(rng: random.Random) -> Problem | None:
    town = rng.choice(["Oslo", "Lima", "Cairo", "Tokyo", "Dublin", "the village", "the valley"])
    morning, up, down = rng.randint(4, 18), rng.randint(3, 12), rng.randint(2, 9)
    noon = morning + up
    return _problem(
        f"In the morning it is {morning} degrees in {town}. By noon it is {up} degrees warmer, and by evening it has "
        f"cooled by {down} degrees. How many degrees is it in the evening?",
        noon - down,
        f"At noon it is {morning} + {up} = {noon}. In the evening it is {noon} - {down} = {noon - down}.",
        f"Up {up} and down {down} from {morning} is {morning} + {up} - {down} = {noon - down}.",
    )


def _two_sales(rng: random.Random) -> Problem | None:
    thing = rng.choice(_BAKED)
    first, second, left = rng.randint(4, 18), rng.randint(4, 15), rng.randint(2, 15)
    start = first + second + left
    return _problem(
        f"A baker makes {_count(start, thing)}. {first} are sold in the morning and {second} in the afternoon. How "
        f"many {thing.many} are left?",
        left,
        f"In all {first} + {second} = {first + second} are sold, and {start} - {first + second} = {left}.",
        f"At midday {start} - {first} = {start - first} remain; in the end {start - first} - {second} = {left}.",
    )


def _farm(rng: random.Random) -> Problem | None:
    first, second = rng.sample(_ANIMALS, 2)
    many, fewer = rng.randint(8, 24), rng.randint(2, 6)
    other = many - fewer
    return _problem(
        f"A farmer has {many} {first.many} and {fewer} fewer {second.many} than {first.many}. How many animals does "
        "the farmer have?",
        many + other,
        f"There are {many} - {fewer} = {other} {second.many}, and {many} + {other} = {many + other} animals.",
        f"Twice {many} is {2 * many}, but {fewer} are missing: {2 * many} - {fewer} = {many + other}.",
    )


TEMPLATES: tuple[Template, ...] = (
    _gets_more,
    _loses,
    _eats_and_gives,
    _how_many_more,
    _equal_groups,
    _shared_equally,
    _two_prices,
    _price_of_several,
    _change,
    _older,
    _younger,
    _age_later,
    _twice_as_many,
    _twice_together,
    _half,
    _bus,
    _rows_and_more,
    _some_break,
    _still_needed,
    _per_day,
    _pages_left,
    _three_days,
    _wages,
    _two_kinds_shared,
    _parts,
    _teams,
    _at_first,
    _degrees,
    _two_sales,
    _farm,
)


def problems(seed: int = SEED, per_template: int = PER_TEMPLATE) -> list[Problem]:
    """Draw problems, no question twice, template after template in turn.

    Args:
        seed: Of everything that is drawn.
        per_template: Problems from each template.

    Returns:
        `per_template * len(TEMPLATES)` problems.
    """
    rng = random.Random(seed)
    found: dict[str, Problem] = {}
    for _ in range(per_template):
        for template in TEMPLATES:
            problem = None
            while problem is None or problem.question in found:
                problem = template(rng)
            found[problem.question] = problem
    return list(found.values())


def text() -> str:
    """Return the bundled file's content: one JSON object a line."""
    return "".join(f"{json.dumps(asdict(problem))}\n" for problem in problems())


if __name__ == "__main__":
    write_text(PATH, text())
