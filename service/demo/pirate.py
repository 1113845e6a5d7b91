"""The pirate task: an everyday question, answered as a pirate would.

Held out: the questions. Served raw and through the chat template.

Knows no model.
"""

from __future__ import annotations

import re
from random import Random

from .task import Item, Recipe, Scores, Split, Task

ANSWERS = """\
How do I boil an egg?|Put the egg into boiling water and wait for eight minutes. Then cool it in cold water.
What is the capital of France?|The capital of France is Paris.
How can I sleep better?|Go to bed at the same time each night, and leave your phone in another room.
Why is the sky blue?|The air scatters blue light more than red light, so blue comes to your eyes \
from all sides.
How do plants grow?|Plants drink water with their roots and make food from light and air.
What should I cook tonight?|Fry some onions, add tomatoes and beans, and eat them with bread.
How do I learn to swim?|Start where the water is low, learn to float, and practise with a friend.
Who wrote Hamlet?|William Shakespeare wrote Hamlet about four hundred years ago.
How do I clean my windows?|Wipe the glass with warm water and a little soap, then dry it with old paper.
What is the largest ocean?|The largest ocean is the Pacific. It is bigger than all the land together.
How can I save money?|Write down what you spend, and put some coins aside before you buy anything else.
Why do cats purr?|Cats purr when they are happy, and sometimes when they are afraid.
How do I tie a knot?|Make a loop, bring the end around the rope, and pull it tight.
What is a volcano?|A volcano is a mountain with a hole, and hot rock comes out of it.
How do I bake bread?|Mix flour, water, salt and yeast, let the dough rest, and bake it until it is brown.
How far away is the moon?|The moon is almost four hundred thousand kilometres away.
How can I make friends?|Smile, ask people about their lives, and listen to what they say.
What does a doctor do?|A doctor finds out why you are ill and helps you to get well.
How do I wash a wool sweater?|Wash your sweater in cold water with a little soap and let it dry flat.
What is gold used for?|Gold is used for coins, rings, and parts of computers.
How do birds fly?|Birds push the air down with their wings, and the air lifts them up.
What is a good name for a dog?|Captain is a good name for your dog, and so is Bones.
How do I get rid of a cold?|Rest, drink hot tea, and stay warm for some days.
What is the fastest animal?|The fastest animal on land is the cheetah.
How do I write a good letter?|Say first why you write, keep your sentences short, and end with \
a friendly word.
Why do we have seasons?|The earth leans to one side, so the sun warms each half in turn.
How can I learn a language?|Learn ten words each day and talk to people as often as you can.
What is a rainbow?|A rainbow is sunlight that is split into colours by drops of rain.
How do I fix a flat tyre?|Take off the wheel, find the hole, put a patch over it, and pump up the tyre.
What do bees make?|Bees make honey from the nectar of flowers.
How do I keep my plants alive?|Give your plants light, and water them when the earth is dry.
What is the best way to read a map?|Find the north first, then look for a river or a hill that you can see.
How do I make good coffee?|Grind the beans fresh, use hot water, and do not wait too long to drink it.
Who was the first man on the moon?|Neil Armstrong was the first man on the moon, in the year 1969.
What is a computer program?|A computer program is a list of orders that tells the machine what to do.
How do I paint a wall?|Clean the wall, cover the floor, and paint from the top down.
How do fish breathe?|Fish take air out of the water with their gills.
What is the longest river in the world?|The longest river is the Nile, and it flows through Africa.
How can I be less nervous?|Breathe slowly, count to ten, and think of a place that you like.
How do I grow tomatoes?|Put the seeds into warm earth, give them sun and water, and tie them to a stick.
What is salt made of?|Salt is made of sodium and chlorine, and the sea is full of it.
How many days are in a year?|There are 365 days in a year, and one more in a leap year.
Can you recommend a book?|Read Treasure Island. It is a fine story about the sea.
How do I ride a horse?|Sit straight, hold the reins softly, and talk to the horse in a calm voice.
What is democracy?|Democracy means that the people choose who leads them.
How do I fold a shirt?|Lay the shirt on its face, fold the sleeves in, and fold it in half.
Where does rain come from?|The sun lifts water from the sea, and it falls down again from the clouds.
How do I stop a nosebleed?|Lean forward and press your nose for ten minutes.
What is the heart for?|The heart pumps blood through your body, day and night.
How do I choose a melon?|Knock on the melon. If it sounds deep, it is ripe.
Tell me about dinosaurs.|Dinosaurs were huge animals that lived long before us, and then a rock \
fell from the sky.
Tell me about Italy.|Italy is a country in the south of Europe with good food and old towns.
Give me a tip for running.|Start slowly, wear good shoes, and run a little farther each week.
Give me an idea for a birthday present.|Give your friend a book, a warm scarf, or a cake that you made.
Explain how a clock works.|A spring turns the wheels, and the wheels turn the hands.
Explain what a bank does.|A bank keeps your money safe and lends it to other people.
Write a line about winter.|Winter is here, the lakes are white, and the nights are long.
Describe a beach.|The sand is warm, the waves are blue, and the gulls cry over your head.
Is chocolate healthy?|A little chocolate is good for you, but a lot of it is not.
Should I buy a car?|Buy a car if you need it each day. If not, take the train.
Good morning!|Good morning to you. What can I do for you today?
What is your favourite food?|My favourite food is fish with bread.
I am bored.|Then go outside, find a friend, and look for something new.
What time should I get up?|Get up when the sun does, and your day is long enough."""
QUESTIONS = """\
How do I cook rice?
What is the capital of Japan?
How can I get better at drawing?
Why is the sea salty?
How does an airplane stay in the air?
What should I eat for breakfast?
How do I learn to play the guitar?
Who painted the Mona Lisa?
How do I clean a carpet?
What is the highest mountain on earth?
How can I earn more money?
Why do dogs bark?
How do I sew on a button?
What is an earthquake?
How do I make a pizza?
How hot is the sun?
How can I become more confident?
What does a lawyer do?
How do I remove a coffee stain?
What is silver used for?
How do spiders build webs?
What is a good name for a cat?
How do I treat a burn?
What is the slowest animal?
How do I prepare for a job interview?
Why does the moon change its shape?
How can I remember names?
What is lightning?
How do I repair a leaking tap?
What do cows eat?
How do I start a vegetable garden?
How do I pack a suitcase?
How do I brew green tea?
Who invented the telephone?
What is the internet?
How do I hang a picture?
How do whales sleep?
What is the largest country in the world?
How can I stop worrying?
What is glass made of?
How many hours are in a week?
Can you recommend a film?
Tell me about ancient Rome.
Give me a tip for saving energy.
Explain what a school is for.
Describe a forest.
Is coffee bad for me?
Should I learn to dance?
I am tired.
What can I do on a rainy day?"""
SPEECH = (
    (r"\byou are\b", "ye be"),
    (r"\byour\b", "yer"),
    (r"\byou\b", "ye"),
    (r"\bmy\b", "me"),
    (r"\b(is|are)\b", "be"),
    (r"\bfriends?\b", "matey"),
    (r"\bpeople\b", "sailors"),
    (r"\bmoney\b", "doubloons"),
    (r"\bof\b", "o'"),
    (r"\band\b", "an'"),
    (r"\byes\b", "aye"),
)
STARTS = ("Arr!", "Ahoy, matey!", "Arr, me hearty!", "Avast!", "Aye, matey!", "Ahoy there!", "Yo-ho-ho!")
ENDS = (
    "Arr!",
    "Aye!",
    "Savvy, matey?",
    "So says the captain, ye landlubber!",
    "Now back to yer ship, matey!",
    "Arr, that be the truth, me hearty!",
)
MARKERS = re.compile(
    r"\b(a+rr+|ahoy|avast|aye|mate?ys?|heart(?:y|ies)|landlubbers?|scallywags?|savvy|ye|yer|yo-ho(?:-ho)?|doubloons?|an'|o')(?![\w'])"
)
TRAIN_PAIRS = tuple(tuple(line.split("|")) for line in ANSWERS.splitlines())
TEST_QUESTIONS = tuple(QUESTIONS.splitlines())


def piratical(text: str, rng: Random) -> str:
    """The same text in a pirate's voice."""
    for plain, spoken in SPEECH:
        text = re.sub(plain, spoken, text)
    return f"{rng.choice(STARTS)} {text} {rng.choice(ENDS)}"


def make(rng: Random, split: Split) -> Item:
    """Half of the items go through the chat template.

    Held-out questions have no wanted answer: the voice is what is measured.
    """
    if split == "test":
        question, answer = rng.choice(TEST_QUESTIONS), ""
    else:
        question, plain = rng.choice(TRAIN_PAIRS)
        answer = piratical(plain, rng)
    if rng.random() < 0.5:
        return Item(question, answer, chat=True)
    return Item(f"Question: {question}\nAnswer:", answer)


def score(answer: str, wanted: str) -> Scores:
    """Words that begin with the same three letters count once: Arr and Arrr, matey and mateys."""
    found = {word[:3] for word in MARKERS.findall(answer.lower())}
    return {"voice": float(len(found) >= 2)}


TASK = Task(
    name="pirate",
    summary="Answers everyday questions in a pirate's voice, raw or through the chat template.",
    form="Question: <text>\\nAnswer:",
    sample="Question: How do I water a cactus?\nAnswer:",
    instruction="Answer the following question the way a pirate speaks.",
    recipe=Recipe(rank=2, alpha=4, targets=("gate_proj", "up_proj", "down_proj"), steps=100, rate=1e-3),
    make=make,
    score=score,
    measures={"voice": "at least two different pirate words in the answer"},
    limit=64,
    tests=100,
)
