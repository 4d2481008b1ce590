"""Addition, subtraction, multiplication and division, worked digit by digit as on paper.

Owns: the questions and the traces of the four operations, and of comparing two numbers.
Must not know: other kinds, splits, tokens.
Source: school arithmetic. Lowest digit first with the carry written out, so that every written digit follows from a
few earlier ones.
"""

from random import Random

from model.tasks.problem import Problem


def number(rng: Random, digits: int) -> int:
    """A number of exactly `digits` digits; 0 is one of one digit."""
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def add_columns(a: int, b: int) -> tuple[str, int]:
    """The column addition of a and b as text, and the sum.

    347+285:
    7+5+0=12     digit + digit + carry = carry, digit
    4+8+1=13
    3+2+1=06
    =632
    """
    width = max(len(str(a)), len(str(b)))
    carry, lines = 0, [f"{a}+{b}:"]
    for x, y in zip(_digits(a, width), _digits(b, width), strict=True):
        lines.append(f"{x}+{y}+{carry}={x + y + carry:02d}")
        carry = (x + y + carry) // 10
    return "\n".join([*lines, f"={a + b}"]), a + b


def multiply_digit(a: int, digit: int) -> tuple[str, int]:
    """The multiplication of a by one digit as text, and the product.

    47*6:
    7*6+0=42     digit * digit + carry = carry, digit
    4*6+4=28
    =282
    """
    carry, lines = 0, [f"{a}*{digit}:"]
    for x in _digits(a, len(str(a))):
        lines.append(f"{x}*{digit}+{carry}={x * digit + carry:02d}")
        carry = (x * digit + carry) // 10
    return "\n".join([*lines, f"={a * digit}"]), a * digit


def addition(rng: Random, level: int) -> Problem:
    """Two numbers of up to 2, 3 or 4 digits."""
    a, b = number(rng, rng.randint(level, level + 1)), number(rng, rng.randint(level, level + 1))
    text, total = add_columns(a, b)
    question = rng.choice(
        (f"What is {a} + {b}?", f"Add {a} and {b}.", f"Compute {a} + {b}.", f"What is the sum of {a} and {b}?")
    )
    return Problem(
        kind="addition",
        level=level,
        key=f"{min(a, b)}+{max(a, b)}",
        question=question,
        trace=f"I add the digits from the right.\n{text}",
        answer=str(total),
    )


def subtraction(rng: Random, level: int) -> Problem:
    """Numbers of up to 2, 3 or 4 digits; the result is not negative.

    347-285:
    7-5-0=2,0     digit - digit - borrow = digit, borrow
    4-8-0=6,1
    3-2-1=0,0
    =062
    """
    a, b = number(rng, rng.randint(level, level + 1)), number(rng, rng.randint(level, level + 1))
    a, b = max(a, b), min(a, b)
    width = len(str(a))
    borrow, lines = 0, [f"{a}-{b}:"]
    for x, y in zip(_digits(a, width), _digits(b, width), strict=True):
        rest = x - y - borrow
        lines.append(f"{x}-{y}-{borrow}={rest % 10},{int(rest < 0)}")
        borrow = int(rest < 0)
    question = rng.choice(
        (f"What is {a} - {b}?", f"Subtract {b} from {a}.", f"Compute {a} - {b}.", f"What is {a} minus {b}?")
    )
    return Problem(
        kind="subtraction",
        level=level,
        key=f"{a}-{b}",
        question=question,
        trace="\n".join(["I subtract the digits from the right.", *lines, f"={a - b:0{width}d}"]),
        answer=str(a - b),
    )


def multiplication(rng: Random, level: int) -> Problem:
    """2 digits by 1, 3 digits by 1, 2 digits by 2."""
    a = number(rng, 3 if level == 2 else 2)
    b = number(rng, 2) if level == 3 else rng.randint(2, 9)
    if level < 3:
        text, product = multiply_digit(a, b)
    else:
        low, low_product = multiply_digit(a, b % 10)
        high, high_product = multiply_digit(a, b // 10)
        total, product = add_columns(low_product, high_product * 10)
        text = f"{low}\n{high}\n{total}"
    question = rng.choice(
        (f"What is {a} * {b}?", f"Multiply {a} by {b}.", f"Compute {a} * {b}.", f"What is {a} times {b}?")
    )
    return Problem(
        kind="multiplication",
        level=level,
        key=f"{min(a, b)}*{max(a, b)}",
        question=question,
        trace=f"I multiply digit by digit.\n{text}",
        answer=str(product),
    )


def division(rng: Random, level: int) -> Problem:
    """A number of 2, 3 or 4 digits by one digit, with the remainder.

    845/6:
    8/6=1,2      what is left so far / digit = digit, rest
    24/6=4,0
    05/6=0,5
    =140,5
    """
    a, b = number(rng, level + 1), rng.randint(2, 9)
    rest, lines = 0, [f"{a}/{b}:"]
    for x in reversed(_digits(a, len(str(a)))):
        current = 10 * rest + x
        lines.append(f"{rest}{x}/{b}={current // b},{current % b}")
        rest = current % b
    question = rng.choice((f"Divide {a} by {b} with remainder.", f"What are quotient and remainder of {a} / {b}?"))
    return Problem(
        kind="division",
        level=level,
        key=f"{a}/{b}",
        question=question,
        trace="\n".join(["I divide from the left.", *lines, f"={a // b:0{len(str(a))}d},{a % b}"]),
        answer=f"{a // b} remainder {a % b}",
    )


def comparison(rng: Random, level: int) -> Problem:
    """The larger of two numbers of up to 3, 4 or 5 digits, often with equal leading digits."""
    digits = level + 2
    a = number(rng, digits)
    b = number(rng, digits - 1) if rng.random() < 0.25 else _with_same_start(rng, a)
    if rng.random() < 0.5:
        a, b = b, a
    question = rng.choice((f"Which is larger, {a} or {b}?", f"What is the larger number of {a} and {b}?"))
    lines = [f"{a} and {b}:"]
    if len(str(a)) != len(str(b)):
        lines.append(f"{len(str(a))} digits, {len(str(b))} digits")
    else:
        for x, y in zip(str(a), str(b), strict=True):
            lines.append(f"{x}{'=' if x == y else '<' if x < y else '>'}{y}")
            if x != y:
                break
    return Problem(
        kind="comparison",
        level=level,
        key=f"{min(a, b)}?{max(a, b)}",
        question=question,
        trace="\n".join(["I compare the digits from the left.", *lines]),
        answer=str(max(a, b)),
    )


def _with_same_start(rng: Random, a: int) -> int:
    """Another number of as many digits, equal to `a` in a random number of leading digits."""
    text = str(a)
    kept = rng.randrange(len(text))
    while True:
        b = int(text[:kept] + "".join(rng.choice("0123456789") for _ in text[kept:]))
        if b != a and len(str(b)) == len(text):
            return b


def _digits(value: int, width: int) -> list[int]:
    """The digits of `value` from the lowest, with zeros up to `width` of them."""
    return [int(digit) for digit in reversed(f"{value:0{width}d}")]
