"""Word problems with worked steps. Each family draws facts, question and equations; `problem` picks a family and writes the text."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from grammar import say


class Person(NamedTuple):
    name: str
    he: str
    him: str
    his: str


class Story(NamedTuple):
    """Facts in order, the question, the lines of the solution, and the answer."""

    facts: list[str]
    question: str
    lines: list[str]
    answer: str


Family = Callable[[random.Random], Story]

_HE = "Adam Ben Carlos David Erik Finn George Hamid Ivan Jonas Kenji Leo Marco Noah Omar Peter Ravi Sam Tom Viktor".split()
_SHE = (
    "Anna Bella Clara Dina Elena Fatima Grace Hannah Irene Julia Kira Lena Maria Nora Olga Priya Rosa Sofia Tara Wendy".split()
)
_PEOPLE = [Person(n, "he", "him", "his") for n in _HE] + [Person(n, "she", "her", "her") for n in _SHE]
_THINGS = (
    "apples pears marbles stickers books pencils coins shells stamps cards buttons beads cookies plums balloons eggs "
    "candles flowers stones ribbons"
).split()
_GOODS = "pen notebook mug lamp scarf ball hat basket plate puzzle bag candle kite brush bottle".split()
_PLACES = "market school farm library museum bakery garden station harbour workshop".split()
_FRACTIONS = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth"}
_TIMES = {2: "twice", 3: "three times", 4: "four times", 5: "five times"}


def _person(rng: random.Random) -> dict[str, str]:
    p = rng.choice(_PEOPLE)
    return {"p": p.name, "he": p.he, "him": p.him, "his": p.his, "He": p.he.capitalize(), "His": p.his.capitalize()}


def _eq(a: int, op: str, b: int) -> tuple[str, int]:
    """The text `a op b = c`, and c; a division must have no remainder."""
    assert op != "/" or a % b == 0
    result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else 0}[op]
    assert result >= 0
    return f"{a} {op} {b} = {result}", result


def stock(rng: random.Random) -> Story:
    """A number of things that grows and shrinks, one to four times."""
    who, things, friend = _person(rng), rng.choice(_THINGS), rng.choice(_PEOPLE).name
    n = rng.choice([12, 18, 20, 24, 30, 36, 40, 48, 60, 72, rng.randint(10, 90)])
    v = who | {"things": things, "friend": friend, "place": rng.choice(_PLACES), "n": n}
    facts = [
        say(
            rng,
            "[{p} has {n} {things}|{p} starts with {n} {things}|There are {n} {things} in {p}'s [box|bag|room]|In the morning {p} counts {n} {things}].",
            **v,
        )
    ]
    lines: list[str] = []
    for step in range(rng.randint(1, 4)):
        k, m = rng.randint(2, 20), rng.randint(2, 6)
        kinds = ["gain", "pack"] + ["lose"] * (n > k + 2) * 2 + ["times"] * (n <= 40)
        parts = [d for d in _FRACTIONS if n % d == 0 and n > d]
        kind = rng.choice(kinds + ["part"] * bool(parts))
        v |= {"k": k, "m": m, "then": rng.choice(["Then ", "Later ", "After that ", "Next, "]) if step else ""}
        if kind == "gain":
            facts.append(
                say(
                    rng,
                    "{then}[{he} buys {k} more|{friend} gives {him} {k} more|{he} finds {k} more at the {place}|{he} is given {k} {things} by {friend}].",
                    **v,
                )
            )
            text, n = _eq(n, "+", k)
            lines.append(
                say(
                    rng,
                    "[After getting {k} more, {p} has|Adding {k} gives|With the new ones there are] {eq} {things}.",
                    eq=text,
                    **v,
                )
            )
        elif kind == "pack":
            facts.append(
                say(
                    rng,
                    "{then}[{he} gets {m} [packs|bags|boxes] with {k} {things} in each|{friend} brings {m} [packs|bags] of {k} {things}].",
                    **v,
                )
            )
            text, total = _eq(m, "*", k)
            more, n = _eq(n, "+", total)
            lines.append(
                say(
                    rng,
                    "[The new packs hold|They bring] {eq} {things}, [so there are|which makes] {more} {things}.",
                    eq=text,
                    more=more,
                    **v,
                )
            )
        elif kind == "lose":
            facts.append(
                say(
                    rng,
                    "{then}[{he} gives {k} to {friend}|{he} loses {k} of them|{k} of them are sold at the {place}|{friend} takes {k} of the {things}].",
                    **v,
                )
            )
            text, n = _eq(n, "-", k)
            lines.append(
                say(rng, "[After losing {k}, there are|Taking away {k} leaves|{p} is left with] {eq} {things}.", eq=text, **v)
            )
        elif kind == "times":
            t = rng.choice([2, 3])
            facts.append(
                say(
                    rng,
                    "{then}[{he} makes the number of {things} {t} times as large|the heap grows to {t} times its size].",
                    t=t,
                    **v,
                )
            )
            text, n = _eq(n, "*", t)
            lines.append(say(rng, "[Now there are|The heap becomes|Multiplying gives] {eq} {things}.", eq=text, **v))
        else:
            d = rng.choice(parts)
            facts.append(
                say(
                    rng,
                    "{then}[{he} gives {part} of them to {friend}|{part} of the {things} are [lost|sold]].",
                    part=_FRACTIONS[d],
                    **v,
                )
            )
            text, gone = _eq(n, "/", d)
            rest, n = _eq(n, "-", gone)
            lines.append(
                say(
                    rng,
                    "[That is|The part that goes is] {eq} {things}, [so {p} keeps|leaving] {rest} {things}.",
                    eq=text,
                    rest=rest,
                    **v,
                )
            )
    facts = [f[0].upper() + f[1:] for f in facts]
    question = say(
        rng, "How many {things} [does {p} have now|does {p} have in the end|are there [now|at the end]|are left with {p}]?", **v
    )
    return Story(facts, question, lines, f"{n} {things}")


def shopping(rng: random.Random) -> Story:
    """The price of two or three goods; sometimes the change, sometimes the share of each friend."""
    who = _person(rng)
    goods = rng.sample(_GOODS, rng.randint(2, 3))
    counts, prices = [rng.randint(2, 6) for _ in goods], [rng.randint(2, 15) for _ in goods]
    listing = [
        say(rng, "{c} [{g}s for ${x} each|{g}s at ${x} apiece|{g}s that cost ${x} each]", c=c, g=g, x=x)
        for c, g, x in zip(counts, goods, prices, strict=True)
    ]
    joined = ", ".join(listing[:-1]) + " and " + listing[-1]
    facts = [
        say(
            rng,
            "[{p} buys|At the {place}, {p} buys|In a small shop {p} picks|{p} goes to the {place} and buys] {joined}.",
            joined=joined,
            place=rng.choice(_PLACES),
            **who,
        )
    ]
    lines, total = [], 0
    for c, g, x in zip(counts, goods, prices, strict=True):
        text, cost = _eq(c, "*", x)
        lines.append(say(rng, "[The {g}s cost|For the {g}s {p} pays] {text} dollars.", g=g, text=text, **who))
        total += cost
    sums = [c * x for c, x in zip(counts, prices, strict=True)]
    lines.append(
        say(
            rng,
            "[Together that is|The whole bill is|In total] {text} = {total} dollars.",
            text=" + ".join(map(str, sums)),
            total=total,
        )
    )
    kind = rng.choice(["bill", "change", "share"])
    friends = [d for d in (2, 3, 4, 5) if total % d == 0]
    if kind == "change" or (kind == "share" and not friends):
        note = min(x for x in (20, 50, 100, 200, 500) if x > total)
        facts.append(say(rng, "[{He} pays with|{He} hands over|{He} gives the seller] ${note}.", note=note, **who))
        text, total = _eq(note, "-", total)
        lines.append(say(rng, "[The change is|{p} gets back] {text} dollars.", text=text, **who))
        question = say(
            rng,
            "[How much change does {he} get|How many dollars does {p} get back|What change should the seller give {him}]?",
            **who,
        )
    elif kind == "share":
        d = rng.choice(friends)
        facts.append(say(rng, "[The bill is split evenly between {d} people|{d} friends share the cost equally].", d=d))
        text, total = _eq(total, "/", d)
        lines.append(say(rng, "[Each person pays|One share is] {text} dollars.", text=text))
        question = say(rng, "[How much does each of them pay|What is the share of one person in dollars]?")
    else:
        question = say(
            rng, "[How much does {p} pay|What is the total cost|How many dollars does {he} spend] [in all|altogether]?", **who
        )
    return Story(facts, question, lines, f"${total}")


def travel(rng: random.Random) -> Story:
    """Distances travelled at given speeds, or the time for a distance."""
    who = _person(rng)
    vehicle, low, high = rng.choice(
        [("bicycle", 10, 25), ("bus", 30, 60), ("car", 40, 90), ("train", 60, 140), ("boat", 8, 30)]
    )
    legs = [(rng.randint(low, high), rng.randint(2, 6)) for _ in range(rng.randint(1, 3))]
    v = who | {"vehicle": vehicle}
    if len(legs) == 1:
        (speed, hours), stop = legs[0], rng.randint(1, 3)
        distance = speed * hours
        facts = [
            say(
                rng,
                "[A {vehicle} travels {d} km at {s} km per hour|{p} goes {d} km by {vehicle} at a speed of {s} km per hour|At {s} km per hour, a {vehicle} has to cover {d} km].",
                d=distance,
                s=speed,
                **v,
            )
        ]
        facts.append(
            say(rng, "[On the way it rests for {k} hours|There is a pause of {k} hours|The stops add {k} hours].", k=stop)
        )
        text, ride = _eq(distance, "/", speed)
        more, total = _eq(ride, "+", stop)
        lines = [
            say(rng, "[The ride itself takes|Driving takes|Without stops it takes] {t} hours.", t=text),
            say(rng, "[With the stops|Adding the pause,] that is {m} hours.", m=more),
        ]
        return Story(facts, say(rng, "How [long|many hours] does the [whole trip|journey] take?"), lines, f"{total} hours")
    facts, lines, parts = [], [], []
    for i, (speed, hours) in enumerate(legs):
        first = say(
            rng,
            "[{p} travels by {vehicle} for {h} hours at {s} km per hour|A {vehicle} runs for {h} hours at {s} km per hour|For {h} hours a {vehicle} moves at {s} km per hour].",
            h=hours,
            s=speed,
            **v,
        )
        later = say(
            rng,
            "[Then|After that|Next] [it goes on for {h} hours at {s} km per hour|come {h} hours at {s} km per hour].",
            h=hours,
            s=speed,
        )
        facts.append(later if i else first)
        text, part = _eq(speed, "*", hours)
        parts.append(part)
        lines.append(
            say(rng, "[Part {i} covers|In part {i} the {vehicle} goes|Distance of part {i}:] {t} km.", i=i + 1, t=text, **v)
        )
    total = sum(parts)
    lines.append(
        say(rng, "[The whole way is|Together:|Adding up gives] {t} = {total} km.", t=" + ".join(map(str, parts)), total=total)
    )
    return Story(
        facts,
        say(rng, "[How far is the whole way|How many km is that altogether|What distance is covered in all]?"),
        lines,
        f"{total} km",
    )


def comparison(rng: random.Random) -> Story:
    """How much more, less, or how many times as much one has than another; totals or differences."""
    a, b, c = (p.name for p in rng.sample(_PEOPLE, 3))
    things, n = rng.choice(_THINGS), rng.randint(4, 30)
    facts = [say(rng, "[{a} has {n} {things}|{a} collected {n} {things}|{n} {things} belong to {a}].", a=a, n=n, things=things)]
    lines, amounts = [], [n]
    for one, other in [(b, a), (c, b)][: rng.randint(1, 2)]:
        m, k = amounts[-1], rng.randint(2, 12)
        kind = rng.choice(["more", "times"] + ["less"] * (m > k + 1) + ["half"] * (m % 2 == 0))
        v = {"one": one, "other": other, "things": things, "k": k}
        if kind == "more":
            facts.append(
                say(
                    rng,
                    "[{one} has {k} more than {other}|{one} has {k} {things} more than {other}|Compared with {other}, {one} has {k} more].",
                    **v,
                )
            )
            text, m = _eq(m, "+", k)
        elif kind == "less":
            facts.append(
                say(
                    rng,
                    "[{one} has {k} fewer than {other}|{one} has {k} {things} less than {other}|{other} has {k} more than {one}].",
                    **v,
                )
            )
            text, m = _eq(m, "-", k)
        elif kind == "half":
            facts.append(say(rng, "[{one} has half as many as {other}|{other} has twice as many as {one}].", **v))
            text, m = _eq(m, "/", 2)
        else:
            t = rng.choice(list(_TIMES))
            facts.append(
                say(rng, "[{one} has {t} as many as {other}|{one} owns {t} as many {things} as {other}].", t=_TIMES[t], **v)
            )
            text, m = _eq(m, "*", t)
        amounts.append(m)
        lines.append(say(rng, "[{one} has|So {one} has|For {one} we get] {text} {things}.", text=text, **v))
    names = [a, b, c][: len(amounts)]
    if rng.random() < 0.5 or amounts[0] == amounts[-1]:
        total = sum(amounts)
        lines.append(
            say(
                rng,
                "[Together they have|All of them have|In total there are] {t} = {x} {things}.",
                t=" + ".join(map(str, amounts)),
                x=total,
                things=things,
            )
        )
        listing = ", ".join(names[:-1]) + " and " + names[-1]
        question = say(rng, "How many {things} do {who} have [together|in all|altogether]?", things=things, who=listing)
    else:
        high, low = (names[0], names[-1]) if amounts[0] > amounts[-1] else (names[-1], names[0])
        text, total = _eq(max(amounts[0], amounts[-1]), "-", min(amounts[0], amounts[-1]))
        lines.append(say(rng, "[The difference is|{high} is ahead by] {t} {things}.", t=text, high=high, things=things))
        question = say(
            rng,
            "[How many more {things} does {high} have than {low}|By how many {things} is {low} behind {high}]?",
            high=high,
            low=low,
            things=things,
        )
    return Story(facts, question, lines, f"{total} {things}")


def fraction(rng: random.Random) -> Story:
    """A share of a group, and the remaining members."""
    d = rng.choice([2, 3, 4, 5, 6, 8])
    a, unit = rng.randint(1, d - 1), rng.randint(3, 15)
    n, group, place = (
        d * unit,
        rng.choice(["pupils", "visitors", "workers", "players", "guests", "birds", "cars"]),
        rng.choice(_PLACES),
    )
    one, two = rng.sample(["arrive early", "come from the north", "stay for lunch", "leave before noon", "carry a red flag"], 2)
    v = {"n": n, "group": group, "place": place, "a": a, "d": d, "one": one, "two": two}
    facts = [
        say(
            rng,
            "[There are {n} {group} at the {place}|At the {place} we count {n} {group}|The {place} has {n} {group} today].",
            **v,
        )
    ]
    facts.append(say(rng, "[{a}/{d} of them {one}|Of these, {a}/{d} {one}|A fraction of {a}/{d} of the {group} {one}].", **v))
    text, part = _eq(n, "/", d)
    lines = [say(rng, "[One part of {d} is|1/{d} of {n} is] {t} {group}.", t=text, **v)]
    text, some = _eq(part, "*", a)
    lines.append(say(rng, "[So|This means that] {t} {group} {one}.", t=text, **v))
    if rng.random() < 0.4:
        return Story(facts, say(rng, "How many {group} {one}?", **v), lines, f"{some} {group}")
    text, rest = _eq(n, "-", some)
    lines.append(say(rng, "[The rest are|The others number|That leaves] {t} {group}.", t=text, **v))
    if rest % 2 or rng.random() < 0.5:
        return Story(
            facts, say(rng, "How many {group} [are there that do not {one}|do not {one}]?", **v), lines, f"{rest} {group}"
        )
    facts.append(say(rng, "[Half of the others {two}|Of the rest, half {two}].", **v))
    text, half = _eq(rest, "/", 2)
    lines.append(say(rng, "[Half of them:|Half of these is] {t} {group}.", t=text, **v))
    return Story(facts, say(rng, "How many {group} {two}?", **v), lines, f"{half} {group}")


def percent(rng: random.Random) -> Story:
    """A price that falls or rises by a percentage; sometimes then the price of several pieces."""
    who, good = _person(rng), rng.choice(_GOODS + ["coat", "chair", "table", "bicycle", "ticket"])
    rate = rng.choice([5, 10, 20, 25, 30, 40, 50, 75])
    price = rng.randint(1, 12) * (20 if rate % 10 or rate == 50 else 10) * rng.choice([1, 2])
    down, count = rng.random() < 0.6, rng.randint(1, 4)
    v = who | {"good": good, "price": price, "rate": rate, "count": count}
    if down:
        facts = [
            say(rng, "[A {good} costs ${price}|The price of a {good} is ${price}|{p} sees a {good} for ${price}].", **v),
            say(rng, "[In the sale it is {rate}% cheaper|There is a discount of {rate}%|The shop takes {rate}% off].", **v),
        ]
    else:
        facts = [
            say(rng, "[A {good} costs ${price}|Last year a {good} cost ${price}|{p} used to sell a {good} for ${price}].", **v),
            say(rng, "[Now the price goes up by {rate}%|A tax of {rate}% is added|It becomes {rate}% more expensive].", **v),
        ]
    change = price * rate // 100
    assert change * 100 == price * rate
    lines = [say(rng, "[{rate}% of {price} is|The change is] {price} * {rate} / 100 = {change} dollars.", change=change, **v)]
    text, new = _eq(price, "-" if down else "+", change)
    lines.append(say(rng, "[The new price is|One {good} then costs|So it costs] {t} dollars.", t=text, **v))
    if count == 1:
        return Story(
            facts,
            say(rng, "[What is the new price|How much does the {good} cost now|How many dollars does {p} pay for it]?", **v),
            lines,
            f"${new}",
        )
    facts.append(say(rng, "[{p} buys {count} of them|{p} needs {count}].", **v))
    text, total = _eq(count, "*", new)
    lines.append(say(rng, "[For {count} of them that is|{count} pieces cost] {t} dollars.", t=text, **v))
    return Story(
        facts,
        say(rng, "[How much does {he} pay|What is the total price|How many dollars is that in all]?", **v),
        lines,
        f"${total}",
    )


def wages(rng: random.Random) -> Story:
    """Money earned by the hour in a week, minus expenses, and the savings of several weeks."""
    who, wage, hours, days = _person(rng), rng.randint(6, 25), rng.randint(2, 9), rng.randint(2, 6)
    v = who | {"wage": wage, "hours": hours, "days": days, "place": rng.choice(_PLACES)}
    facts = [
        say(
            rng,
            "[{p} earns ${wage} an hour at the {place}|At the {place}, {p} is paid ${wage} per hour|Every hour of work at the {place} brings {p} ${wage}].",
            **v,
        )
    ]
    facts.append(say(rng, "{He} works {hours} hours [a day, {days} days a week|on each of {days} days every week].", **v))
    day, a_day = _eq(wage, "*", hours)
    week, a_week = _eq(a_day, "*", days)
    lines = [
        say(rng, "[In one day {p} earns|A day brings] {t} dollars.", t=day, **v),
        say(rng, "[In a week that makes|A week brings] {t} dollars.", t=week, **v),
    ]
    if rng.random() < 0.4:
        return Story(
            facts,
            say(
                rng,
                "[How much does {p} earn in a week|What is {p}'s pay for one week|How many dollars does {he} make each week]?",
                **v,
            ),
            lines,
            f"${a_week}",
        )
    spend = rng.randint(1, max(1, a_week // 10 - 1)) * 5
    facts.append(
        say(
            rng,
            "[{He} spends ${s} of it|Food and rent take ${s} a week|Each week ${s} goes for [food|rent|the bus]].",
            s=spend,
            **v,
        )
    )
    text, left = _eq(a_week, "-", spend)
    lines.append(say(rng, "[That leaves|{p} can save] {t} dollars [a week|each week].", t=text, **v))
    weeks = rng.randint(2, 9)
    if rng.random() < 0.5:
        text, total = _eq(left, "*", weeks)
        lines.append(say(rng, "[After {w} weeks {he} has|{w} weeks give] {t} dollars.", w=weeks, t=text, **v))
        return Story(
            facts,
            say(rng, "How much [has {p} saved|money does {p} have|can {p} put aside] after {w} weeks?", w=weeks, **v),
            lines,
            f"${total}",
        )
    return Story(
        facts, say(rng, "[How much is left at the end of the week|What can {p} save in one week]?", **v), lines, f"${left}"
    )


def clock(rng: random.Random) -> Story:
    """A time of day after one to three activities."""
    who, hour, minute = _person(rng), rng.randint(7, 15), rng.randrange(0, 60, 5)
    deeds = rng.sample(
        ["reads", "cooks", "paints", "swims", "cleans the room", "plays the piano", "waters the garden", "writes letters"],
        rng.randint(1, 3),
    )
    now = f"{hour}:{minute:02d}"
    facts = [say(rng, "[{p} starts at {now}|It is {now} when {p} begins|At {now} {p} gets going].", now=now, **who)]
    lines = []
    for i, deed in enumerate(deeds):
        spend = rng.randrange(10, 100, 5)
        facts.append(
            say(
                rng,
                "{then}{he} {deed} for {s} minutes.",
                then=rng.choice(["Then ", "After that ", "Next "]) if i else "First ",
                he=who["he"],
                deed=deed,
                s=spend,
            )
        )
        end = hour * 60 + minute + spend
        lines.append(
            say(
                rng,
                "[{s} minutes after {a} it is {b}|From {a}, {s} minutes later it is {b}].",
                s=spend,
                a=f"{hour}:{minute:02d}",
                b=f"{end // 60}:{end % 60:02d}",
            )
        )
        hour, minute = divmod(end, 60)
    question = say(rng, "[What time is it when {p} is done|When does {p} finish|At what time is {he} ready]?", **who)
    return Story(facts, question, lines, f"{hour}:{minute:02d}")


def garden(rng: random.Random) -> Story:
    """Area or perimeter of a rectangle, and the cost of covering or fencing it."""
    who, a, b, cost = _person(rng), rng.randint(3, 25), rng.randint(3, 25), rng.randint(2, 9)
    thing = rng.choice(["garden", "field", "yard", "room", "playground"])
    v = who | {"a": a, "b": b, "cost": cost, "thing": thing}
    facts = [
        say(
            rng,
            "[{p} has a {thing} that is {a} m long and {b} m wide|A rectangular {thing} measures {a} m by {b} m|The sides of {p}'s {thing} are {a} m and {b} m].",
            **v,
        )
    ]
    if rng.random() < 0.5:
        text, size = _eq(a, "*", b)
        lines, unit = [say(rng, "[The area is|It covers] {t} square metres.", t=text)], "square metres"
        ask, fact = (
            "[What is the area|How large is it]",
            "[Each square metre of new floor costs ${cost}|{He} covers it for ${cost} a square metre].",
        )
    else:
        half, s = _eq(a, "+", b)
        text, size = _eq(2, "*", s)
        lines, unit = (
            [
                say(rng, "[Two sides make|Half the way round is] {t} m.", t=half),
                say(rng, "[The whole way round is|The perimeter is] {t} m.", t=text),
            ],
            "m",
        )
        ask, fact = (
            "[What is the perimeter|How long is a fence around it]",
            "[A metre of fence costs ${cost}|{He} pays ${cost} for each metre of fence].",
        )
    if rng.random() < 0.4:
        return Story(facts, say(rng, ask + "?"), lines, f"{size} {unit}")
    facts.append(say(rng, fact, **v))
    text, total = _eq(size, "*", cost)
    lines.append(say(rng, "[This costs|The price is] {t} dollars.", t=text))
    return Story(
        facts,
        say(rng, "[How much does it cost|What does {p} pay in all|What is the total cost in dollars]?", **v),
        lines,
        f"${total}",
    )


def sharing(rng: random.Random) -> Story:
    """Equal shares with a remainder, or the number of boxes needed."""
    who, things, k, each, left = _person(rng), rng.choice(_THINGS), rng.randint(3, 9), rng.randint(3, 14), rng.randint(0, 2)
    n = k * each + left
    v = who | {"things": things, "k": k, "n": n}
    if rng.random() < 0.5:
        facts = [
            say(
                rng,
                "[{p} shares {n} {things} equally among {k} [children|friends]|{n} {things} are dealt out evenly to {k} [children|friends]|{k} friends want equal shares of {p}'s {n} {things}].",
                **v,
            )
        ]
        question = say(rng, "[How many {things} does each get|What is the share of each]?", **v)
    else:
        facts = [
            say(
                rng,
                "[{p} puts {n} {things} into {k} [boxes|bags], the same number in each|{k} [boxes|bags] are filled equally from {n} {things}].",
                **v,
            )
        ]
        question = say(rng, "How many {things} are [in each|in one of them]?", **v)
    lines = []
    if left:
        facts.append(
            say(
                rng,
                "[{left} of them are broken and thrown away|First {he} eats or loses {left}|{left} are kept aside].",
                left=left,
                **v,
            )
            .replace("1 of them are", "1 of them is")
            .replace("1 are", "1 is")
        )
        text, n = _eq(n, "-", left)
        lines.append(say(rng, "[There are|What can be shared is] {t} {things}.", t=text, **v))
    text, each = _eq(n, "/", k)
    lines.append(say(rng, "[Dividing by {k} gives|Each share is|Every one gets] {t} {things}.", t=text, **v))
    return Story(facts, question, lines, f"{each} {things}")


def recipe(rng: random.Random) -> Story:
    """Amounts scaled by the number of people, by way of the amount for one person."""
    who, one, p, q = _person(rng), rng.randint(2, 30), rng.randint(2, 8), rng.randint(3, 15)
    unit, food = rng.choice(
        [
            ("grams of rice", "soup"),
            ("grams of flour", "bread"),
            ("spoons of sugar", "cake"),
            ("nails", "shelf"),
            ("litres of paint", "wall"),
        ]
    )
    users = {"soup": "people", "bread": "loaves", "cake": "cakes", "shelf": "shelves", "wall": "walls"}[food]
    v = who | {"x": one * p, "a": p, "q": q, "unit": unit, "users": users}
    facts = [
        say(
            rng,
            "[For {a} {users}, {p} needs {x} {unit}|{p} uses {x} {unit} for {a} {users}|{x} {unit} are enough for {a} {users}].",
            **v,
        )
    ]
    text, each = _eq(one * p, "/", p)
    more, total = _eq(each, "*", q)
    lines = [
        say(rng, "[One takes|For one we need|A single one needs] {t} {unit}.", t=text, **v),
        say(rng, "[For {q} that is|{q} of them take] {t} {unit}.", t=more, **v),
    ]
    question = say(rng, "How many {unit} [are needed for|does {p} need for|will {he} use for] {q} {users}?", **v)
    return Story(facts, question, lines, f"{total} {unit}")


def average(rng: random.Random) -> Story:
    """The mean of three to five numbers, or their range."""
    who, mean, n = _person(rng), rng.randint(8, 40), rng.randint(3, 5)
    values = [mean + rng.randint(-6, 6) for _ in range(n - 1)]
    values.append(n * mean - sum(values))
    if values[-1] < 1:
        values = [mean] * n
    what = rng.choice(["points", "pages", "km", "emails", "customers", "dollars"])
    listing = ", ".join(map(str, values[:-1])) + f" and {values[-1]}"
    facts = [
        say(
            rng,
            "[On {n} days {p} counts {l} {w}|{p} writes down {l} {w}, one number a day|The numbers for {n} days are {l} {w}].",
            n=n,
            l=listing,
            w=what,
            **who,
        )
    ]
    if rng.random() < 0.7 or len(set(values)) == 1:
        lines = [
            say(
                rng, "[The sum is|Adding them gives|Together that is] {t} = {s}.", t=" + ".join(map(str, values)), s=sum(values)
            )
        ]
        text, mean = _eq(sum(values), "/", n)
        lines.append(say(rng, "[Divided by {n} days|The mean is|Per day that is] {t} {w}.", n=n, t=text, w=what))
        return Story(
            facts,
            say(rng, "[What is the average|What is the mean per day|How many {w} is that per day on average]?", w=what),
            lines,
            f"{mean} {what}",
        )
    text, gap = _eq(max(values), "-", min(values))
    lines = [
        say(rng, "The largest number is {a} and the smallest is {b}.", a=max(values), b=min(values)),
        say(rng, "[The difference is|They differ by] {t} {w}.", t=text, w=what),
    ]
    return Story(
        facts,
        say(rng, "[What is the difference between the largest and the smallest|How far apart are the highest and the lowest]?"),
        lines,
        f"{gap} {what}",
    )


def ages(rng: random.Random) -> Story:
    """Ages in the present, past and future."""
    a, b = (p.name for p in rng.sample(_PEOPLE, 2))
    age, gap, years = rng.randint(5, 30), rng.randint(2, 12), rng.randint(2, 15)
    v = {"a": a, "b": b, "age": age, "gap": gap, "years": years}
    older = rng.random() < 0.5 or age <= gap + 1
    facts = [
        say(rng, "[{a} is {age} years old|{a} has just turned {age}|The age of {a} is {age}].", **v),
        say(
            rng,
            "[{b} is {gap} years older|{a} is {gap} years younger than {b}]."
            if older
            else "[{b} is {gap} years younger|{a} is {gap} years older than {b}].",
            **v,
        ),
    ]
    text, other = _eq(age, "+" if older else "-", gap)
    lines = [say(rng, "[Now {b} is|{b} is now|So {b} is] {t} years old.", t=text, **v)]
    if rng.random() < 0.5:
        text, then = _eq(other, "+", years)
        lines.append(say(rng, "In {years} years {b} will be {t} years old.", t=text, **v))
        return Story(facts, say(rng, "How old will {b} be [in {years} years|{years} years from now]?", **v), lines, str(then))
    text, both = _eq(age, "+", other)
    lines.append(say(rng, "[The sum of the ages is|Together they are] {t} years.", t=text, **v))
    return Story(facts, say(rng, "[How old are they together|What is the sum of their ages]?", **v), lines, str(both))


FAMILIES: tuple[Family, ...] = (
    stock,
    stock,
    stock,
    shopping,
    shopping,
    travel,
    comparison,
    comparison,
    fraction,
    percent,
    wages,
    clock,
    garden,
    sharing,
    recipe,
    average,
    ages,
)


def problem(rng: random.Random) -> tuple[str, str]:
    """A question and its worked answer, which ends in `answer is X.` or `Answer: X`."""
    story = rng.choice(FAMILIES)(rng)
    facts = " ".join(story.facts)
    order = rng.random()
    if order < 0.7:
        user = f"{facts} {story.question}"
    elif order < 0.85:
        user = say(rng, "{q} [|Here is what we know: |This is given: ]{f}", q=story.question, f=facts)
    else:
        user = say(
            rng,
            "[Solve this problem: {f} {q}|{f} {q} [Explain your steps|Work it out step by step|Show your work].]",
            q=story.question,
            f=facts,
        )
    opening = rng.choice(["", "", "", "Let us go step by step.", "We work it out in order."])
    closing = say(rng, "[The answer is {x}.|So the answer is {x}.|Answer: {x}]", x=story.answer)
    return user, rng.choice(["\n", "\n", " "]).join(filter(None, [opening, *story.lines, closing]))
