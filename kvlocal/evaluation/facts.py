"""Facts that a person may tell of themselves, ways to tell them and to ask for them, and values to choose from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """One fact without its value.

    kind: what sort of value it has
    about: what the user calls it, as "my locker number"
    statements: what the user may say, with {about}, {About} and {value}
    verb: between what it is about and the value, "is", "is the" or "is on"
    values: all that it may have; no other kind has any of them
    """

    kind: str
    about: str
    statements: tuple[str, ...]
    verb: str
    values: tuple[str, ...]

    def say(self, text: str, **values: str) -> str:
        """A text of this module about this topic."""
        return text.format(about=self.about, About=_capitalised(self.about), verb=self.verb, **values)

    @property
    def lead(self) -> str:
        """How an answer begins, up to the value."""
        return f"{_capitalised(self.about.replace('my ', 'your '))} {self.verb}"

    @property
    def questions(self) -> tuple[str, ...]:
        """What the user may ask, with {about}."""
        return _QUESTIONS_OF_DATES if self.kind == "date" else _QUESTIONS


CORRECTIONS = (
    "I told you that {about} {verb} {old}. That was wrong, it is actually {value}.",
    "Sorry, I made a mistake before: {about} {verb} {value}, not {old}.",
    "I need to correct something I said: {about} {verb} {value} and not {old}.",
    "Please forget that {about} {verb} {old}. I checked, and the right answer is {value}.",
)

_QUESTIONS = (
    "What is {about}?",
    "Can you tell me again what {about} is?",
    "Do you remember what I said {about} is?",
    "I forgot what {about} is. What did I tell you?",
    "Going back to what I told you earlier: what is {about}?",
    "One more question. What is {about}?",
)
_QUESTIONS_OF_DATES = (
    "When is {about}?",
    "Can you tell me again when {about} is?",
    "Do you remember on which day {about} is?",
    "I forgot the date of {about}. When is it?",
)

ACKNOWLEDGMENTS = (
    "Thank you for telling me, I will keep that in mind.",
    "Noted.",
    "Got it, I will remember that.",
    "Understood.",
    "Thanks, that is good to know.",
    "All right, I have made a note of it.",
    "Okay, I will remember it.",
    "That is helpful to know, thank you.",
    "Sure, I will keep it in mind for later.",
    "I see. Thanks for letting me know.",
)

_PLAIN = (
    "By the way, {about} {verb} {value}.",
    "Something you should know: {about} {verb} {value}.",
    "Please remember this for later. {About} {verb} {value}.",
    "Before I forget it, {about} {verb} {value}. I may ask you about it.",
    "I want to tell you that {about} {verb} {value}.",
    "{About} {verb} {value}, in case it comes up again.",
)


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.replace("\n", ",").split(",") if word.strip())


def _topics(kind: str, about: str, values: tuple[str, ...], statements: tuple[str, ...] = (), verb: str = "is") -> tuple[Topic, ...]:
    return tuple(Topic(kind, thing, _PLAIN + statements, verb, values) for thing in _words(about))


_NAMES = _words("""
    Agnes, Alma, Anton, Astrid, Beatrix, Benno, Bruno, Camille, Cedric, Clement, Conrad, Dagmar, Delia, Dorian, Edith, Elena, Emil,
    Esther, Fabian, Felix, Flora, Frieda, Gideon, Greta, Gustav, Hanna, Hector, Helga, Hugo, Ines, Ingrid, Irma, Ivan, Jasmin,
    Joachim, Jonas, Judith, Kamil, Karin, Katrin, Lambert, Leonie, Lionel, Lydia, Magnus, Manuel, Marta, Matilda, Mirko, Nadia,
    Nestor, Nora, Olga, Oscar, Otto, Pablo, Paula, Quentin, Ralf, Ramona, Rita, Roland, Rosalie, Rufus, Sabine, Selma, Silvio, Sonja,
    Sven, Tamara, Thea, Tobias, Ursula, Valeria, Vera, Viktor, Wanda, Werner, Yvonne, Zita""")

_PETS = _words("""
    Biscuit, Bramble, Button, Captain, Domino, Fidget, Freckles, Gizmo, Hazel, Jellybean, Lollipop, Marbles, Mittens, Muffin, Noodle,
    Nugget, Paprika, Patches, Peanut, Pebbles, Pickle, Pippin, Pretzel, Pudding, Puzzle, Rascal, Scruffy, Smudge, Sparkle, Snowball,
    Socks, Sprout, Tango, Toffee, Truffle, Tumble, Twiggy, Waffles, Whiskers, Zigzag""")

_CITIES = _words("""
    Aberdeen, Adelaide, Antwerp, Athens, Auckland, Basel, Belgrade, Bergen, Bilbao, Bologna, Bratislava, Bristol, Bucharest, Calgary,
    Cardiff, Casablanca, Copenhagen, Cork, Dakar, Dresden, Dublin, Geneva, Ghent, Granada, Graz, Hamburg, Helsinki, Innsbruck,
    Istanbul, Krakow, Leipzig, Lima, Lisbon, Ljubljana, Lyon, Malmo, Marseille, Milan, Montreal, Nairobi, Naples, Oslo, Osaka, Ottawa,
    Palermo, Porto, Prague, Quito, Riga, Rotterdam, Salzburg, Santiago, Seattle, Seville, Sofia, Strasbourg, Tallinn, Toronto,
    Trieste, Turin, Utrecht, Valencia, Venice, Vienna, Vilnius, Warsaw, Wellington, Zagreb, Zurich""")

_CODE_WORDS = _words("""
    accordion, almanac, anvil, barnacle, bobbin, bonfire, buckle, candelabra, cinnamon, cobweb, compass, corduroy, driftwood, dynamo,
    eggshell, emerald, feather, flagpole, gargoyle, gondola, hammock, harpoon, hourglass, icicle, jigsaw, juniper, kettle, ladder,
    lantern, locket, magnet, mandolin, marigold, monocle, nutmeg, oyster, paddle, parasol, pendulum, porcupine, quartz, quiver,
    saddle, sandstone, sapphire, scarecrow, snorkel, spindle, sundial, tambourine, telescope, thimble, trampoline, turnip, umbrella,
    velvet, walnut, weathervane, windmill, zeppelin""")

_DRINKS = _words("""
    black coffee, buttermilk, chamomile tea, cherry juice, cider, cocoa, elderflower lemonade, espresso, ginger ale, grape juice,
    green tea, hot chocolate, iced tea, lemonade, mango lassi, mulled wine, oat milk, orange juice, peppermint tea, pineapple juice,
    rooibos tea, tomato juice, tonic water, root beer""")
_DISHES = _words("""
    baked beans, beef stew, carrot soup, cheese fondue, chicken curry, chili, couscous, dumplings, fish pie, fried rice, gnocchi,
    goulash, lasagna, lentil soup, meatballs, mushroom risotto, omelette, onion soup, paella, pancakes, potato salad, pumpkin soup,
    ratatouille, ravioli, spinach pie, stuffed peppers, sushi, tacos""")
_COLOURS = _words("""
    amber, beige, burgundy, coral, crimson, cyan, gold, indigo, ivory, khaki, lavender, lilac, magenta, maroon, mint green, navy blue,
    olive green, orange, pink, purple, scarlet, silver, turquoise, violet, yellow""")
_INSTRUMENTS = _words("""
    bagpipes, banjo, bassoon, cello, clarinet, cymbals, drums, flute, guitar, harmonica, harp, oboe, organ, piano, saxophone, sitar,
    trombone, trumpet, tuba, ukulele, viola, violin, xylophone""")
_SPORTS = _words("""
    archery, badminton, baseball, basketball, bowling, boxing, canoeing, climbing, cricket, curling, cycling, fencing, golf,
    gymnastics, handball, hockey, judo, rowing, rugby, sailing, skating, skiing, snooker, squash, surfing, swimming, table tennis,
    tennis, volleyball, wrestling""")
_FLOWERS = _words("""
    azalea, begonia, bluebell, buttercup, camellia, carnation, chrysanthemum, crocus, daffodil, dahlia, daisy, foxglove, gardenia,
    geranium, hibiscus, hyacinth, hydrangea, iris, jasmine, lily, lotus, magnolia, orchid, pansy, peony, petunia, primrose, rose,
    snowdrop, sunflower""")

_JOBS = _words("""
    accountant, architect, baker, beekeeper, bricklayer, bus driver, butcher, carpenter, chemist, clockmaker, cook, detective,
    electrician, farmer, firefighter, fisherman, florist, gardener, glassblower, goldsmith, journalist, judge, lawyer, librarian,
    locksmith, mechanic, midwife, miner, nurse, optician, pharmacist, photographer, pilot, plumber, postman, potter, sailor, sculptor,
    shoemaker, surgeon, surveyor, tailor, translator, veterinarian, waiter, welder""")

_MONTHS = _words("January, February, March, April, May, June, July, August, September, October, November, December")
_DATES = tuple(f"{month} {day}" for month in _MONTHS for day in range(2, 29))

# four digits that are no year
_NUMBERS = tuple(str(number) for number in range(2113, 9973, 37))

TOPICS: tuple[Topic, ...] = (
    *_topics(
        "name",
        "the name of my sister, the name of my brother, the name of my cousin, the name of my neighbour, the name of my dentist, "
        "the name of my landlord, the name of my piano teacher, the name of my boss, the name of my aunt, the name of my best friend, "
        "the name of my grandmother, the name of my flatmate",
        _NAMES,
    ),
    *_topics(
        "pet",
        "the name of my cat, the name of my dog, the name of my parrot, the name of my rabbit, the name of my tortoise, "
        "the name of my pony, the name of my hamster, the name of my goat",
        _PETS,
        ("You would like our newest family member. {About} {verb} {value}.",),
    ),
    *_topics(
        "place",
        "my birthplace, my home town, my favourite city, the place of my next holiday, the city of my first job, the city of my university, "
        "the town of my grandparents, the place of my honeymoon",
        _CITIES,
    ),
    *_topics(
        "number",
        "my locker number, the code of my bicycle lock, my library card number, the number of my parking space, the PIN of my old phone, "
        "my employee number, the number of my storage unit, the code of my front door",
        _NUMBERS,
        ("I always mix up my numbers. {About} {verb} {value}.",),
    ),
    *_topics(
        "date",
        "my dentist appointment, the wedding of my cousin, my driving test, my move to the new flat, my statistics exam, my flight home, "
        "the birthday of my daughter, the concert of my choir",
        _DATES,
        ("I have just looked into my calendar. {About} {verb} {value}.",),
        "is on",
    ),
    *_topics("preference", "my favourite drink", _DRINKS),
    *_topics("preference", "my favourite dish", _DISHES),
    *_topics("preference", "my favourite colour", _COLOURS),
    *_topics("preference", "my favourite instrument", _INSTRUMENTS, verb="is the"),
    *_topics("preference", "my favourite sport", _SPORTS),
    *_topics("preference", "my favourite flower", _FLOWERS, verb="is the"),
    *_topics(
        "code word",
        "the code word of my team, my guest password, the secret word of my club, the name of my secret project, "
        "the code word for my garage, the password of my diary",
        _CODE_WORDS,
        ("Keep this between us. {About} {verb} {value}.",),
    ),
    *_topics(
        "job",
        "the profession of my uncle, the profession of my father, the profession of my mother, the profession of my neighbour, "
        "the profession of my best friend, the old job of my grandfather",
        _JOBS,
    ),
)
