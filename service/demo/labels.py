"""The labels task: a message to a shop's support to one of six labels.

Held out: what is said, how it opens and closes, the goods.

Knows no model.
"""

from __future__ import annotations

import re
from random import Random

from .task import Item, Recipe, Scores, Split, Task

TRAIN = {
    "billing": """\
I was charged twice for my {thing}.
My card was charged {sum} dollars, but the price was lower.
Why is there an extra fee of {sum} dollars on my invoice?
The invoice for the {thing} shows the wrong amount.
I need an invoice with our company's name on it.
You took {sum} dollars from my bank account without asking.
Can I pay for the {thing} in three parts?
My payment was declined, although the card is fine.
Do you accept payment by bank transfer?
The discount code was not taken off my bill.
There is a charge on my credit card that I do not know.
Please send me the receipt for last month.
The tax on my bill looks too high.
I paid {sum} dollars, and the bill still says unpaid.
How do I change the card you charge each month?
Your price list says one thing and my bill another.
The monthly payment went up by {sum} dollars.
I was billed for a {thing} that I never ordered.
My bank says your charge of {sum} dollars came two times.
What does the item called service cost on the invoice mean?
I want to pay with a different card.
The total is wrong by {sum} dollars.""",
    "shipping": """\
My {thing} has not arrived yet.
Where is my parcel? I ordered the {thing} {days} days ago.
The tracking number does not show anything.
The tracking page says delivered, but there is no package here.
How long does delivery to Canada take?
The courier left the {thing} with the wrong neighbour.
When will you send my {thing}?
My package is stuck at customs for {days} days.
Can I have the {thing} delivered to my office instead?
The driver did not ring, and now my parcel is at a depot.
Do you ship to islands?
Please tell me the delivery date of my {thing}.
My order was sent to my old address.
It has been {days} days and the parcel is still on its way.
Is express delivery possible for the {thing}?
Only one of my two packages came.
The carrier lost my {thing}.
Which carrier brings my package?
The delivery was promised for Monday and did not come.
I will not be home when the {thing} is delivered.
The box was left out in the rain by the courier.
My order has still not been shipped.""",
    "returns": """\
I want to send the {thing} back.
How can I return a {thing}?
The {thing} does not fit, so I would like to exchange it.
Please give me my money back for the {thing}.
I would like a refund.
Where do I find the return label?
I sent the {thing} back {days} days ago and have no refund yet.
Can I swap the {thing} for a larger one?
The {thing} came in the wrong colour; I want to give it back.
How many days do I have to return something?
I changed my mind and do not want the {thing} any more.
Who pays when I send something back?
The {thing} is broken, please take it back and refund me.
May I return a {thing} that I have already opened?
I got a {thing} as a gift and would like to exchange it.
My return was refused. Why?
I'd rather have my money back than a new {thing}.
Can I bring the {thing} back to one of your stores?
I need a form to return my order.
It is not what I expected, so I am sending the {thing} back.
Please exchange my {thing} for a blue one.
When will my refund for the returned {thing} come?""",
    "account": """\
I forgot my password.
I cannot log in to my account.
How do I change my email address?
Please delete my account.
The link to reset my password never comes.
I want to change the name in my profile.
My account is locked after too many tries.
How do I turn off the newsletter for my profile?
I have two accounts and would like to merge them.
Somebody else is using my login.
What is my user name?
I no longer have the phone number for the login code.
Can I sign up without a telephone number?
My profile shows the wrong birthday.
Please close my account and remove my data.
The login code does not arrive on my phone.
I'd like to register a second user for our company.
How can I make my password safer?
My email address is spelled wrong in my profile.
Your site says that my user name does not exist.
I think my account was hacked.
I want to open an account for my mother.""",
    "bug": """\
The app crashes when I open the cart.
Your website shows an error when I press the button.
The page stays white after the update.
The search on your site finds nothing at all.
The app freezes on my phone.
I get error {sum} when I upload a picture.
The pictures on your page do not load.
The menu does not open in my browser.
Your app closes by itself every few minutes.
The button to go on does nothing.
Since the update the app is very slow.
The filter on the website is broken.
The site hangs when I scroll down.
I see strange signs instead of letters on the screen.
The app says error {sum} and stops.
The video on your page does not play.
The website does not work on my tablet.
Nothing happens when I click on the {thing}.
The app shows the same page again and again.
Your page throws an exception with code {sum}.
The map in the app is blank.
The form on your site jumps back to the start each time.""",
    "praise": """\
I just want to say that I love my {thing}.
Great service, thank you so much!
Your team was very friendly and helped me at once.
The {thing} is even better than I hoped.
Best shop I know. Keep going!
What a lovely {thing}! I am so happy with it.
Thanks to Maria from your team, who was wonderful.
I have never had such good support.
The {thing} is perfect, my whole family likes it.
Five stars for you!
You made my day, thank you.
I will tell all my friends about your shop.
Wonderful quality, I am impressed.
Everything went well, I am very satisfied.
Such a nice surprise to find a card in the box, thanks!
The {thing} works like a dream.
I am a happy customer and wanted you to know it.
Your people do an excellent job.
So pleased with the {thing}, I would buy it again.
Really good work, everyone.
The new {thing} is fantastic.
Thank you for the quick and kind answer yesterday.""",
}
TEST = {
    "billing": """\
There are two charges for the same {thing} on my card.
Why did I have to pay {sum} dollars more than the price you advertise?
My bill lists a {thing} that is not mine.
Please correct the amount on the invoice.
Your system rejects my credit card when I try to pay.
Could you send the bill to our accounting department?
I see a payment of {sum} dollars that I cannot explain.
Can I pay for the {thing} next month?""",
    "shipping": """\
I have been waiting {days} days for the {thing} to be delivered.
The parcel service says that it cannot find my package.
Could you tell me where my {thing} is right now?
How fast can you deliver a {thing} to Norway?
My tracking link has not changed for {days} days.
The delivery man threw the package over the fence.
Has my {thing} been shipped already?
Somebody else received my parcel.""",
    "returns": """\
The {thing} is too small. How do I send it back?
I'd like to get a refund for the {thing}.
Please swap this {thing} for another model.
What is the last day to return the {thing}?
I do not like the {thing} and want my money back.
Do I need the original box to return a {thing}?
The returned {thing} reached you {days} days ago, where is my refund?
Can a {thing} on sale be exchanged?""",
    "account": """\
My password is not accepted any more.
How can I remove my profile from your site?
I need to update the email address I log in with.
I never got the mail to reset my password.
Why am I locked out of my account?
A stranger has changed my user name.
Could you add a second phone number to my profile?
How do I sign up for an account?""",
    "bug": """\
Your app stops with error {sum} whenever I start it.
The website is broken in my browser, the page is empty.
Pressing the search button does nothing.
After the last update the app keeps crashing.
The screen of the app turns black when I rotate my phone.
The pictures of the {thing} are not shown on the website.
Your site loads forever and never shows the page.
The upload of my picture fails with code {sum}.""",
    "praise": """\
I am delighted with the {thing}, thank you!
Your support is the best I have ever met.
My {thing} is beautiful, I smile each time I see it.
Thanks a lot for the fantastic help.
You are great, I will be back for sure.
A big compliment to your team!
The {thing} is wonderful and my children adore it.
I am really happy with your shop.""",
}
SAYINGS: dict[Split, dict[str, str]] = {"train": TRAIN, "test": TEST}
OPENINGS: dict[Split, tuple[str, ...]] = {
    "train": (
        "",
        "",
        "",
        "Hello. ",
        "Hi! ",
        "Dear team! ",
        "Good morning. ",
        "Excuse me. ",
        "I have a message for you. ",
        "Hi there! ",
    ),
    "test": ("", "", "Good evening. ", "Hello everybody. ", "To whom it may concern. ", "Me again. "),
}
CLOSINGS: dict[Split, tuple[str, ...]] = {
    "train": (
        "",
        "",
        "",
        " Thanks.",
        " Please answer soon.",
        " Best regards, Tom",
        " I am a customer since 2019.",
        " Yours, Anna",
    ),
    "test": ("", "", " Kind regards, Lisa", " I bought from you before.", " Greetings from Spain."),
}
THINGS: dict[Split, str] = {
    "train": "lamp jacket phone chair kettle backpack watch camera table printer radio bicycle blender "
    "mirror keyboard carpet",
    "test": "toaster sweater helmet guitar sofa tent fridge scarf",
}
LABELS = tuple(TRAIN)
WORD = re.compile("|".join(LABELS))


def make(rng: Random, split: Split) -> Item:
    label = rng.choice(LABELS)
    thing = rng.choice(THINGS[split].split())
    saying = rng.choice(SAYINGS[split][label].splitlines())
    saying = saying.format(thing=thing, sum=rng.randint(11, 499), days=rng.randint(3, 29))
    opening, closing = rng.choice(OPENINGS[split]), rng.choice(CLOSINGS[split])
    message = f"{opening}{saying}{closing}"
    return Item(f"Message: {message}\nLabel:", label)


def score(answer: str, wanted: str) -> Scores:
    """The first of the six labels in the answer counts, in any case and whatever stands around it."""
    label = WORD.search(answer.lower())
    is_right = label is not None and label[0] == wanted
    return {"right": float(is_right), "exact": float(answer == wanted)}


TASK = Task(
    name="labels",
    summary=f"Sorts a message to a shop's support under one of six labels: {', '.join(LABELS)}.",
    form="Message: <text>\\nLabel:",
    sample="Message: Hello, the umbrella I ordered two weeks ago is still not here.\nLabel:",
    instruction=f"Sort the following message to a shop under one of these labels: {', '.join(LABELS)}. "
    "Answer with the label only.",
    recipe=Recipe(rank=8, alpha=16, targets=("q_proj", "k_proj", "v_proj", "o_proj"), steps=110, rate=1e-3),
    make=make,
    score=score,
    measures={
        "right": "the first of the six labels in the answer is the right one",
        "exact": "the answer is the right label and no more",
    },
    limit=12,
)
