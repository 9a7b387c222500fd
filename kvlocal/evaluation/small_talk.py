"""Talk about everyday things, made from templates, to stand between what matters in a chat."""

from __future__ import annotations

import random
from collections.abc import Iterator

_THINGS = (
    ("a vegetable garden", "the soil"), ("a bicycle", "the chain"), ("sourdough bread", "the dough"), ("a wooden table", "the surface"),
    ("a small aquarium", "the water"), ("a winter coat", "the lining"), ("a home office", "the desk"), ("a birthday party", "the guest list"),
    ("a weekend hike", "the route"), ("a budget for the month", "the list of expenses"), ("an old laptop", "the battery"),
    ("a balcony full of herbs", "the pots"), ("a short film", "the script"), ("a study plan", "the timetable"), ("a camping trip", "the tent"),
    ("a bookshelf", "the wall behind it"), ("a cup of good coffee", "the grind"), ("a sewing machine", "the needle"),
    ("a rainwater barrel", "the lid"), ("a hand-written letter", "the opening line"), ("a compost heap", "the balance of wet and dry material"),
    ("a family photo album", "the order of the pictures"), ("a garden pond", "the depth"), ("a neighbourhood newsletter", "the headline"),
    ("a kitchen knife", "the edge"), ("a puppet theatre", "the curtain"),
)  # fmt: skip

_QUESTIONS = (
    "How do I get started with {thing}?",
    "What do people usually get wrong about {thing}?",
    "Could you give me some advice on {thing}?",
    "What would you look at first when it comes to {thing}?",
    "How much time should I plan for {thing}?",
    "Is it worth spending money on {thing}?",
    "What is the easiest way to improve {thing}?",
    "Can you explain what makes {thing} work well?",
    "What should I do about {thing} before the weekend?",
    "How would you describe {thing} to a child?",
)

_OPENINGS = (
    "That is a good question.", "Happy to help with that.", "There are a few things to keep in mind.", "It depends on what you have already.",
    "Let me think about it step by step.", "Many people ask about this.", "The short answer is that patience pays off.", "Of course.",
)  # fmt: skip

_SENTENCES = (
    "Start with {part}, because everything else follows from it.",
    "A common mistake is to rush and to forget about {part}.",
    "You do not need expensive tools, and what you have at home is often enough.",
    "Set aside a quiet hour and write down what you want to reach.",
    "Once you have taken care of {part}, the rest becomes much easier.",
    "It helps to look at how others have done it and to borrow what you like.",
    "Check {part} again after a few days and make small changes.",
    "If something does not work at once, change only one thing at a time.",
    "Try it on a small scale first, so that a mistake costs little.",
    "Many people enjoy it more when they do it together with a friend.",
    "Take a photo before you begin, so that you can see the progress later.",
    "Do not worry if you are not happy with {part} in the beginning.",
    "With {thing}, a little care every week is better than a lot of work once a year.",
    "Ask somebody with experience to have a look at {part}.",
    "In most cases it takes about as long as cooking a good meal.",
    "The result depends more on {part} than on anything you can buy.",
    "When you are done, clean up right away and put everything back in its place.",
    "There is no single right way, so choose the one that suits you.",
)


def small_talk(rng: random.Random) -> Iterator[tuple[str, str]]:
    """User turns and answers without end; none of the questions comes twice before all of them came."""
    pairs = [(question, thing, part) for question in _QUESTIONS for thing, part in _THINGS]
    while True:
        rng.shuffle(pairs)
        for question, thing, part in pairs:
            sentences = [rng.choice(_OPENINGS), *rng.sample(_SENTENCES, rng.randint(2, 5))]
            yield question.format(thing=thing), " ".join(sentences).format(thing=thing, part=part)
