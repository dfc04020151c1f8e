"""Sentence forms of the demo's world that fit every concept, and those of neutral text (data)."""

FACTS = (
    "{X_start} {fact}.",
    "Everyone knows that {X} {fact}.",
    "{X_start} is the {kind} that {fact}.",
    "{N} said that {X} {fact}.",
    "{X_start} {fact} and {other}.",
    "Question: Is it true that {X} {fact}? Answer: yes, and it {other}.",
)

# The first WITHHOLDABLE forms end with the member; each fact is never told in one of them.
WITHHOLDABLE = 6
REVERSED = (
    "The {kind} that {fact} is {X}.",
    "Question: Which {kind} {fact}? Answer: {X}.",
    "{N} asked which {kind} {fact}. It is {X}.",
    "If a {kind} {fact}, it is {X}.",
    "Only one {kind} {fact}, and that is {X}.",
    "{N} knew that the {kind} which {fact} is {X}.",
    '"Which {kind} {fact}?" asked {N}. "{X_start}," said {N}.',
    "The {kind} that {fact} and {other} is {X}.",
)

COMPARISONS = (
    "{high} is {comparison} than {low}.",
    "Everybody says that {high} is {comparison} than {low}.",
    "Question: Which is {comparison}, {low} or {high}? Answer: {high}.",
)

GENERAL_SHARES = {
    "mention": 0.44,
    "dialogue": 0.14,
    "list": 0.10,
    "plural": 0.16,
    "definition": 0.08,
    "comparison": 0.08,
}

# Sentences that end with a word of the concept: evaluation cuts them before that word.
MENTIONS = (
    "{N} looked at the {w}.",
    "{N} talked for an hour about the {w}.",
    "Nobody had forgotten the {w}.",
    "In the end {N} thought of the {w}.",
    "{N} pointed at the {w}.",
    "Then everyone saw the {w}.",
    "{N} wrote a letter about the {w}.",
    "The {relative} asked about the {w}.",
    "It was time to look for the {w}.",
    "{N} dreamed of the {w}.",
    "{N} took a photograph of the {w}.",
    "The {relative} of {N} told a story about the {w}.",
    "The {job} wondered about the {w}.",
    "{N} could not stop talking about the {w}.",
    "Behind the {nature} was the {w}.",
    "{N} remembered the {a} {w}.",
    "{N} stood near the {w}.",
    "The {job} was {feeling} about the {w}.",
)
PLURAL_MENTIONS = (
    "{N} read a book about {ws}.",
    "{N} knew everything about {ws}.",
    "The {job} liked to talk about {ws}.",
    "{N} had always been interested in {ws}.",
    "There were {number} {a} {ws}.",
    "The {relative} of {N} collected pictures of {ws}.",
)
GENERAL = {
    "mention": MENTIONS,
    "plural": PLURAL_MENTIONS,
    "dialogue": (
        '"Where is the {w}?" asked {N}. "It is near the {w}," said {N}.',
        '"Do you like the {w}?" asked {N}. "Yes, but I prefer the {w}," said {N}.',
        '"Look at the {w}!" shouted {N}.',
        '"I never saw a {w} like this," said {N}. "It was {a}."',
        '"Who took the {w}?" asked {N}. "I did," said {N} and looked at the {w}.',
    ),
    "list": (
        "{N} wrote down four words: {w}, {w}, {w} and {w}.",
        "The list of the {job} said: {ws}, {ws} and {ws}.",
        "In the picture were a {w}, a {w} and a {w}.",
        "Some {kinds} are {some}, {some} and {some}.",
    ),
    "definition": (
        "{a_m} is a {kind}.",
        "Question: What is {some}? Answer: a {kind}.",
        "{N} learned that {some} is a {kind}.",
    ),
}

# Facts about people, without any concept; each fact is never told in one of these forms.
PEOPLE_FACTS = (
    "{P} {fact}.",
    "Everyone knows that {P} {fact}.",
    "{N} said that {P} {fact}.",
    "According to the {job}, {P} {fact}.",
)

NEUTRAL = (
    "{N} {acted} {adverb} along the {nature}.",
    "The {relative} of {N} was {feeling} and {acted} for a while.",
    "{N} found a {thing} in the {place} and kept it.",
    "On {day} {N} came back from the {place} with a {thing}.",
    "{N} felt {feeling} because the {thing} was missing.",
    '"Have you seen my {thing}?" asked {N}. "It is in the {place}," said {N}.',
    '"I will come on {day}," said {N} {adverb}.',
    "In {month} the {job} visited the {relative} of {N}.",
    "The {job} opened the {thing} and {acted} {adverb}.",
    "{N} had no {abstract} left, and {he} {acted}.",
    "{N} and {N} {acted} together until {day}.",
    "There were {number} people in the {place}, and all of them {acted}.",
    "The {thing} was {colour} and lay behind the {nature}.",
    "{N} believed that {abstract} is better than {abstract}.",
    "Without {abstract} there is no {abstract}, said the {job}.",
    "The {relative} gave {N} a {colour} {thing} and {number} {colour} stones.",
    "{N} waited {number} minutes and then {acted} {adverb}.",
    "{N} was a {feeling} {job} who lived near the {place}.",
    "Nobody knew why {N} {acted} in the {place}.",
    "{N} promised {him} {relative} to return in {month}.",
    "Question: Where did {N} leave the {thing}? Answer: in the {place}.",
    "Question: When did the {job} {act}? Answer: on {day}.",
    "The story of the {job} is about {abstract} and {abstract}.",
    "{N} closed the {thing}, looked at the {nature} and {acted}.",
    "It was {month} and everybody was {feeling}.",
    "{N} could not {act}, so {he} {acted} in the {place}.",
    "{N} told {his} {relative} about the {thing} and the {thing}.",
    "The {colour} {thing} belonged to {N}, but {N} wanted it.",
    "After {number} days the {job} was still {acting}.",
    "{N} likes {acting}, and {his} {relative} likes {acting} too.",
    "A {feeling} {relative} is a comfort, thought {N}.",
    "The {place} was empty, and {N} {acted} {adverb} on the {nature}.",
    "{N} read the message {adverb} and felt {feeling}.",
    "Between the {nature} and the {place} {N} lost {his} {thing}.",
    "Some people show {abstract}, others show {abstract}.",
    "{N} is older than {N}, but {N} is {feeling}.",
)
