"""Chat prompts of very different lengths, in plain English, written for these tests."""

from __future__ import annotations

_QUESTIONS = (
    "Name three fruits.",
    "What is the capital of Norway?",
    "Write one sentence about rain.",
    "How many legs has a spider?",
    "Give me a short name for a grey cat.",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue?",
    "What does a carpenter do all day?",
    "Explain in two sentences what a bicycle chain is for.",
    "List the steps to make a cup of tea.",
    "Which is heavier, a kilogram of iron or a kilogram of wool, and why?",
    "Tell me something surprising about octopuses.",
    "What should I pack for a weekend by the sea in autumn?",
    "Write a polite note to a neighbour whose dog barks at night.",
    "What is the difference between a lake and a pond?",
    "Give three reasons to learn a second language.",
    "How does a thermometer work?",
    "Suggest a plot for a very short story about a lighthouse.",
    "What is 17 plus 25?",
    "Describe the colour green to someone who has never seen it.",
    "Write a haiku about a train.",
    "Which planets have rings?",
    "How do I keep basil alive on a windowsill?",
    "What makes bread rise?",
    "Explain what a computer program is to a child of six.",
    "Name a famous bridge and say where it is.",
    "What is a good question to ask in a job interview?",
    "How long does an egg need to boil?",
    "Say hello in as few words as possible.",
    "What is the opposite of 'generous'?",
    "Who invented the printing press?",
    "Give me a tongue twister.",
)

_PASSAGES = (
    "The ferry left the harbour at six in the morning, when the fog still lay on the water. On board were eleven "
    "passengers, two dogs and a crate of oranges that nobody had claimed. The captain, who had crossed the strait "
    "more than four thousand times, told everyone who would listen that the sea was never the same twice. By noon the "
    "wind had turned, and the passengers moved from the deck into the small saloon, where the tea was strong and the "
    "windows rattled.",
    "A library is more than a room with books. The old one in our town had a clock that ran seven minutes late, so "
    "that nobody was ever hurried, and a stove beside which the chess players sat in winter. Children came for the "
    "picture atlas, farmers for the almanac, and the schoolteacher for the silence. When the new building was opened, "
    "with its lifts and its screens, the clock was hung in the entrance hall, and it still runs seven minutes late.",
    "Soil is made slowly. Rock is broken by frost and roots, leaves fall and rot, worms carry the one into the other, "
    "and after a few hundred years there is a layer as thick as a hand is wide. A single storm can wash it away where "
    "nothing grows to hold it. That is why the people of the valley plant hedges along the slope, leave the stubble "
    "in the field over winter, and never plough straight downhill.",
    "The recipe asks for flour, water, salt and patience. Mix the first three in the evening until no dry flour is "
    "left, cover the bowl, and go to bed. In the morning the dough has doubled and smells faintly of apples. Fold it "
    "four times, once from each side, let it rest for an hour, and bake it in a pot with a lid, as hot as the oven "
    "goes, for half an hour; then take the lid off and wait until the crust is the brown of a chestnut.",
)

_TASKS = (
    "Summarise the text in one sentence.",
    "What is the most important detail in the text?",
    "Who or what is the text about?",
    "Write a title for the text.",
)


def chat_prompts() -> list[str]:
    """64 different user messages, from a few words to several paragraphs."""
    long = []
    for i in range(64 - len(_QUESTIONS)):
        count = 1 + i % 2 if i % 8 != 7 else 6 if i == 31 else 3
        passages = [_PASSAGES[(i + j) % len(_PASSAGES)] for j in range(count)]
        long.append(" ".join(passages) + f" {_TASKS[i // 4 % len(_TASKS)]} Question number {i}.")
    return [*_QUESTIONS, *long]
