"""A spreadsheet as a small shop has one: 60 tickets and their replies, for `docs/tutorial.md`.

Every reply names the team that takes the ticket, answers in a sentence or two, and ends with the shop's name. All of
them were written for this file by hand; no shop or customer is meant.

    tools/make support-tickets tickets.xlsx
"""

from __future__ import annotations

import argparse
from pathlib import Path

COLUMNS = ("Question", "Answer")
SIGNATURE = "Fern & Spade"

TICKETS = {
    "Delivery": (
        ("My parcel should have been here on Monday. Where is it?",
         "Sorry for the wait! It is at the depot in your town and will be with you within two days."),
        ("Do you deliver to the islands?", "We do, twice a week. It takes about five days and costs 4 pounds more."),
        ("The courier left my compost in the rain.",
         "That should not happen, sorry! Send us a picture and new bags leave tomorrow."),
        ("Can I change the delivery address? I ordered an hour ago.",
         "Of course. Send us the new address before four o'clock and it goes there."),
        ("How long does a greenhouse take to arrive?",
         "Greenhouses come from the workshop in about three weeks. The driver calls you the day before."),
        ("The tracking number does not work.", "It wakes up in the evening, when the courier has scanned your parcel."),
        ("Nobody was home when you came. What now?", "No trouble. The courier tries again on the next working day."),
        ("Could you deliver the plants after the 12th? We are away.",
         "Gladly. Your plants stay with us and leave on the 13th."),
        ("Is there a way to pick my order up myself?",
         "Yes, at the barn, from nine to five. Bring the number of your order."),
        ("Half of my order is missing from the box.",
         "The rest travels in a second box and should reach you tomorrow."),
    ),
    "Returns": (
        ("I would like to send the gloves back, they are too small.",
         "Of course. The label is in your mail; put the gloves into any parcel box within 30 days."),
        ("The hose is the wrong colour, can I swap it?",
         "You can. Send it back with the label in your mail, and the other colour leaves the same day."),
        ("When do I get my money back for the fountain?",
         "Five working days after the fountain is with us, the way you paid."),
        ("Can I return seeds that I have opened?",
         "Opened seeds stay with you, sorry. If they do not come up, we send new ones."),
        ("I lost the return label.", "A new one is on its way to your mail."),
        ("The bench does not fit on my balcony. Do you take it back?",
         "We do. Our driver collects it on a day that you choose."),
        ("Is it 14 or 30 days for sending things back?", "It is 30 days, from the day the parcel reached you."),
        ("I was given two of the same lantern. May I return one without the bill?",
         "You may. Put your name and the giver's into the box, and you get a voucher."),
        ("Do I have to pay for the return?", "No. The label in your mail is paid for."),
        ("I sent the shears back two weeks ago and heard nothing.",
         "Sorry for the silence! They arrived on Friday, and the money leaves today."),
    ),
    "Repairs": (
        ("The mower does not start any more.",
         "Let us look at it. Pull the battery, wait a minute and try again; if it stays silent, we collect it."),
        ("A wheel of the barrow broke after two weeks.",
         "That is ours to mend. A new wheel leaves today, with the tool for it."),
        ("My secateurs are blunt. Do you sharpen?", "We do, for 6 pounds a blade. They are back within a week."),
        ("The pump hums but there is no water.",
         "Mostly it is a leaf at the inlet. Open the cap, rinse it, and try again."),
        ("The zip of the greenhouse cover is stuck.",
         "Some soap on both sides helps. If it tears, we send a new cover."),
        ("The handle of my spade came loose.",
         "Handles have ten years with us. Send the spade, and it gets a new one."),
        ("The solar lamps stay dark since winter.", "Their batteries are used up. A set of new ones is 8 pounds."),
        ("Water drips from the tap of the rain barrel.", "The seal is worn. We put a new one into the post for you."),
        ("My hedge trimmer smells of burning.", "Please switch it off and do not use it. We collect it tomorrow."),
        ("Can you mend a cracked pot?", "Sorry, pots are beyond us. But glue for them is in our shop."),
    ),
    "Plants": (
        ("The leaves of my lemon tree turn yellow.",
         "It wants less water and more iron. Let the soil dry, then feed it once a week."),
        ("When do I plant tulip bulbs?", "In October or November, three times as deep as the bulb is tall."),
        ("Snails eat all my lettuce!", "Put copper tape around the bed and water in the morning, not at night."),
        ("Which hedge grows fastest?", "Privet, about 60 centimetres a year. It wants a cut in June."),
        ("My tomatoes have brown spots at the bottom.", "They lack calcium, because of dry days. Water them evenly."),
        ("Can the olive tree stay outside in winter?",
         "Down to five degrees of frost, against a wall. Below that, bring it in."),
        ("How often do I water a cactus?", "Every two weeks in summer, and not at all in winter."),
        ("What grows under a walnut tree?", "Little, but ferns and hostas do. Plant them in spring."),
        ("There are white flies on my orchids.", "Wash the leaves with soft soap, three times in two weeks."),
        ("Do I have to cut lavender?", "Yes, by a third, after it has flowered. Never into the old wood."),
    ),
    "Orders": (
        ("Can I add a watering can to my order?",
         "Gladly. Tell us the colour before noon and it goes into the same box."),
        ("I ordered the wrong size of pots, please cancel.", "Done. Your order is cancelled and nothing is charged."),
        ("Do you have the blue kettle in stock?",
         "Eleven are left. They leave the same day when you order before noon."),
        ("I did not get a confirmation.", "It may lie with the spam. We have sent it once more."),
        ("When will the apple trees be back?", "In the first week of November. We can write to you on that day."),
        ("Can I order a hundred tulips for a wedding?", "Congratulations! Yes, with four weeks of notice."),
        ("The website says that my basket is empty.",
         "It forgets after a day, sorry. Your list is still under your name."),
        ("Is the oak bench made here?", "It is, by two carpenters in the village, from trees of this county."),
        ("Do you wrap presents?", "We do, for 3 pounds, with a card in our own hand."),
        ("I want the same order as last spring.",
         "A pleasure. We have put it into your basket; look it over and send it."),
    ),
    "Billing": (
        ("I was charged twice for one order.",
         "That was our mistake, sorry! The second sum is back with you in three days."),
        ("Can I have a bill with my company's name?",
         "Of course. Send us the name and address, and a new bill comes by mail."),
        ("Do you take cheques?", "No longer, sorry. Cards, transfers and vouchers are all fine."),
        ("The voucher code does not work.", "It ran out in May, but we have made it good for another month."),
        ("May I pay in three parts?", "You may, from 150 pounds on, without interest."),
        ("Why is there tax on the seeds?", "Seeds for flowers have it, seeds for food do not. The bill shows both."),
        ("My card was declined, but there is money on it.",
         "Then the bank wants you to confirm. Try again with your phone at hand."),
        ("The bill shows a discount of zero.",
         "Ten per cent was promised and is now on it. The rest comes back to you."),
        ("Where do I find last year's bills?", "Under your name, at Orders, then 2025. Each has a button to print it."),
        ("Do you send reminders? I nearly forgot to pay.", "We do, after 14 days, and they cost nothing."),
    ),
}  # fmt: skip


def rows() -> list[tuple[str, str]]:
    """Ticket and reply of all 60 rows, the teams by turns, as tickets come in."""
    by_turns = zip(*TICKETS.values(), strict=True)
    return [(ticket, f"[{team}] {reply} {SIGNATURE}")
            for turn in by_turns for team, (ticket, reply) in zip(TICKETS, turn, strict=True)]  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="the .xlsx file to write")


def run(options: argparse.Namespace) -> None:
    from openpyxl import Workbook

    book = Workbook()
    sheet = book.active
    sheet.title = "tickets"
    for row in (COLUMNS, *rows()):
        sheet.append(row)
    book.save(options.file)
