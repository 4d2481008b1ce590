"""Sorting, counting letters, clock, weekdays, equations and stories.

Owns: the questions and traces of these kinds, and the names and things in them.
Must not know: splits, tokens.
Source: none; the problems are those of a school book.
"""

from random import Random

from model.tasks.problem import Problem
from model.tasks.words import WORDS

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NAMES = (
    "Anna",
    "Ben",
    "Carla",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Hugo",
    "Ida",
    "Jonas",
    "Lena",
    "Max",
    "Nora",
    "Tom",
)
THINGS = (
    "apples",
    "books",
    "cards",
    "coins",
    "cups",
    "eggs",
    "pens",
    "plates",
    "shells",
    "stamps",
    "stones",
    "tickets",
)


def sorting(rng: Random, level: int) -> Problem:
    """3, 4 or 5 two-digit numbers, ascending: the smallest is taken out until none is left.

    58,12,93:
    12|58,93
    58|93
    93|
    """
    values = rng.sample(range(10, 100), level + 2)
    left, lines = list(values), [",".join(map(str, values)) + ":"]
    while left:
        smallest = min(left)
        left.remove(smallest)
        lines.append(f"{smallest}|{','.join(map(str, left))}")
    listed = ", ".join(map(str, values))
    question = rng.choice((f"Sort these numbers: {listed}", f"Put in ascending order: {listed}"))
    return Problem(
        kind="sorting",
        level=level,
        key=",".join(map(str, sorted(values))),
        question=question,
        trace="\n".join(["I take out the smallest number each time.", *lines]),
        answer=", ".join(map(str, sorted(values))),
    )


def letters(rng: Random, level: int) -> Problem:
    """How often a letter occurs in 1 to 3 words: each letter with the count so far."""
    words = rng.sample(WORDS, level)
    text = " ".join(words)
    letter = rng.choice(text.replace(" ", "")) if rng.random() < 0.8 else rng.choice("abcdefghijklmnopqrstuvwxyz")
    lines, count = [], 0
    for word in words:
        marks = []
        for character in word:
            count += character == letter
            marks.append(f"{character}{count}")
        lines.append(f"{word}: {' '.join(marks)}")
    question = rng.choice(
        (f"How many times does the letter {letter} occur in: {text}?", f"Count the letter {letter} in: {text}")
    )
    return Problem(
        kind="letters",
        level=level,
        key=f"{letter} {' '.join(sorted(words))}",
        question=question,
        trace="\n".join([f"I count the letter {letter}.", *lines]),
        answer=str(count),
    )


def clock(rng: Random, level: int) -> Problem:
    """A time of day some minutes, or hours and minutes, later; level 3 goes past midnight more often.

    14:35+2:50:
    35+50=85
    85-60=25
    14+2+1=17
    """
    hour, minute = rng.randrange(18 if level == 3 else 0, 24), rng.randrange(60)
    hours, minutes = (0 if level == 1 else rng.randint(1, 12)), rng.randint(1, 59)
    lines = [f"{hour:02d}:{minute:02d}+{hours}:{minutes:02d}:", f"{minute:02d}+{minutes:02d}={minute + minutes}"]
    carry = int(minute + minutes >= 60)
    if carry:
        lines.append(f"{minute + minutes}-60={minute + minutes - 60:02d}")
    total = hour + hours + carry
    lines.append(f"{hour:02d}+{hours}+{carry}={total:02d}")
    if total >= 24:
        lines.append(f"{total}-24={total - 24:02d}")
    span = f"{minutes} minutes" if not hours else f"{hours} hours and {minutes} minutes"
    question = rng.choice(
        (
            f"It is {hour:02d}:{minute:02d}. What time is it {span} later?",
            f"A train leaves at {hour:02d}:{minute:02d} and travels {span}. When does it arrive?",
        )
    )
    return Problem(
        kind="clock",
        level=level,
        key=f"{hour}:{minute}+{hours}:{minutes}",
        question=question,
        trace="\n".join(["I add the minutes, then the hours.", *lines]),
        answer=f"{total % 24:02d}:{(minute + minutes) % 60:02d}",
    )


def weekday(rng: Random, level: int) -> Problem:
    """The day of the week up to 9, 30 or 99 days later or (from level 2) earlier."""
    start, days = rng.randrange(7), rng.randint(1, (9, 30, 99)[level - 1])
    backwards = level > 1 and rng.random() < 0.4
    weeks, rest = divmod(days, 7)
    step = -1 if backwards else 1
    walk = [DAYS[(start + step * i) % 7] for i in range(rest + 1)]
    if backwards:
        question = f"Today is {DAYS[start]}. What day was it {days} days ago?"
    else:
        question = f"Today is {DAYS[start]}. What day is it in {days} days?"
    return Problem(
        kind="weekday",
        level=level,
        key=f"{start}{step:+d}*{days}",
        question=question,
        trace=f"Whole weeks do not count.\n{days}=7*{weeks}+{rest}\n{' '.join(walk)}",
        answer=walk[-1],
    )


def equation(rng: Random, level: int) -> Problem:
    """a x + b = c for a whole x of up to 9, 12 or 20; from level 2 also a x - b = c."""
    a, x = rng.randint(2, 9), rng.randint(1, (9, 12, 20)[level - 1])
    b = rng.randint(1, 9 if level == 1 else 20)
    minus = level > 1 and a * x > b and rng.random() < 0.5
    c = a * x - b if minus else a * x + b
    sign, inverse = ("-", "+") if minus else ("+", "-")
    question = rng.choice((f"Solve {a}x {sign} {b} = {c} for x.", f"Find x: {a}x {sign} {b} = {c}"))
    return Problem(
        kind="equation",
        level=level,
        key=f"{a}x{sign}{b}={c}",
        question=question,
        trace=f"I bring the number to the right side.\n{a}x={c}{inverse}{b}={a * x}\nx={a * x}/{a}={x}",
        answer=f"x = {x}",
    )


def story(rng: Random, level: int) -> Problem:
    """Somebody gets and gives things away, 1 to 3 times."""
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    amount = rng.randint(5, 60)
    sentences, lines, key = [f"{name} has {amount} {things}."], [], str(amount)
    for _ in range(level):
        change = rng.randint(1, 9 if level == 1 else 20)
        if rng.random() < 0.5 and change <= amount:
            sentences.append(rng.choice((f"{name} gives away {change}.", f"{name} loses {change}.")))
            sign = "-"
        else:
            sentences.append(rng.choice((f"{name} buys {change}.", f"{name} finds {change}.")))
            sign = "+"
        result = amount + change if sign == "+" else amount - change
        lines.append(f"{amount}{sign}{change}={result}")
        key += f"{sign}{change}"
        amount = result
    sentences.append(f"How many {things} does {name} have now?")
    return Problem(
        kind="story",
        level=level,
        key=key,
        question=" ".join(sentences),
        trace="\n".join([f"I follow the {things}.", *lines]),
        answer=str(amount),
    )
