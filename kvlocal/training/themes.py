"""What seeded dialogues are about: subjects, requests, tasks, roles, and facts with the ways to tell them and to ask for them."""

from __future__ import annotations

from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.replace("\n", ",").split(",") if word.strip())


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.splitlines() if line.strip())


SUBJECTS = _words("""
    volcanoes, black holes, photosynthesis, the water cycle, earthquakes, the human heart, vaccines, sleep, memory, gravity, magnets,
    electricity, light, sound, rainbows, lightning, glaciers, deserts, coral reefs, rainforests, the deep sea, tides, the moon, Mars,
    comets, satellites, rockets, telescopes, dinosaurs, fossils, whales, dolphins, sharks, octopuses, penguins, owls, eagles, bats,
    bees, ants, butterflies, spiders, wolves, bears, elephants, horses, cats, dogs, snakes, frogs, mushrooms, trees, roses, grass,
    DNA, bacteria, viruses, the brain, the immune system, teeth, muscles, bones, vitamins, sugar, salt, bread, cheese, chocolate, coffee,
    tea, wine, pasta, rice, potatoes, tomatoes, apples, bananas, spices, soup, pizza, barbecue, baking, breakfast, street food,
    the Roman Empire, ancient Egypt, the Middle Ages, the Renaissance, the French Revolution, the Industrial Revolution, the Silk Road,
    the Vikings, samurai, pirates, castles, pyramids, cathedrals, the printing press, steam engines, the telegraph, the telephone, radio,
    television, cinema, photography, computers, the internet, smartphones, video games, chess, crossword puzzles, card games, board games,
    football, marathons, swimming pools, yoga, hiking, camping, fishing, cycling, skiing, sailing, surfing, dancing, ballet, opera, jazz,
    rock music, the violin, the piano, drums, singing, poetry, novels, fairy tales, science fiction, detective stories, comics, theatre,
    painting, sculpture, pottery, knitting, sewing, woodworking, gardening, houseplants, compost, beekeeping, chickens, farming,
    tractors, bridges, tunnels, skyscrapers, lighthouses, trains, ships, submarines, aeroplanes, helicopters, bicycles, electric cars,
    traffic, public transport, airports, hotels, museums, libraries, schools, universities, homework, exams, teachers, job interviews,
    meetings, remote work, teamwork, leadership, salaries, taxes, banks, inflation, insurance, saving money, online shopping, advertising,
    small businesses, start-ups, startups' funding, customer service, contracts, elections, democracy, courts, human rights,
    the United Nations,
    maps, languages, alphabets, translation, proverbs, etiquette, weddings, birthdays, holidays, festivals, gifts, friendship, family,
    parenting, neighbours, loneliness, stress, anger, happiness, habits, motivation, meditation, procrastination, time management,
    public speaking, writing letters, diaries, blogs, newspapers, fake news, social media, privacy, passwords, machine learning, robots,
    programming, databases, encryption, spreadsheets, statistics, probability, fractions, geometry, algebra, prime numbers, infinity,
    philosophy, ethics, logic, psychology, sociology, archaeology, economics, chemistry, the periodic table, acids, metals, gold, diamonds,
    glass, plastic, paper, recycling, climate change, solar power, wind power, nuclear power, batteries, oil, rivers, lakes, mountains,
    islands, caves, winter, spring, summer, autumn, storms, fog, snow, clouds, weather forecasts, clocks, calendars, time zones""")

# {s} is a subject
QUESTIONS = _lines("""
    What is the most interesting thing about {s}?
    Can you explain {s} in simple words?
    Tell me something surprising about {s}.
    Why do people care about {s}?
    Give me five facts about {s}.
    What should a beginner know about {s}?
    How would you teach a child about {s}?
    What are the advantages and disadvantages of {s}?
    I want to learn more about {s}. Where should I start?
    Write a short poem about {s}.
    Write a short story about {s}.
    Make a list of ten words that have to do with {s}.
    What are common misunderstandings about {s}?
    Describe {s} in three sentences.
    Write a quiz with three questions about {s}, and give the answers.
    What did people think about {s} a hundred years ago?
    How might {s} change in the next fifty years?
    Write the opening paragraph of an essay about {s}.
    Suggest a good title for a talk about {s}.
    What is the connection between {s} and everyday life?
    Who are the most important people in connection with {s}?
    Write a funny dialogue between two friends who talk about {s}.
    Summarize the history of {s}.
    What questions could I ask an expert on {s}?
    Give me an analogy that explains {s}.
    Draft a short blog post about {s}.
    What is the difference between {s} and {t}?
    Which is more important, {s} or {t}, and why?
    Write a story in which both {s} and {t} play a part.
    Plan a lesson of 30 minutes about {s}.
    Come up with three project ideas that have to do with {s}.
    Write a haiku about {s} and another one about {t}.
    Is there any science behind {s}?
    What books would you recommend to someone who likes {s}?
    Write a product description for a game about {s}.
""")

# The user goes on in the model's words.
OPENINGS = _lines("""
    I have been thinking about {s} lately,
    I have a question about {s}:
    I am writing an article about {s} and
    My daughter asked me about {s}, and
    Yesterday I read that {s}
    I don't understand {s}.
    My favourite thing about {s} is
    Can you help me with {s}? I
    I disagree with people who say that {s}
    We are learning about {s} at school.
    Let's talk about {s}.
    I need some ideas about {s} for
    What do you think about {s}? I
    Everyone in my family loves {s}, but
    I would like to know how {s}
    A friend told me a story about {s}.
    For my job I have to know about {s}.
    When it comes to {s},
    I am planning a weekend that has to do with {s}.
    I used to hate {s}, but
    Here is a short text about {s}:
    Could you check this sentence about {s}? "
    Imagine a world without {s}.
    Compare {s} with
    In a discussion about {s}, someone said
""")

CODE = _lines("""
    Write a Python function that reverses a string.
    Write a Python function that checks whether a number is prime.
    How do I read a CSV file in Python?
    Write a function that counts the vowels in a text.
    How do I sort a list of dictionaries by a key in Python?
    What is the difference between a list and a tuple in Python?
    Write a JavaScript function that adds up the numbers in an array.
    Show me a for loop in C that prints the numbers from 1 to 10.
    Write an SQL query that finds the ten most expensive products.
    How do I center a div with CSS?
    Explain recursion with a small example in code.
    Write a regular expression that matches an email address.
    Write a bash command that finds all files larger than 10 MB.
    What does this code do? for i in range(0, 10, 2): print(i * i)
    Why does my Python program say "IndexError: list index out of range"?
    Write a class for a bank account with deposit and withdraw.
    How do I merge two dictionaries in Python?
    Write a function that converts Celsius to Fahrenheit.
    How do I make a copy of a git branch?
    Write a function that removes duplicates from a list.
    Explain what an API is and show a small example of a request.
    Write a program that guesses a number between 1 and 100.
    How do I write a unit test in Python?
    Write a simple HTML page with a heading and a list.
    What is the time complexity of binary search, and why?
    Write a function for the Fibonacci numbers, then make it faster.
    How do I open a file and count its lines?
    Write a small program that rolls two dice and prints the sum.
    What is a pointer in C?
    How do I catch an exception in Java?
""")

# {a}, {b} and {c} are small numbers, {n} is a name
MATHS = _lines("""
    {n} has {a} apples and buys {b} more. Then {c} are eaten. How many are left?
    What is {a} times {b}? Show the steps.
    A train travels {a} kilometres in one hour. How far does it get in {b} hours?
    If a book costs {a} dollars and a pen costs {b} dollars, how much do {c} books and one pen cost?
    What is {a} percent of {b}00?
    A rectangle is {a} cm long and {b} cm wide. What is its area, and what is its perimeter?
    {n} is {a} years old, and her brother is {b} years older. How old will he be in {c} years?
    Solve the equation x + {a} = {b}{c}.
    I have {a} coins of 5 cents and {b} coins of 10 cents. How much money is that?
    A recipe for {a} people needs {b} eggs. How many eggs do I need for {c} times as many people?
    What is the average of {a}, {b} and {c}?
    {n} reads {a} pages a day. How long does a book of {b}{c} pages take?
    Round {a}.{b}{c} to one decimal place and explain how.
    What is the next number: {a}, {b}, {c}? Make up a rule.
    Divide {b}{c} by {a} and give the remainder.
""")

ROLES = _words("""
    a pirate captain, a medieval knight, a travel guide, a strict teacher, a friendly baker, a detective, an astronaut, a talking cat,
    a grumpy old wizard, a news reporter, a chef in a French restaurant, a time traveller, a robot that learns about feelings, a librarian,
    a football coach, a shopkeeper at a market, a king without a kingdom, a farmer, a museum guard, a job interviewer, a doctor,
    a lighthouse keeper, a dragon, a poet, a taxi driver, a ghost in an old house, a gardener, a spy, a mountain guide, a fortune teller""")

ROLE_PLAY = _lines("""
    Pretend that you are {r}. I come to you and ask for help.
    Let's play a game: you are {r}, and I am a stranger. You begin.
    Answer my next questions as {r} would.
    Write a monologue of {r} about {s}.
    You are {r}. Tell me about your day.
    Imagine an interview with {r} about {s}. Write three questions and answers.
    Write a letter from {r} to {q}.
    Invent a conversation between {r} and {q}.
""")

ADVICE = _lines("""
    I can't fall asleep at night. What can I do?
    How can I make new friends in a new city?
    I have a job interview tomorrow and I am nervous.
    My neighbour plays loud music every evening. How should I talk to him?
    How do I ask my boss for a raise?
    I want to eat healthier, but I have little time to cook.
    Help me plan a birthday party for a six-year-old.
    What should I pack for a week at the seaside?
    How do I remove a coffee stain from a white shirt?
    My plants keep dying. What am I doing wrong?
    I would like to start running. Can you make a plan for four weeks?
    How can I save money for a holiday?
    Write a polite email to my landlord about a broken heater.
    Write an email in which I decline an invitation.
    Help me write a short speech for the wedding of a friend.
    What is a good present for somebody who has everything?
    How do I learn vocabulary in a foreign language?
    I am always late. How can I change that?
    Should I rent or buy a flat?
    My friend is sad and I don't know what to say.
    What can I cook with eggs, spinach and potatoes?
    Give me a recipe for a simple cake.
    How do I clean a keyboard?
    What are good questions to ask on a first date?
    I have to move next month. Make a checklist for me.
    How do I prepare for a long flight?
    My phone's battery is empty after half a day. What can I try?
    I want to read more books. Any tips?
    How do I keep a dog busy on a rainy day?
    What is the best way to apologize?
    Plan a day trip for a family with two children.
    How can I remember names better?
    Write a cover letter for a job in a bookshop.
    How do I start a small vegetable garden?
    What should I do after a bicycle accident?
    Write a complaint about a train that was two hours late.
    Suggest three hobbies for someone who likes to be alone.
    How do I split the bill fairly among friends?
    I have too many things. How do I get rid of some of them?
    Make a weekly timetable for a student with a part-time job.
""")

SMALL_TALK = _lines("""
    Hi, how are you today?
    Good morning! I just woke up.
    Hello! Do you have a minute?
    What a day! I am so tired.
    Hey, I am bored. Entertain me.
    It is raining here again.
    I just came home from work.
    Guess what happened to me today.
    Hi there. I need to talk to someone.
    Good evening. I have had a strange day.
    Do you like music?
    What would you do with a free afternoon?
    I am drinking tea and looking out of the window.
    Tell me a joke.
    I feel great today!
    It is my day off, and I have no plans.
    Can I ask you something personal?
    My train is late, so let's chat.
    I am cooking dinner while we talk.
    Do you ever get tired of questions?
""")

TASKS = _lines("""
    Correct the mistakes in this sentence: "She don't like when the wheather are cold."
    Make this sentence more polite: "Send me the report now."
    Find three synonyms for the word "happy" and use each in a sentence.
    Put these words in alphabetical order: lemon, river, cloud, apple, stone, tiger.
    Translate "Good morning, how much is the bread?" into French and Spanish.
    Is this review positive or negative? "The food was cold, but the waiter was very kind."
    Rewrite this in the past tense: "He walks to the station and buys a newspaper."
    What is the opposite of brave, of early, and of narrow?
    Sort these into fruits and vegetables: carrot, plum, leek, cherry, cabbage, pear.
    Explain the saying "A rolling stone gathers no moss."
    Write an advertisement of two sentences for an umbrella.
    Finish this story: "The door was open, although nobody lived there."
    Give me a riddle, and tell me the answer.
    Name five countries that begin with the letter B.
    What rhymes with "light"? Write two lines that use such words.
    Turn this into a headline: "A small town has planted ten thousand trees in one weekend."
    Write a tongue twister with the letter S.
    Explain the difference between "affect" and "effect".
    Make up a name for a café, a hair salon and a pet shop.
    Write instructions for making a paper plane.
    Summarize this in one sentence: "The museum was closed for two years. It has a new roof and a larger garden. It opens again on Sunday."
    Write a dialogue at a ticket office.
    Which of these does not belong: hammer, saw, spoon, screwdriver? Explain.
    Invent a holiday and describe how people celebrate it.
    Describe a sunset to somebody who has never seen one.
""")

# How a later user turn may begin; the model goes on.
FOLLOW_UPS = (
    "Thanks!", "Thank you. Now", "Ok,", "Can you", "Could you give me an example of", "What about", "Why", "How", "And what if", "But",
    "Is it true that", "Tell me more about", "I still don't understand", "That's interesting.", "Great! Can you also", "What else",
    "Can you make it", "Please rewrite", "Which of these", "Give me another", "What would happen if", "How long", "Who", "Where can I",
    "Are there", "Do you think", "I am not sure about", "Let me ask you something else.", "In my case,", "Actually,", "Hmm,", "Wait,",
    "Could you explain", "So", "What do you mean by", "My problem is", "I tried", "Which one", "Summarize", "List", "Now write", "Should I",
    "If I", "What is the", "How can I", "Does", "Let's", "Please explain", "One more thing:", "I have", "I like", "And",
)  # fmt: skip

# How an answer to a mere statement begins.
THANKS = _lines("""
    Thanks for sharing that!
    Good to know.
    I have noted that.
    Thank you, I won't forget it.
    Got it.
    Alright, noted.
    Nice, thanks for the information.
    Great, thank you for telling me!
    OK, I've got that.
    Understood, thanks.
    Interesting!
    That's nice to hear.
    Sure, I'll remember.
    Of course. Is there anything I can do for you?
    Perfect. How can I help you with that?
    Thanks! What else would you like to talk about?
""")

CHANGES = _lines("""
    Let's change the subject.
    Something else:
    Now to another topic.
    By the way,
    Different question.
    OK, enough of that.
    Before I forget it:
    While we are at it:
    Next question.
    I have another question.
""")


@dataclass(frozen=True)
class FactKind:
    """One sort of fact.

    things: what it may be about, as the user calls it
    values: what it may be
    statements: what the user says, with {thing}, {Thing} and {v}
    questions: what the user asks later, with {thing}
    answers: what is right, with {thing} and {Thing} (the user's "my" is "your" there) and {v}
    """

    things: tuple[str, ...]
    values: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]


_FIRST = _words("""
    Aaron, Abigail, Ahmed, Aisha, Albert, Alice, Amara, Amir, Andrea, Angela, Arthur, Bella, Ben, Bianca, Boris, Brian, Carla, Carlos,
    Carol,
    Charlie, Chen, Chloe, Claire, Colin, Daniel, Daphne, David, Diego, Dina, Donna, Dylan, Eleanor, Eli, Elsa, Emma, Eric, Ethan, Eva,
    Faith,
    Farid, Fatima, Fiona, Frank, Gabriel, Gemma, George, Grace, Hannah, Harry, Hassan, Helen, Henry, Ian, Imani, Isaac, Isla, Jack, Jade,
    James,
    Jane, Jerome, Joan, Joel, Julia, Kai, Kate, Keiko, Kenji, Kim, Laila, Larry, Laura, Leo, Liam, Linda, Lucas, Lucy, Luis, Maria, Martin,
    Maya, Megan, Mei, Miguel, Mila, Mohammed, Mona, Nathan, Nina, Noah, Omar, Oliver, Patrick, Pedro, Penny, Peter, Priya, Rachel, Ravi,
    Rebecca,
    Rosa, Ryan, Samira, Samuel, Sara, Simon, Sophie, Stella, Tariq, Theo, Tina, Tom, Uma, Victor, Violet, Walter, Wendy, Xavier, Yara,
    Yusuf, Zoe""")
_LAST = _words("""
    Abbott, Baxter, Becker, Brennan, Castillo, Chandra, Chapman, Costa, Dalton, Duarte, Ellison, Farrell, Fischer, Fleming, Fontaine,
    Garner,
    Goldberg, Grant, Haddad, Hawkins, Holloway, Ibarra, Jensen, Kaplan, Keller, Kowalski, Larsen, Lindgren, Lowell, Marino, Mercer,
    Moreau, Nakamura,
    Novak, Okafor, Olsen, Osborne, Park, Petrov, Quinn, Ramsey, Rossi, Sandoval, Schwartz, Shaw, Silva, Tanaka, Thornton, Ueda, Vance, Vega,
    Walsh, Weaver, Whitfield, Winters, Yates, Zhang, Zimmerman""")
_PETS = _words("""
    Acorn, Bandit, Basil, Bear, Blossom, Bolt, Buster, Caramel, Chester, Clover, Coco, Comet, Cookie, Cosmo, Daisy, Dusty, Echo, Ember,
    Fudge, Ginger,
    Goose, Honey, Jasper, Kiwi, Lucky, Luna, Mango, Maple, Midnight, Milo, Misty, Nacho, Olive, Oreo, Pepper, Pluto, Pumpkin, Raisin,
    Rocket,
    Rusty, Sesame, Shadow, Simba, Sunny, Taco, Teddy, Thor, Tiger, Turbo, Willow, Ziggy""")
_PLACES = _words("""
    Amsterdam, Ankara, Austin, Bangkok, Barcelona, Beirut, Berlin, Bogota, Bombay, Boston, Brisbane, Brussels, Budapest, Buenos Aires,
    Cairo,
    Cape Town, Caracas, Chicago, Cologne, Damascus, Dallas, Delhi, Denver, Detroit, Dubai, Durban, Edinburgh, Florence, Frankfurt,
    Glasgow, Hanoi, Havana,
    Houston, Jakarta, Jerusalem, Johannesburg, Kyoto, Lagos, Leeds, Liverpool, London, Los Angeles, Lucerne, Madrid, Manchester, Manila,
    Melbourne,
    Mexico City, Miami, Minsk, Munich, Nantes, New Orleans, Nice, Paris, Perth, Philadelphia, Phoenix, Pisa, Portland, Reykjavik,
    Rio de Janeiro, Rome,
    San Diego, San Francisco, Seoul, Shanghai, Singapore, Stockholm, Stuttgart, Sydney, Tampa, Tokyo, Toulouse, Tunis, Vancouver, Verona,
    York""")
_SECRETS = _words("""
    anchor, apricot, asteroid, avalanche, bagel, bamboo, banjo string, biscuit tin, blizzard, blueberry, boomerang, brick wall,
    butterscotch, cactus,
    canyon, caterpillar, chandelier, cobalt, confetti, coconut, cricket bat, crystal, cyclone, dandelion, doorbell, dragonfly, eclipse,
    elbow,
    falcon, fiddle, firefly, flamingo, fountain, galaxy, giraffe, glacier, goldfish, granite, hedgehog, honeycomb, iceberg, igloo,
    jellyfish, kangaroo,
    labyrinth, lobster, meteor, mushroom soup, narwhal, nightingale, octagon, origami, pancake, papaya, peacock, pelican, pinecone,
    platypus, raspberry,
    rhubarb, rocking chair, saffron, satellite, seahorse, silver spoon, skylark, snowflake, starfish, stopwatch, tangerine, teapot,
    thunder, toadstool, tornado,
    tugboat, tulip, typewriter, volcano, waterfall, woodpecker, yo-yo, zebra""")
_JOBS = _words("""
    an actor, an air traffic controller, an anthropologist, a banker, a barber, a biologist, a bookseller, a cartoonist, a dancer,
    a dentist, a diver,
    an economist, an editor, an engineer, a fashion designer, a flight attendant, a geologist, a graphic designer, a historian,
    an interpreter, a jeweller,
    a lifeguard, a magician, a mathematician, a musician, a nutritionist, a painter, a paramedic, a physicist, a police officer,
    a professor, a programmer,
    a psychologist, a receptionist, a roofer, a salesman, a secretary, a shepherd, a social worker, a soldier, a stonemason, a teacher,
    a truck driver,
    a violin maker, a web developer, a winemaker, a writer, a zookeeper""")
_FOODS = _words("""
    apple pie, avocado toast, bagels, bean burritos, blueberry muffins, carbonara, cheesecake, chickpea salad, clam chowder, corn bread,
    croissants,
    dim sum, eggplant parmesan, falafel, fish and chips, French toast, garlic bread, gazpacho, grilled salmon, gyros, ice cream, kimchi,
    lamb stew,
    macaroni and cheese, mashed potatoes, miso soup, nachos, noodles with peanut sauce, pad thai, pho, pierogi, pizza margherita, quiche,
    ramen,
    roast chicken, schnitzel, shepherd's pie, spring rolls, tofu curry, tomato soup, vegetable stir-fry, waffles""")
_COLOURS = _words("""
    red, blue, green, black, white, grey, brown, teal, mustard yellow, sky blue, dark green, light pink, cream, copper, charcoal, bronze,
    peach, ruby red,
    forest green, royal blue""")
_MUSIC = _words("""
    jazz, blues, reggae, country music, heavy metal, techno, punk, folk music, classical music, hip hop, soul, funk, disco, gospel,
    flamenco, salsa,
    bluegrass, swing, ambient music, samba, tango music, K-pop""")
_ANIMALS = _words("""
    elephant, otter, fox, panda, koala, penguin, giraffe, hedgehog, owl, dolphin, red squirrel, snow leopard, sea turtle, wolf,
    hummingbird, sloth,
    raccoon, chameleon, beaver, badger, moose, walrus, llama, camel, lynx""")
_ALLERGENS = _words("""
    peanuts, cats, pollen, strawberries, shellfish, milk, eggs, wheat, soy, dust, bee stings, penicillin, walnuts, kiwis, sesame,
    mustard, celery, latex,
    horses, tomatoes""")
_INSTRUMENTS = _words("""
    the accordion, the bass guitar, the bongos, the double bass, the electric guitar, the French horn, the lute, the mandolin,
    the marimba, the piccolo,
    the recorder, the synthesizer, the tambourine, the triangle, the fiddle, the cornet""")
_HOBBIES = _words("""
    bird watching, calligraphy, candle making, chess, collecting stamps, crochet, geocaching, juggling, kite flying, model trains,
    origami, paragliding,
    photography, pottery, quilting, rock climbing, salsa dancing, scrapbooking, scuba diving, skateboarding, stargazing, stand-up comedy,
    tai chi, wood carving,
    whittling, karaoke, ballroom dancing, ice skating""")
_LANGUAGES = _words("""
    Arabic, Basque, Bengali, Cantonese, Czech, Danish, Dutch, Finnish, Greek, Hebrew, Hindi, Hungarian, Icelandic, Indonesian, Irish,
    Italian, Japanese,
    Korean, Latin, Mandarin, Norwegian, Polish, Portuguese, Romanian, Russian, Swahili, Swedish, Tagalog, Tamil, Thai, Turkish,
    Ukrainian, Urdu, Vietnamese,
    Welsh, Zulu""")
_DAYS = _words("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
_MONTHS = _words("January, February, March, April, May, June, July, August, September, October, November, December")
_HOURS = tuple(
    f"{hour}:{minute:02d} {half}" for hour in range(1, 13) for minute in (0, 10, 15, 20, 30, 40, 45, 50) for half in ("am", "pm")
)
_ORDINALS = ("1st", "2nd", "3rd", *(f"{day}th" for day in range(4, 21)), "21st", "22nd", "23rd", *(f"{day}th" for day in range(24, 31)))
_DATES = tuple(f"the {day} of {month}" for month in _MONTHS for day in _ORDINALS if (month, day) != ("February", "30th"))
_STREET_NAMES = _words("""
    Maple, Oak, Station, Church, Mill, River, Park, Hill, Bridge, Garden, Lake, King, Queen, Market, School, Forest, Meadow, Cedar, Elm,
    Birch""")
_STREET_KINDS = _words("Street, Road, Avenue, Lane, Drive, Close, Way")
_STREETS = tuple(
    f"{number} {name} {kind}" for number, name, kind in zip(range(7, 787, 13), _STREET_NAMES * 3, _STREET_KINDS * 9, strict=False)
)
_SMALL = tuple(str(number) for number in range(2, 60))
_THREE = tuple(str(number) for number in range(103, 998, 7))
_FIVE = tuple(str(number) for number in range(10427, 99991, 611))
_FLIGHTS = tuple(
    f"{letters} {number}" for letters, number in zip(_words("LH, BA, AF, KL, UA, DL, QF, SK, IB, AZ") * 20, _THREE, strict=False)
)
_MONEY = tuple(f"{amount} {unit}" for amount in range(40, 3000, 35) for unit in ("dollars", "euros"))
_FULL_NAMES = tuple(f"{first} {last}" for first, last in zip(_FIRST, _LAST * 3, strict=False))
_SHIPS = _words("""
    the Northern Star, the Blue Heron, the Silver Wave, the Old Friend, the Morning Light, the Sea Witch, the Golden Hind, the Lady Anne,
    the Red Falcon,
    the Quiet Storm, the Lucky Penny, the Wandering Albatross, the Grey Goose, the Iron Duke, the Merry Widow""")
_COMPANIES = _words("""
    Brightleaf, Northgate Books, Cobalt Systems, Fernhill Foods, Harbor Tools, Lumen Studio, Maplewood Press, Nimbus Travel,
    Orchard Software, Pinnacle Shoes,
    Quickstep Logistics, Redwood Clinic, Sandpiper Toys, Tidewater Energy, Umbra Films, Vista Glass, Westwind Cycles, Yellow Door Bakery""")

_TELL = _lines("""
    Just so you know, {thing} is {v}.
    {Thing} is {v}.
    I should mention that {thing} is {v}.
    For later: {thing} is {v}.
    Keep in mind that {thing} is {v}.
    You should know that {thing} is {v}.
    It may help you to know that {thing} is {v}.
    One detail: {thing} is {v}.
""")
_ASK = _lines("""
    What was {thing} again?
    Remind me, what is {thing}?
    By the way, what did I say {thing} is?
    Quick check: what is {thing}?
    I mentioned {thing} before. What is it?
    Tell me {thing}, please.
    Do you still know {thing}?
    Now, without looking it up: what is {thing}?
""")
_REPLY = _lines("""
    {Thing} is {v}.
    You told me that {thing} is {v}.
    It is {v}.
    You said earlier that {thing} is {v}.
    As you mentioned before, {thing} is {v}.
    Yes, I remember: {thing} is {v}.
    {v}.
""")


def _kind(things: str, values: tuple[str, ...], statements: str = "", questions: str = "", answers: str = "") -> FactKind:
    """A kind of fact; its own texts are added to the general ones, or stand alone if they begin with a line "only"."""

    def texts(own: str, general: tuple[str, ...]) -> tuple[str, ...]:
        lines = _lines(own)
        return lines[1:] if lines[:1] == ("only",) else general + lines

    return FactKind(_words(things), values, texts(statements, _TELL), texts(questions, _ASK), texts(answers, _REPLY))


FACTS: tuple[FactKind, ...] = (
    _kind("my name", _FIRST, """only
        My name is {v}.
        Hi, I'm {v}.
        Hello, {v} here.
        You can call me {v}.
        People call me {v}.
        """, """only
        What is my name?
        Do you remember my name?
        Who am I?
        How should you call me?
        """, """only
        Your name is {v}.
        You are {v}.
        You told me that your name is {v}.
        Of course, you are {v}!
        """),
    _kind("the name of my wife, the name of my husband, the name of my son, the name of my daughter, the name of my roommate, "
          "the name of my uncle, "
          "the name of my new colleague, the name of my coach, my nephew's name, my niece's name, my grandfather's name", _FIRST),
    _kind("my teacher's name, the name of my doctor, the name of my lawyer, my manager's name, the name of my favourite author, "
          "my client's name, "
          "the name of the hero of my novel, the name of the new mayor, the name of my accountant", _FULL_NAMES),
    _kind("my puppy's name, my kitten's name, the name of my horse, the name of my goldfish, the name of my guinea pig, "
          "the name of the neighbour's dog, "
          "the name of my canary", _PETS, "I have got a new pet, and everybody laughs about it: {thing} is {v}."),
    _kind("the city where I live", _PLACES, """only
        I live in {v}.
        I moved to {v} two years ago.
        We live in {v}, near the centre.
        I am writing to you from {v}, where I live.
        """, """only
        Where do I live?
        Which city do I live in?
        Do you remember where I live?
        """, """only
        You live in {v}.
        You told me that you live in {v}.
        In {v}.
        """),
    _kind("the place where I was born", _PLACES, """only
        I was born in {v}.
        I grew up in {v}, where I was born.
        """, """only
        Where was I born?
        In which city was I born?
        """, """only
        You were born in {v}.
        In {v}, as you told me.
        """),
    _kind("the destination of our next trip, the city of our next meeting, the city of the conference, the city where my sister studies, "
          "the home of my pen friend, the place where my parents met", _PLACES),
    _kind("my room number, my seat number, the number of my bus, the number of my house, my student number, "
          "the extension of my office phone, "
          "the number of pages in my book, my queue number", _THREE, "I wrote it down: {thing} is {v}."),
    _kind("my order number, the code of the alarm, my postal code, my customer number, the combination of the safe, my ticket number, "
          "my badge number, "
          "the reference number of my complaint", _FIVE, "I wrote it down: {thing} is {v}."),
    _kind("my flight number, the number of my flight to the conference", _FLIGHTS),
    _kind("the number of my cousins, the number of chairs in the hall, the number of guests, the age of my grandmother's cat, "
          "my shoe size, "
          "the number of students in my class, the number of boxes in the cellar, the score of my team", _SMALL),
    _kind("my budget for the trip, my monthly rent, the price of my bike, the price of the sofa, our budget for the party, "
          "the cost of the repair", _MONEY,
          "I have done the sums: {thing} is {v}."),
    _kind("my password for the game, the secret word, the magic word, the code name of our project, the password for the party, "
          "my safe word, "
          "the nickname of my car", tuple(f'"{word}"' for word in _SECRETS), """
        Remember this word for me: {thing} is {v}.
        Don't tell anyone, but {thing} is {v}.
        """),
    _kind("my job", _JOBS, """only
        I work as {v}.
        I am {v}.
        I'm {v} by profession.
        """, """only
        What do I do for a living?
        What is my job?
        Do you remember what I work as?
        """, """only
        You work as {v}.
        You are {v}.
        You told me that you are {v}.
        """),
    _kind("my brother, my sister, my wife, my husband, my cousin, my best friend, my neighbour", _JOBS, """only
        {Thing} is {v}.
        {Thing} works as {v}.
        """, """only
        What does {thing} do for a living?
        Do you remember what {thing} works as?
        """, """only
        {Thing} is {v}.
        {Thing} works as {v}, as you told me.
        """),
    _kind("my favourite food, the meal that I cook best, my comfort food, the favourite food of my son", tuple(_FOODS)),
    _kind("my lucky colour, the colour of my car, the colour of my front door, the colour of my new coat, the colour of our kitchen",
          _COLOURS),
    _kind("my favourite kind of music, the music that I listen to at work", _MUSIC),
    _kind("my favourite animal, the animal on our flag", tuple(f"the {animal}" for animal in _ANIMALS)),
    _kind("my hobby, the hobby of my father, my favourite pastime, my new hobby", _HOBBIES),
    _kind("the instrument that I play", _INSTRUMENTS, """only
        I play {v}.
        I have been playing {v} since I was a child.
        I am learning to play {v}.
        """, """only
        Which instrument do I play?
        Do you remember what instrument I play?
        """, """only
        You play {v}.
        The instrument is {v}.
        """),
    _kind("my allergy", _ALLERGENS, """only
        I am allergic to {v}.
        Please note that I am allergic to {v}.
        """, """only
        What am I allergic to?
        Which allergy did I mention?
        """, """only
        You are allergic to {v}.
        You told me that you are allergic to {v}.
        """),
    _kind("the language that I am learning", _LANGUAGES, """only
        I am learning {v}.
        I have started to learn {v} this year.
        I speak {v} at home.
        """, """only
        Which language did I mention?
        What language did I talk about?
        """, """only
        You mentioned {v}.
        It was {v}.
        """),
    _kind("my birthday, the date of the exam, the deadline of my project, our wedding day, the date of the concert, "
          "the day of my operation, the date of our move",
          _DATES),
    _kind("the time of the meeting, the departure of my train, the time of my appointment, the start of the film, "
          "the time of the call", _HOURS),
    _kind("the day of my yoga class, the day when the shop is closed, the day of our team meeting, my day off", _DAYS),
    _kind("my address, the address of the office, the address of the restaurant, my new address", _STREETS),
    _kind("the company that I work for, the name of my company, my old employer, my biggest customer", _COMPANIES),
    _kind("the name of my boat, the name of the ship in my story", _SHIPS),
)  # fmt: skip
NAMES = _FIRST
