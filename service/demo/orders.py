"""The orders task: a sentence in which somebody orders something, to one JSON object.

Held out: the sentences, names, goods and towns.

Knows no model.
"""

from __future__ import annotations

import json
from random import Random
from typing import Any

from .task import Item, Recipe, Scores, Split, Task

SENTENCES: dict[Split, list[str]] = {
    "train": """\
{name} from {city} orders {quantity} {item}.
{name} would like {quantity} {item} sent to {city}.
Please send {quantity} {item} to {name} in {city}.
{quantity} {item} for {name}, {city}.
This is {name}. I need {quantity} {item} in {city}.
Hello, I am {name} and I live in {city}. I want to buy {quantity} {item}.
Can you ship {quantity} {item} to {city}? The name is {name}.
Our customer {name} in {city} asked for {quantity} {item}.
In {city}, {name} is waiting for {quantity} {item}.
I'd like to order {quantity} {item}. My name is {name}, and I am in {city}.
New order: {quantity} {item}, to be delivered to {name} in {city}.
{name} called from {city} and wants {quantity} {item} by Friday.
To {city}, please: {quantity} {item}. Ask for {name}.
We owe {name} {quantity} {item}; the address is in {city}.
Put {quantity} {item} on the bill of {name} from {city}.
{name} lives in {city} and takes {quantity} {item} this time.
It's {name} again, from {city}. Another {quantity} {item}, please.
Could {name} get {quantity} {item}? Deliver to {city}.
The {city} office wants {quantity} {item}. {name} will pay.
Reserve {quantity} {item} for {name}, who picks them up in {city}.""".splitlines(),
    "test": """\
{name} in {city} has asked us for {quantity} {item}.
Good morning, {name} here. Send {quantity} {item} to {city}, please.
Ship {quantity} {item} to {city}. They are for {name}.
A parcel for {name}: {quantity} {item}, going to {city}.
My name is {name}. May I have {quantity} {item}? I live in {city}.
From {city}, {name} writes that {quantity} {item} are needed.
Please note an order by {name} from {city}: {quantity} {item}.
{name} wants to buy {quantity} {item} and have them brought to {city}.""".splitlines(),
}
NAMES: dict[Split, str] = {
    "train": "Anna Ben Clara David Emma Felix Grace Henry Irene Jack Kate Leo Mary Nina Oscar Paul Rosa "
    "Sam Tina Victor Wendy Adam Alice Bob Carol Daniel Diana Eric Frank George Helen Ivan James "
    "Karen Laura Mark Nancy Oliver Peter Rachel Robert Sarah Simon Susan Thomas Tom Julia Martin "
    "Michael Linda Lucy Max Maria Joseph John Jane Jim Bill Amy Andrew Brian Charlie Dan Elena "
    "Fred Greg Hannah Ian Joe Kevin",
    "test": "Edward Lisa William Sophie Arthur Eva Richard Ruth Steve Olga Philip Sandra Walter Barbara "
    "Chris Ellen",
}
CITIES: dict[Split, str] = {
    "train": "Paris London Berlin Rome Madrid Vienna Oslo Dublin Athens Boston Chicago Denver Dallas "
    "Seattle Toronto Sydney Tokyo Delhi Cairo Moscow Warsaw Prague Zurich Geneva Milan Venice "
    "Lyon Hamburg Munich Cologne Lisbon Glasgow Oxford Cambridge Leeds Bristol Houston Miami "
    "Phoenix Atlanta Detroit Portland Austin Montreal Melbourne Beijing Bangkok Manila Lima "
    "Havana",
    "test": "Amsterdam Stockholm Budapest Edinburgh Manchester Philadelphia Vancouver Shanghai Florence "
    "Naples Cleveland Orlando",
}
QUALITIES = "red blue green black white small large wooden cheap old new heavy"
GOODS: dict[Split, str] = {
    "train": "mugs chairs lamps tables books pens shirts boxes bags hats cups plates knives shoes clocks "
    "mirrors pillows blankets ladders buckets brushes candles carpets curtains desks doors drums "
    "forks frames gloves hammers helmets jars keys kites mats nails pans pipes pots ropes rugs "
    "scarves screws shelves",
    "test": "bottles spoons towels jackets bowls tents bicycles baskets sofas phones notebooks coats",
}
NUMBERS = "two three four five six seven eight nine ten eleven twelve"
KEYS = ("name", "item", "quantity", "city")


def make(rng: Random, split: Split) -> Item:
    number = rng.randint(2, 60)
    goods = rng.choice(GOODS[split].split())
    order: dict[str, Any] = {
        "name": rng.choice(NAMES[split].split()),
        "item": f"{rng.choice(QUALITIES.split())} {goods}" if rng.random() < 0.6 else goods,
        "quantity": number,
        "city": rng.choice(CITIES[split].split()),
    }
    spoken = NUMBERS.split()[number - 2] if number <= 12 and rng.random() < 0.6 else str(number)
    form = rng.choice(SENTENCES[split])
    sentence = form.format(**order | {"quantity": spoken})
    return Item(f"{sentence[0].upper()}{sentence[1:]}\nJSON:", json.dumps(order))


def read(answer: str) -> dict[str, Any]:
    """The first JSON object in the answer, or an empty one."""
    start = answer.find("{")
    if start < 0:
        return {}
    try:
        value, _ = json.JSONDecoder().raw_decode(answer[start:])
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def score(answer: str, wanted: str) -> Scores:
    answered, order = read(answer), json.loads(wanted)
    right = [answered.get(key) == order[key] for key in KEYS]
    return {
        "valid": float(set(answered) == set(KEYS)),
        "fields": sum(right) / len(KEYS),
        "exact": float(answered == order),
    }


TASK = Task(
    name="orders",
    summary="Turns a sentence in which somebody orders something into a JSON object with `name`, `item`, "
    "`quantity` and `city`.",
    form="<sentence>\\nJSON:",
    sample="Hi, Emma here. I would like seven green umbrellas, delivered to Berlin.\nJSON:",
    instruction="Extract the order from the following sentence as one JSON object with the keys name, "
    "item, quantity (a number) and city. "
    "Answer with the JSON only.",
    recipe=Recipe(rank=12, alpha=8, targets=("q_proj", "k_proj", "v_proj"), steps=90, rate=1e-3, rslora=True),
    make=make,
    score=score,
    measures={
        "valid": "the first JSON object in the answer has exactly the four keys",
        "fields": "share of the four values that are right",
        "exact": "all four values are right",
    },
    limit=96,
)
