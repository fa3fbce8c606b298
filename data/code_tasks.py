"""Small Python tasks: a description, the function, and one call with its result, which is computed by running the function."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

from grammar import say


class Task(NamedTuple):
    """A function to write.

    Attributes:
        verb: Description in the third person, e.g. `returns the sum of the even numbers`.
        name: Name of the function.
        args: Parameter names.
        code: Source of the function.
        call: Arguments of an example call.
    """

    verb: str
    name: str
    args: tuple[str, ...]
    code: str
    call: tuple[Any, ...]


Family = Callable[[random.Random], Task]

_LISTS = ("numbers", "values", "items", "data", "xs")
_TEXTS = ("text", "word", "line", "s")
_WORDS = (
    "apple banana cherry stone river cloud level noon tree glass paper robot summer garden window music planet radar orange "
    "copper winter forest button pepper"
).split()


def _ints(rng: random.Random) -> list[int]:
    return [rng.randint(-9, 20) for _ in range(rng.randint(4, 6))]


def _predicate(rng: random.Random) -> tuple[str, str, str]:
    """A relative clause about numbers, a part of a name, and its test with `{x}` for the number."""
    k = rng.randint(2, 10)
    return rng.choice(
        [
            ("that are even", "even", "{x} % 2 == 0"),
            ("that are odd", "odd", "{x} % 2 == 1"),
            ("that are positive", "positive", "{x} > 0"),
            ("that are negative", "negative", "{x} < 0"),
            (f"greater than {k}", f"above_{k}", f"{{x}} > {k}"),
            (f"smaller than {k}", f"below_{k}", f"{{x}} < {k}"),
            (f"that are divisible by {k}", f"multiples_of_{k}", f"{{x}} % {k} == 0"),
        ]
    )


def _transform(rng: random.Random) -> tuple[str, str, str]:
    """A transformation of a number: plural noun, part of a name, and expression with `{x}`."""
    k = rng.randint(2, 9)
    return rng.choice(
        [
            ("squares", "squares", "{x} * {x}"),
            ("cubes", "cubes", "{x} ** 3"),
            ("doubles", "doubles", "2 * {x}"),
            ("absolute values", "absolutes", "abs({x})"),
            (f"products with {k}", f"times_{k}", f"{k} * {{x}}"),
            (f"sums with {k}", f"plus_{k}", f"{{x}} + {k}"),
        ]
    )


def _fold(rng: random.Random) -> Task:
    """Sum, count or sum of squares of the numbers that pass a test."""
    a, x = rng.choice(_LISTS), rng.choice(["x", "n", "value"])
    clause, part, test = _predicate(rng)
    test = test.format(x=x)
    kind = rng.choice(["sum", "count", "squares"])
    start, change, verb = {
        "sum": ("0", f"total += {x}", say(rng, "[returns the sum of|adds up] the {a} {c}", a="numbers", c=clause)),
        "count": ("0", "total += 1", say(rng, "[counts the numbers|returns how many numbers there are] {c}", c=clause)),
        "squares": ("0", f"total += {x} * {x}", f"returns the sum of the squares of the numbers {clause}"),
    }[kind]
    name = {"sum": f"sum_{part}", "count": f"count_{part}", "squares": f"sum_squares_{part}"}[kind]
    if rng.random() < 0.5:
        body = f"    total = {start}\n    for {x} in {a}:\n        if {test}:\n            {change}\n    return total"
    else:
        body = f"    return sum({ {'sum': x, 'count': '1', 'squares': f'{x} * {x}'}[kind] } for {x} in {a} if {test})"
    return Task(f"{verb} in a list", name, (a,), f"def {name}({a}):\n{body}", (_ints(rng),))


def _select(rng: random.Random) -> Task:
    """A new list of transformed numbers that pass a test."""
    a, x = rng.choice(_LISTS), rng.choice(["x", "n", "value"])
    clause, part, test = _predicate(rng)
    test = test.format(x=x)
    if rng.random() < 0.4:
        verb, name, value = (
            say(rng, "[keeps only the numbers {c}|returns a list of the numbers {c}|filters the numbers {c}]", c=clause),
            f"keep_{part}",
            x,
        )
    else:
        noun, short, value = _transform(rng)
        verb, name, value = (
            say(rng, "[returns|builds a list of] the {t} of the numbers {c}", t=noun, c=clause),
            f"{short}_of_{part}",
            value.format(x=x),
        )
    if rng.random() < 0.5:
        body = (
            f"    result = []\n    for {x} in {a}:\n        if {test}:\n            result.append({value})\n    return result"
        )
    else:
        body = f"    return [{value} for {x} in {a} if {test}]"
    return Task(verb, name, (a,), f"def {name}({a}):\n{body}", (_ints(rng),))


def _search(rng: random.Random) -> Task:
    """Whether any or all numbers pass a test, the first that does, or its index."""
    a, x = rng.choice(_LISTS), rng.choice(["x", "n", "value"])
    clause, part, test = _predicate(rng)
    test = test.format(x=x)
    kind = rng.choice(["any", "all", "first", "index"])
    adjective = clause.removeprefix("that are ")
    verb, name, body = {
        "any": (f"tells whether any number is {adjective}", f"has_{part}", f"    return any({test} for {x} in {a})"),
        "all": (
            f"checks that all numbers are {adjective}",
            f"all_{part}",
            f"    for {x} in {a}:\n        if not {test}:\n            return False\n    return True",
        ),
        "first": (
            f"returns the first of the numbers {clause}, or None",
            f"first_{part}",
            f"    for {x} in {a}:\n        if {test}:\n            return {x}\n    return None",
        ),
        "index": (
            f"returns the index of the first number {clause}, or -1",
            f"index_{part}",
            f"    for i, {x} in enumerate({a}):\n        if {test}:\n            return i\n    return -1",
        ),
    }[kind]
    body = body.replace("not " + test, f"not ({test})")
    return Task(verb, name, (a,), f"def {name}({a}):\n{body}", (_ints(rng),))


def _strings(rng: random.Random) -> Task:
    """Letters of a text: count, remove, replace, reverse, compare."""
    a, word = rng.choice(_TEXTS), rng.choice(_WORDS)
    letter, other = rng.choice(word), rng.choice("xyz*-")
    n = rng.randint(2, 4)
    kinds = [
        (
            f"counts how often the letter {letter} occurs in a string",
            f"count_{letter}",
            f"    total = 0\n    for c in {a}:\n        if c == '{letter}':\n            total += 1\n    return total",
        ),
        (f"removes every {letter} from a string", f"remove_{letter}", f"    return ''.join(c for c in {a} if c != '{letter}')"),
        (
            f"replaces each {letter} in a string by {other}",
            f"replace_{letter}",
            f"    return {a}.replace('{letter}', '{other}')",
        ),
        (
            "reverses a string",
            "reverse_string",
            f"    result = ''\n    for c in {a}:\n        result = c + result\n    return result",
        ),
        ("reverses a string", "backwards", f"    return {a}[::-1]"),
        ("checks whether a string is a palindrome", "is_palindrome", f"    return {a} == {a}[::-1]"),
        ("counts the vowels in a string", "count_vowels", f"    return sum(1 for c in {a} if c in 'aeiou')"),
        (
            "removes the vowels from a string",
            "drop_vowels",
            f"    result = ''\n    for c in {a}:\n        if c not in 'aeiou':\n            result += c\n    return result",
        ),
        (f"repeats each letter of a string {n} times", f"repeat_letters_{n}", f"    return ''.join(c * {n} for c in {a})"),
        (f"returns every letter number {n} of a string, starting with the first", f"every_{n}", f"    return {a}[::{n}]"),
        (f"returns the first {n} letters of a string in upper case", f"first_{n}_upper", f"    return {a}[:{n}].upper()"),
        (f"returns the last {n} letters of a string", f"last_{n}", f"    return {a}[-{n}:]"),
        (
            "counts how often each letter occurs in a string, as a dictionary",
            "letter_counts",
            f"    counts = {{}}\n    for c in {a}:\n        counts[c] = counts.get(c, 0) + 1\n    return counts",
        ),
        (
            "removes repeated letters from a string, keeping the first of each",
            "unique_letters",
            f"    result = ''\n    for c in {a}:\n        if c not in result:\n            result += c\n    return result",
        ),
    ]
    verb, name, body = rng.choice(kinds)
    return Task(verb, name, (a,), f"def {name}({a}):\n{body}", (word,))


def _words(rng: random.Random) -> Task:
    """Lists of words: by length, by first letter, joined, counted."""
    a, n = rng.choice(["words", "names", "tokens"]), rng.randint(4, 6)
    words = [rng.choice(_WORDS) for _ in range(rng.randint(3, 5))]
    letter, sep = rng.choice(words)[0], rng.choice(["-", "+", "/", ", "])
    w = rng.choice(["w", "word"])
    kinds = [
        (
            f"returns the words longer than {n} letters",
            f"longer_than_{n}",
            f"    return [{w} for {w} in {a} if len({w}) > {n}]",
        ),
        (
            f"counts the words that start with {letter}",
            f"count_starting_{letter}",
            f"    total = 0\n    for {w} in {a}:\n        if {w}[0] == '{letter}':\n            total += 1\n    return total",
        ),
        (
            "returns the longest word of a list",
            "longest_word",
            f"    best = {a}[0]\n    for {w} in {a}:\n        if len({w}) > len(best):\n            best = {w}\n    return best",
        ),
        ("returns the shortest word of a list", "shortest_word", f"    return min({a}, key=len)"),
        ("returns the lengths of the words", "word_lengths", f"    return [len({w}) for {w} in {a}]"),
        (f"joins the words of a list with '{sep}'", "join_words", f"    return '{sep}'.join({a})"),
        ("maps each word to its length in a dictionary", "length_map", f"    return {{{w}: len({w}) for {w} in {a}}}"),
        ("sorts the words by length", "sort_by_length", f"    return sorted({a}, key=len)"),
        (
            "groups the words by their first letter",
            "group_by_first",
            f"    groups = {{}}\n    for {w} in {a}:\n        groups.setdefault({w}[0], []).append({w})\n    return groups",
        ),
        (
            "counts how often each word occurs",
            "word_counts",
            f"    counts = {{}}\n    for {w} in {a}:\n        if {w} in counts:\n            counts[{w}] += 1\n        else:\n            counts[{w}] = 1\n    return counts",
        ),
        (
            "returns the total number of letters in the words",
            "total_letters",
            f"    total = 0\n    for {w} in {a}:\n        total += len({w})\n    return total",
        ),
    ]
    verb, name, body = rng.choice(kinds)
    return Task(verb, name, (a,), f"def {name}({a}):\n{body}", (words,))


def _numbers(rng: random.Random) -> Task:
    """Functions of one or two whole numbers: loops and recursion."""
    n, k = rng.choice(["n", "number", "limit"]), rng.randint(2, 9)
    clause, part, test = _predicate(rng)
    while part in ("positive", "negative"):  # true for all or none of the numbers from 1 on
        clause, part, test = _predicate(rng)
    test = test.format(x="i")
    kinds: list[tuple[str, str, str, int]] = [
        (
            "returns the factorial of a number",
            "factorial",
            f"    if {n} <= 1:\n        return 1\n    return {n} * factorial({n} - 1)",
            6,
        ),
        (
            "returns the factorial of a number without recursion",
            "factorial_loop",
            f"    result = 1\n    for i in range(2, {n} + 1):\n        result *= i\n    return result",
            6,
        ),
        (
            "returns the Fibonacci number of a given index",
            "fibonacci",
            f"    if {n} < 2:\n        return {n}\n    return fibonacci({n} - 1) + fibonacci({n} - 2)",
            12,
        ),
        (
            "returns the Fibonacci number of a given index with a loop",
            "fibonacci_loop",
            f"    a, b = 0, 1\n    for i in range({n}):\n        a, b = b, a + b\n    return a",
            15,
        ),
        (
            "returns the sum of the digits of a number",
            "digit_sum",
            f"    total = 0\n    while {n} > 0:\n        total += {n} % 10\n        {n} //= 10\n    return total",
            9999,
        ),
        (
            "returns the sum of the digits of a number by recursion",
            "digit_sum_recursive",
            f"    if {n} < 10:\n        return {n}\n    return {n} % 10 + digit_sum_recursive({n} // 10)",
            9999,
        ),
        ("counts the digits of a number", "count_digits", f"    return len(str({n}))", 99999),
        (
            "checks whether a number is prime",
            "is_prime",
            f"    if {n} < 2:\n        return False\n    for i in range(2, {n}):\n        if {n} % i == 0:\n            return False\n    return True",
            60,
        ),
        ("lists the divisors of a number", "divisors", f"    return [i for i in range(1, {n} + 1) if {n} % i == 0]", 40),
        (
            f"raises {k} to a given power by recursion",
            f"power_of_{k}",
            f"    if {n} == 0:\n        return 1\n    return {k} * power_of_{k}({n} - 1)",
            6,
        ),
        (
            f"sums the numbers from 1 to a limit {clause}",
            f"sum_to_{part}",
            f"    total = 0\n    for i in range(1, {n} + 1):\n        if {test}:\n            total += i\n    return total",
            15,
        ),
        (
            f"lists the numbers from 1 to a limit {clause}",
            f"list_to_{part}",
            f"    return [i for i in range(1, {n} + 1) if {test}]",
            15,
        ),
        (
            f"counts down from a number to 0 in steps of {k} and returns the list",
            f"countdown_{k}",
            f"    result = []\n    while {n} >= 0:\n        result.append({n})\n        {n} -= {k}\n    return result",
            20,
        ),
        (
            f"returns the first {k} multiples of a number",
            f"first_{k}_multiples",
            f"    return [{n} * i for i in range(1, {k} + 1)]",
            12,
        ),
        (
            f"returns 'yes' when a number is divisible by {k}, otherwise 'no'",
            f"divisible_by_{k}",
            f"    if {n} % {k} == 0:\n        return 'yes'\n    else:\n        return 'no'",
            50,
        ),
        (
            f"returns how often a number can be divided by {k} before it drops below 1",
            f"divisions_by_{k}",
            f"    steps = 0\n    while {n} >= 1:\n        {n} = {n} / {k}\n        steps += 1\n    return steps",
            90,
        ),
        (
            "adds all numbers from 1 to a limit by recursion",
            "sum_to",
            f"    if {n} == 0:\n        return 0\n    return {n} + sum_to({n} - 1)",
            20,
        ),
    ]
    verb, name, body, high = rng.choice(kinds)
    return Task(verb, name, (n,), f"def {name}({n}):\n{body}", (rng.randint(2, high),))


def _two(rng: random.Random) -> Task:
    """Functions of a list and a number, or of two lists."""
    a, b, k = rng.choice(_LISTS), rng.choice(["k", "n", "limit"]), rng.randint(1, 3)
    kinds: list[tuple[str, str, tuple[str, ...], str, tuple[Any, ...]]] = [
        (
            "returns the numbers of a list greater than a limit",
            "above",
            (a, b),
            f"    return [x for x in {a} if x > {b}]",
            (_ints(rng), rng.randint(0, 9)),
        ),
        (
            "adds a number to each element of a list",
            "add_to_each",
            (a, b),
            f"    return [x + {b} for x in {a}]",
            (_ints(rng), k),
        ),
        (
            "multiplies each element of a list by a number",
            "scale",
            (a, b),
            f"    result = []\n    for x in {a}:\n        result.append(x * {b})\n    return result",
            (_ints(rng), k + 1),
        ),
        (
            "rotates a list to the left by a number of places",
            "rotate_left",
            (a, b),
            f"    return {a}[{b}:] + {a}[:{b}]",
            (_ints(rng), k),
        ),
        (
            "returns the largest elements of a list, as many as asked",
            "largest",
            (a, b),
            f"    return sorted({a}, reverse=True)[:{b}]",
            (_ints(rng), k),
        ),
        (
            "counts how often a number occurs in a list",
            "occurrences",
            (a, b),
            f"    total = 0\n    for x in {a}:\n        if x == {b}:\n            total += 1\n    return total",
            ([rng.randint(1, 4) for _ in range(6)], k),
        ),
        (
            "splits a list into pieces of a given size",
            "chunks",
            (a, b),
            f"    return [{a}[i:i + {b}] for i in range(0, len({a}), {b})]",
            (_ints(rng), k + 1),
        ),
        (
            "returns the elements that two lists have in common",
            "common",
            ("first", "second"),
            "    return [x for x in first if x in second]",
            (_ints(rng), _ints(rng)),
        ),
        (
            "adds two lists element by element",
            "add_lists",
            ("first", "second"),
            "    return [a + b for a, b in zip(first, second)]",
            (_ints(rng)[:4], _ints(rng)[:4]),
        ),
        (
            "returns the sum of the products of two lists",
            "dot",
            ("first", "second"),
            "    total = 0\n    for a, b in zip(first, second):\n        total += a * b\n    return total",
            (_ints(rng)[:4], _ints(rng)[:4]),
        ),
        (
            "returns the greatest common divisor of two numbers",
            "gcd",
            ("a", "b"),
            "    while b:\n        a, b = b, a % b\n    return a",
            (rng.randint(4, 90), rng.randint(4, 90)),
        ),
        (
            "returns the larger of two numbers",
            "larger",
            ("a", "b"),
            "    if a > b:\n        return a\n    return b",
            (rng.randint(1, 90), rng.randint(1, 90)),
        ),
        (
            "raises a number to a power by recursion",
            "power",
            ("a", "n"),
            "    if n == 0:\n        return 1\n    return a * power(a, n - 1)",
            (rng.randint(2, 6), rng.randint(2, 5)),
        ),
    ]
    verb, name, args, body, call = rng.choice(kinds)
    return Task(verb, name, args, f"def {name}({', '.join(args)}):\n{body}", call)


def _whole(rng: random.Random) -> Task:
    """Functions of a list: extremes, order, neighbours, recursion."""
    a = rng.choice(_LISTS)
    kinds = [
        (
            "returns the largest number of a list without using max",
            "find_max",
            f"    best = {a}[0]\n    for x in {a}:\n        if x > best:\n            best = x\n    return best",
        ),
        (
            "returns the smallest number of a list without using min",
            "find_min",
            f"    best = {a}[0]\n    for x in {a}:\n        if x < best:\n            best = x\n    return best",
        ),
        ("returns the difference between the largest and the smallest number", "spread", f"    return max({a}) - min({a})"),
        ("sums a list by recursion", "sum_list", f"    if not {a}:\n        return 0\n    return {a}[0] + sum_list({a}[1:])"),
        (
            "returns the length of a list by recursion",
            "list_length",
            f"    if not {a}:\n        return 0\n    return 1 + list_length({a}[1:])",
        ),
        (
            "reverses a list by recursion",
            "reverse_list",
            f"    if not {a}:\n        return []\n    return reverse_list({a}[1:]) + [{a}[0]]",
        ),
        (
            "returns the running totals of a list",
            "running_totals",
            f"    total = 0\n    result = []\n    for x in {a}:\n        total += x\n        result.append(total)\n    return result",
        ),
        (
            "returns the differences between neighbours in a list",
            "differences",
            f"    return [b - a for a, b in zip({a}, {a}[1:])]",
        ),
        (
            "checks whether a list is sorted",
            "is_sorted",
            f"    for i in range(len({a}) - 1):\n        if {a}[i] > {a}[i + 1]:\n            return False\n    return True",
        ),
        (
            "removes repeated numbers from a list, keeping the order",
            "unique",
            f"    result = []\n    for x in {a}:\n        if x not in result:\n            result.append(x)\n    return result",
        ),
        ("returns the second largest number of a list", "second_largest", f"    return sorted(set({a}))[-2]"),
        ("sorts a list from large to small", "sort_down", f"    return sorted({a}, reverse=True)"),
        ("returns every second element of a list", "every_second", f"    return {a}[::2]"),
        ("swaps the first and the last element of a list", "swap_ends", f"    return [{a}[-1]] + {a}[1:-1] + [{a}[0]]"),
        ("returns the mean of a list", "mean", f"    return sum({a}) / len({a})"),
    ]
    verb, name, body = rng.choice(kinds)
    values = _ints(rng) if len(set(call := _ints(rng))) < 2 else call
    return Task(verb, name, (a,), f"def {name}({a}):\n{body}", (values,))


FAMILIES: tuple[Family, ...] = (_fold, _fold, _select, _select, _search, _strings, _words, _numbers, _numbers, _two, _whole)


def result(code: str, name: str, call: tuple[Any, ...]) -> Any:
    """The result of `name(*call)` after running `code`."""
    scope: dict[str, Any] = {}
    exec(code, scope)
    return scope[name](*call)


def task(rng: random.Random) -> tuple[str, str]:
    """A request for a function, and the answer with its code; an example in either has the result that the code returns."""
    t = rng.choice(FAMILIES)(rng)
    signature = f"{t.name}({', '.join(t.args)})"
    call, value = f"{t.name}({', '.join(map(repr, t.call))})", repr(result(t.code, t.name, t.call))
    v = {"sig": signature, "verb": t.verb, "name": t.name, "args": " and ".join(t.args)}
    user = say(
        rng,
        "[Write a Python function {sig} that {verb}.|Define {sig} in Python. It {verb}.|I need a function that {verb}. Call it {name}, with [argument|input] {args}.|"
        "Please write {sig}, a function that {verb}.|Give me Python code for {sig}: it {verb}.|Which function {verb}? Write it as {sig}.|Implement {sig}, which {verb}.]",
        **v,
    )
    answer = f"```python\n{t.code}\n```"
    if rng.random() < 0.55:
        user += (
            rng.choice([" For example, ", " Example: ", " So "]) + f"{call} {rng.choice(['returns', 'gives', 'is'])} {value}."
        )
    elif rng.random() < 0.5:
        answer += f"\n{rng.choice(['For example, ', 'Example: ', 'So '])}{call} {rng.choice(['returns', 'gives'])} {value}."
    if rng.random() < 0.4:
        answer = say(rng, "[Here is the function.|This function {verb}.|The function {name} {verb}.]", **v) + "\n" + answer
    return user, answer
