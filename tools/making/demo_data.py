"""Rows of the demo task: orders in free text, each answered by JSON that copies what it says.

A model's answer can be counted: it equals the expected line or it does not. Nothing has to be converted or guessed,
only found and copied. Every word or number that can be a value belongs, by its own hash, either to the training half or
to the evaluation half; so no value of an evaluation row was ever seen in a training row, whatever the seeds. The
phrases around the values are shared. The same options always write the same bytes.

    tools/make demo-data --seed 1 --rows 800 train.jsonl
    tools/make demo-data --seed 2 --rows 120 --split eval eval.jsonl
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Iterable
from pathlib import Path

from measuring.command import at_least

from qlora_tool.files.atomic import write_text

INSTRUCTION = "Copy the order into one line of JSON: customer, items, town, date."

# Syllables that make up names nobody has: enough of them that a name seen twice is rare.
FIRST_NAMES = (
    "An Bel Cas Dar Den El Em Ev Fin Gis Hal Ing Jan Jor Kes Lin Mil Nel Nor Pet Ren Ros Sel Sig Tam Tor Var Vel Wil",
    "a ba bri da di do ga go i ka la li lo ma mi na no ra ri sa se ta ti va vi",
    "d l n na nd ne r ra s t th x",
)
SURNAMES = (
    "Ash Brand Cald Dahl Eks Fair Gran Hav Holm Ivers Jarn Kest Lind Mor Nyst Oak Pell Rav Sund Thorn Uld Varn West",
    "a e el en er i in o or u",
    "berg brook by dal field gaard lund man mark quist rup sen stad strom ton vik wall worth",
)
TOWNS = (
    "Ash Brack Burn Cold Del East Ex Far Gar Hel Iver King Led Low Mel North Old Ox Port Red Sal South Stan Tarn Wex",
    "a de en er he i le ling o re ri ten u ver",
    "bridge bury by den ford ham haven holt ley mere mouth port stead thorpe ton wick",
)
KINDS = (
    "amber ash bamboo beech birch black blue brass bronze brown canvas cedar cherry chrome clay copper cork cotton "
    "cream crimson denim ebony felt flax folding foldable glass golden granite green grey hemp indigo iron ivory "
    "jade jute lace large leather lilac linen magnetic mahogany maple marble maroon nickel nylon oak ochre olive "
    "orange paper pearl pewter pine pink plastic plum plywood portable purple red round rubber rustic sandstone "
    "satin scarlet silk silver slate small square stackable steel striped suede teak tin turquoise velvet vinyl "
    "violet walnut waxed white wicker willow wool yellow zinc"
)
THINGS = (
    "aprons armchairs backpacks barrels baskets bells belts benches blankets blinds bookcases bookends boots bowls "
    "boxes bracelets brackets brooms brushes buckets buttons cabinets candles chairs clocks coasters combs crates "
    "cups curtains cushions desks doormats drawers dressers envelopes fences folders forks frames funnels gloves "
    "goblets hammers hats hinges hooks jackets jars jugs kettles keyrings ladders ladles lamps lanterns lids "
    "lockers mats mirrors mugs napkins notebooks paddles pans parasols pens pillows pitchers planters plates pots "
    "purses quilts racks ribbons rollers ropes rugs rulers saddles saucers scarves shelves shutters sieves signs "
    "spoons stools tables teapots tents tiles towels trays trunks umbrellas vases wallets whistles"
)
TITLES = ("Mr", "Ms", "Dr")
MONTHS = "January February March April May June July August September October November December"
QUANTITIES = range(2, 500)
POSTCODES = range(1000, 10000)

# {greeting} and {closing} may be empty; every other field appears exactly once in each phrase.
PHRASES = (
    "{greeting}this is {customer}, please send {items} to {town} by {date}.{closing}",
    "{greeting}my name is {customer} and I need {items} in {town} on {date}.{closing}",
    "{greeting}could you ship {items} to {customer} in {town} before {date}?{closing}",
    "{greeting}{customer} here, I would like {items} delivered to {town} on {date}.{closing}",
    "{greeting}we are waiting in {town} for {items}, due {date}, ordered by {customer}.{closing}",
    "{greeting}by {date} {customer} wants {items}; the shop is in {town}.{closing}",
    "{greeting}send {items} to {town}. It is for {customer}, no later than {date}.{closing}",
    "{greeting}on {date} our driver leaves for {town}, put {items} on board for {customer}.{closing}",
    "{greeting}order from {town}: {items}, wanted {date}, name {customer}.{closing}",
    "{greeting}please book {items} for {customer}, {town}, {date}.{closing}",
    "{greeting}I live in {town} and would love {items} for {date}, yours {customer}.{closing}",
    "{greeting}{customer} from {town} asked for {items}, to arrive {date}.{closing}",
    "{greeting}can {items} be in {town} by {date}? The bill goes to {customer}.{closing}",
    "{greeting}for {customer}: {items}, deliver {date}, place {town}.{closing}",
    "{greeting}{date} is the day I open in {town}, so I need {items}. {customer}.{closing}",
    "{greeting}put me down for {items}, says {customer}, pick up in {town} on {date}.{closing}",
)
GREETINGS = ("", "", "Hi, ", "Hello, ", "Good morning, ", "Hey there, ", "Dear team, ")
CLOSINGS = ("", "", "", " Thanks!", " Many thanks.", " Please confirm.", " Call me if not.")


def half(value: str) -> str:
    """The half, `train` or `eval`, that a word or number belongs to: a bit of its own hash, so always the same one."""
    return ("train", "eval")[hashlib.sha256(value.encode()).digest()[0] & 1]


class Pools:
    """All values of one half, field by field."""

    def __init__(self, split: str):
        def kept(values: Iterable[str]) -> list[str]:
            return [value for value in values if half(value) == split]

        def composed(syllables: tuple[str, ...]) -> list[str]:
            starts, middles, ends = (part.split() for part in syllables)
            return kept(f"{start}{middle}{end}" for start in starts for middle in middles for end in ends)

        self.first_names = composed(FIRST_NAMES)
        self.surnames = composed(SURNAMES)
        self.towns = composed(TOWNS)
        self.kinds = kept(KINDS.split())
        self.things = kept(THINGS.split())
        self.quantities = kept(str(number) for number in QUANTITIES)
        self.postcodes = kept(str(number) for number in POSTCODES)
        self.dates = kept(f"{day} {month}" for month in MONTHS.split() for day in range(1, 29))


def make_rows(seed: int, rows: int, split: str) -> list[dict]:
    """`rows` conversations in the `messages` form, drawn with `seed` from the values of `split`.

    Only `Random.random()` is drawn from, which Python keeps the same in every version.
    """
    generator = random.Random(seed)
    pools = Pools(split)

    def draw(values):
        return values[int(generator.random() * len(values))]

    conversations = []
    for _ in range(rows):
        order = {
            "customer": f"{draw(TITLES)} {draw(pools.first_names)} {draw(pools.surnames)}",
            "items": f"{draw(pools.quantities)} {draw(pools.kinds)} {draw(pools.things)}",
            "town": f"{draw(pools.postcodes)} {draw(pools.towns)}",
            "date": draw(pools.dates),
        }
        text = draw(PHRASES).format(greeting=draw(GREETINGS), closing=draw(CLOSINGS), **order)
        conversations.append(
            {
                "messages": [
                    {"role": "system", "content": INSTRUCTION},
                    {"role": "user", "content": text[0].upper() + text[1:]},
                    {"role": "assistant", "content": json.dumps(order)},
                ]
            }
        )
    return conversations


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="the .jsonl file to write")
    parser.add_argument("--seed", type=int, default=0, help="what the rows are drawn with (default: 0)")
    parser.add_argument("--rows", type=at_least(1), default=800, help="how many rows (default: 800)")
    parser.add_argument(
        "--split", choices=("train", "eval"), default="train", help="which half of the values (default: train)"
    )


def run(options: argparse.Namespace) -> None:
    rows = make_rows(options.seed, options.rows, options.split)
    write_text(options.file, "".join(json.dumps(conversation) + "\n" for conversation in rows))
