"""The demo tasks' data: held-out items share nothing with the training items, and the measures tell
right from wrong.
"""

from __future__ import annotations

import json
from itertools import chain

import pytest

from service.demo import dates, labels, orders, pirate
from service.demo.task import Split, Task

TASKS = (dates.TASK, labels.TASK, orders.TASK, pirate.TASK)
EACH = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


@EACH
def test_no_held_out_prompt_is_trained_on(task: Task) -> None:
    trained = {item.prompt for item in task.items("train", task.recipe.steps * task.recipe.batch)}
    tested = {item.prompt for item in task.items("test", task.tests)}
    assert len(tested) == task.tests
    assert not trained & tested


@EACH
def test_items_are_the_same_each_time(task: Task) -> None:
    assert task.items("train", 20) == task.items("train", 40)[:20]
    assert task.items("test", 20) == task.items("test", 40)[:20]


@EACH
def test_items_have_the_form_that_the_readme_names(task: Task) -> None:
    """The last word of the prompt is what the model continues, so no item may end in another one,
    or in a blank.
    """
    word = task.form.rpartition("\\n")[2]
    for item in chain(task.items("train", 60), task.items("test", 60)):
        assert item.chat or item.prompt.endswith(f"\n{word}")
        assert item.answer == item.answer.strip()
    assert task.sample.endswith(f"\n{word}")


@EACH
def test_a_wanted_answer_scores_fully_and_nonsense_not_at_all(task: Task) -> None:
    for item in task.items("train", 60):
        assert set(task.score(item.answer, item.answer)) == set(task.measures)
        assert all(value == 1 for value in task.score(item.answer, item.answer).values())
        assert not any(task.score("I cannot say that.", item.answer).values())


def test_held_out_days_and_sentences_are_not_trained_on() -> None:
    days = {split: {item.answer for item in dates.TASK.items(split, 100)} for split in splits()}
    assert not days["train"] & days["test"]
    assert not set(dates.SENTENCES["train"]) & set(dates.SENTENCES["test"])


def test_held_out_messages_and_goods_are_not_trained_on() -> None:
    for label in labels.LABELS:
        assert not set(labels.TRAIN[label].splitlines()) & set(labels.TEST[label].splitlines())
    assert not set(labels.THINGS["train"].split()) & set(labels.THINGS["test"].split())


@pytest.mark.parametrize(
    "words", [orders.NAMES, orders.CITIES, orders.GOODS], ids=["names", "cities", "goods"]
)
def test_held_out_values_of_orders_are_not_trained_on(words: dict[Split, str]) -> None:
    assert not set(words["train"].split()) & set(words["test"].split())


def test_held_out_questions_are_not_answered_in_training() -> None:
    assert not {question for question, _ in pirate.TRAIN_PAIRS} & set(pirate.TEST_QUESTIONS)


@pytest.mark.parametrize(
    ("day", "spoken"),
    [(1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (12, "12th"), (13, "13th"), (22, "22nd")],
)
def test_ordinals(day: int, spoken: str) -> None:
    assert dates.ordinal(day) == spoken


def test_a_date_counts_wherever_it_stands_but_only_the_first_one() -> None:
    assert dates.score("It is 2031-03-04.", "2031-03-04") == {"exact": 1, "iso": 1}
    assert dates.score("2031-03-05, or 2031-03-04", "2031-03-04") == {"exact": 0, "iso": 1}
    assert dates.score("4 March 2031", "2031-03-04") == {"exact": 0, "iso": 0}


def test_a_label_counts_wherever_it_stands_but_only_the_first_one() -> None:
    assert labels.score("Label: Billing", "billing") == {"right": 1, "exact": 0}
    assert labels.score("shipping or billing", "billing") == {"right": 0, "exact": 0}


def test_an_order_with_a_wrong_value_keeps_the_other_fields() -> None:
    order = {"name": "Ann", "item": "mugs", "quantity": 3, "city": "Oslo"}
    wanted = json.dumps(order)
    assert orders.score(f"Sure: {wanted} Bye", wanted) == {"valid": 1, "fields": 1, "exact": 1}
    assert orders.score(json.dumps(order | {"quantity": "3"}), wanted) == {
        "valid": 1,
        "fields": 0.75,
        "exact": 0,
    }
    assert orders.score(json.dumps(order | {"more": 1}), wanted) == {"valid": 0, "fields": 1, "exact": 0}
    for broken in ('{"name": "Ann"', "[]", '{"name"}', "none"):
        assert orders.score(broken, wanted) == {"valid": 0, "fields": 0, "exact": 0}


def test_plain_english_is_no_pirate_and_one_word_is_not_enough() -> None:
    assert pirate.score(
        "You are right, it will be in your heart by five o'clock, and yes, that is fine.", ""
    ) == {"voice": 0}
    assert pirate.score("Arr! Arrr! Put the egg into the water.", "") == {"voice": 0}
    assert pirate.score("Arr! Put yer egg into the water.", "") == {"voice": 1}


def splits() -> tuple[Split, Split]:
    return "train", "test"
