"""The dates task: a sentence that names a day, however written, to its ISO date.

Held out: the sentences and a fifth of all days.

Knows no model.
"""

from __future__ import annotations

import re
from datetime import date
from random import Random

from .task import Item, Recipe, Scores, Split, Task

SENTENCES: dict[Split, list[str]] = {
    "train": """\
The meeting is on {}.
The contract was signed on {} in room 214.
Our flight leaves on {} at 9:30.
She was born on {}.
Please send the report before {}.
On {} the museum opened its doors to 300 guests.
The rent for 2 rooms is due on {}.
Invoice 4471 was issued on {}.
We moved to the new office on {}.
From {} the shop will be closed.
My appointment with the dentist is on {} at 8:15.
The 12 players met again on {}.
It was {} when the bridge fell.
The warranty ends on {}.
They married on {} in a small village.
{} is the last day to apply.
The exam takes place on {}, starting at 10 o'clock.
Bus line 7 stopped running on {}.
The letter, dated {}, was never answered.
Until {} you can return the 3 books.
The software was released on {}.
His passport expires on {}.
The storm of {} damaged 85 houses.
Payment of 120 euros arrived on {}.
Version 2 of the form is valid as of {}.
We will see each other again on {}.
The treaty came into force on {}.
The first train ran on {} and carried 40 people.
Mark {} in your calendar.
Tickets are on sale since {}.""".splitlines(),
    "test": """\
The concert was moved to {}.
Delivery of order 9082 is planned for {}.
Grandfather opened his bakery on {}.
The hearing begins on {} at 14:00 in hall 3.
Your subscription renews on {}.
On {} the team won its 5th title.
{} was a very cold day.
The lease of 1 garage ended on {}.
The school trip with 26 children starts on {}.
Remember that the library reopens on {}.
The satellite was launched on {} after 2 delays.
The next check of the lift is due by {}.""".splitlines(),
}
FIRST, LAST = date(1950, 1, 1).toordinal(), date(2049, 12, 31).toordinal()
FORMS = (
    "the {nth} of {when:%B} {when.year}",
    "the {nth} of {when:%B}, {when.year}",
    "{nth} {when:%B} {when.year}",
    "{when:%B} {when.day}, {when.year}",
    "{when:%B} {nth}, {when.year}",
    "{when.day} {when:%B} {when.year}",
    "{when:%A}, {when.day} {when:%B} {when.year}",
    "{when:%A}, {when:%B} {when.day}, {when.year}",
    "{when.day} {when:%b} {when.year}",
    "{when:%b} {when.day}, {when.year}",
)
ENDINGS = {1: "st", 2: "nd", 3: "rd"}
ISO = re.compile(r"\b\d{4}-\d{2}-\d{2}\b")


def ordinal(day: int) -> str:
    """4 → 4th."""
    if day in (11, 12, 13):
        return f"{day}th"
    return f"{day}{ENDINGS.get(day % 10, 'th')}"


def written(when: date, rng: Random) -> str:
    """The day in one of the ways people write it."""
    form = rng.choice(FORMS)
    return form.format(when=when, nth=ordinal(when.day))


def held_out(when: date) -> bool:
    return when.toordinal() % 5 == 0


def make(rng: Random, split: Split) -> Item:
    when = date.fromordinal(rng.randint(FIRST, LAST))
    while held_out(when) != (split == "test"):
        when = date.fromordinal(rng.randint(FIRST, LAST))
    form = rng.choice(SENTENCES[split])
    sentence = form.format(written(when, rng))
    return Item(f"{sentence[0].upper()}{sentence[1:]}\nDate:", when.isoformat())


def score(answer: str, wanted: str) -> Scores:
    """The first ISO date in the answer counts, whatever stands around it."""
    date_found = ISO.search(answer)
    if date_found is None:
        return {"exact": 0.0, "iso": 0.0}
    return {"exact": float(date_found[0] == wanted), "iso": 1.0}


TASK = Task(
    name="dates",
    summary="Reads the day a sentence names and answers with its ISO date.",
    form="<sentence>\\nDate:",
    sample="The choir sings again on the 4th of March 2031.\nDate:",
    instruction="Write the date in the following sentence in ISO format (YYYY-MM-DD). Answer with the date "
    "only.",
    recipe=Recipe(rank=16, alpha=16, targets=("q_proj", "v_proj"), steps=180, rate=1e-3, dora=True),
    make=make,
    score=score,
    measures={
        "exact": "the first ISO date in the answer is the right one",
        "iso": "there is an ISO date in the answer",
    },
    limit=16,
)
