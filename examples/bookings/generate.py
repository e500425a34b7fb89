"""
Make the dataset: messages asking for a restaurant table, and the booking each one means.

    python generate.py            writes dataset/train.jsonl and dataset/eval.jsonl

One seed, one answer: the same files byte for byte on every machine. The held-out messages are
built from sentences, surnames and terrace words that no training message has; what the two share
(weekdays, the ways to say a time or a number) is listed in the README.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

SEED = 7
TRAIN_ROWS = 400
EVAL_ROWS = 120

DAYS = {
    "mon": "Monday",
    "tue": "Tuesday",
    "wed": "Wednesday",
    "thu": "Thursday",
    "fri": "Friday",
    "sat": "Saturday",
    "sun": "Sunday",
}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

TRAIN_NAMES = """
    Abbott Adeyemi Albrecht Andersen Baptiste Barros Bianchi Bouchard Brennan Castillo Chaudhry
    Conti Cunningham Delgado Desai Dvorak Eriksen Farouk Ferrari Fitzgerald Fontaine Gallagher
    Ghosh Grigoryan Haddad Halvorsen Hasegawa Hoffmann Ibrahim Ivanov Jankowski Kapoor Kaufmann
    Kimura Kowalski Laurent Lindqvist Lombardi MacLeod Mbeki Mendoza Moreau Nakamura Navarro Nguyen
    Novak Okafor Oliveira Olsen Park Petrov Pham Quinn Ramirez Rossi Santos Schneider Suzuki Tanaka
    Vargas
"""
EVAL_NAMES = """
    Achterberg Banerjee Bellini Carvalho Chen Dubois Egorov Fischer Garrido Hughes Ito Jensen
    Keller Lopez Marchetti Mwangi Nowak Osei Papadakis Reilly Sato Silva Takahashi Ueda Villanueva
    Weber Yilmaz Zhang
"""

# Each sentence carries {who}, {people}, {day} and {time}; {table} stands where a wish for a place
# goes, with its own leading comma or space, and is empty where the guest has no wish.
TRAIN_SENTENCES = (
    "I asked for {other_day}, but {day} would be better. {people}, {time}{table}. {who}",
    "Table for {people} on {day} at {time}{table} please, name is {who}.",
    "Hi, {who} here. Could we come in {day} {time}, {people}{table}?",
    "Hello! I'd like to book for {people} this {day}, {time}{table}. It's under {who}.",
    "{who}, {people}, {day} {time}{table}",
    "Can you fit {people} in on {day}? Around {time}{table}. Thanks, {who}",
    "Good morning, this is {who}. We need a table{table} for {people}, {day} at {time}.",
    "Please reserve {day} at {time} for {people}{table}. Surname {who}.",
    "We'd love to eat with you on {day}. {time} would suit us, {people}{table}. Best, {who}",
    "Booking request: {day}, {time}, {people}{table}, {who}.",
    "Is {time} free on {day}? It would be {people}{table}. My name's {who}.",
    "Not {other_day}, sorry, I meant {day} at {time}. Still {people}{table}. {who}",
    "Please move us from {other_day} to {day}: {people}, {time}{table}, name {who}.",
    "Hey, any chance of {people} at {time} on {day}{table}? Put it under {who}",
    "Dear team, {people} would like to join you on {day} at {time}{table}. Regards, {who}.",
    "For {who}: {people}, {day}, {time}{table}.",
    "It's {who} again. Last time we were {other_people}, on {day} it's {people}, {time}{table}.",
    "My wife's birthday is on {day}! {people}, {time}{table}, thanks. {who}",
    "Could I get {day} {time}{table}? {people}. I'm {who}.",
    "Evening. {who} speaking, I want a table for {people}{table} on {day}, {time} if possible.",
    "{day} at {time}, {people}{table}. Cheers, {who}",
    "We are {people} and hungry: {day}, {time}{table}, the name is {who}.",
)
EVAL_SENTENCES = (
    "Hiya, {who} is the name. Do you have something{table} for {people} on {day} at {time}?",
    "I was hoping to come by on {day}, say {time}, we would be {people}{table}. Signed, {who}",
    "Please put {who} down for {day} {time}, {people}{table}.",
    "Are you open on {day}? If so {people} at {time}{table}, many thanks from {who}.",
    "Reservation under {who} please: {people} coming on {day}, arriving {time}{table}.",
    "On {day} my parents visit, so {people}{table} at {time}. You can write {who}.",
    "I rang about {other_day} but {day} is better: {time}, {people}{table}. Yours, {who}",
    "Good afternoon! {people}, if you have room{table}, {day} {time}. {who} is my surname.",
)

TRAIN_OUTSIDE = ("outside", "on the terrace", "in the garden", "out in the open air")
EVAL_OUTSIDE = ("outside", "on the patio", "in the courtyard")
TRAIN_INSIDE = ("inside", "indoors", "in the dining room", "by the fireplace")
EVAL_INSIDE = ("inside", "indoors", "at an indoor table")


def say_people(rng: random.Random, people: int) -> str:
    """Say a number of guests, as a digit or a word."""
    word = NUMBERS[people]
    return rng.choice(
        (
            f"{people} people",
            f"{word} people",
            f"{people} of us",
            f"{word} of us",
            f"a party of {word}",
        )
    )


def say_time(rng: random.Random, hour: int, minute: int) -> str:
    """Say a time the ways guests do."""
    digits = f"{hour}:{minute:02d}" if minute else f"{hour}"
    spoken = {0: "{} o'clock", 15: "quarter past {}", 30: "half past {}"}.get(minute, digits)
    return rng.choice((spoken.format(NUMBERS[hour]), f"{digits} pm", f"{digits}pm"))


def make_row(
    rng: random.Random,
    sentence: str,
    name: str,
    outside: tuple[str, ...],
    inside: tuple[str, ...],
) -> dict[str, str]:
    """Draw one booking and write the message that asks for it."""
    day, other_day = rng.sample(sorted(DAYS), 2)
    people, other_people = rng.sample(range(2, 10), 2)
    hour, minute = rng.randrange(5, 10), rng.choice((0, 15, 30, 45))
    table = rng.choice(("inside", "outside", "any"))
    wish = {"inside": inside, "outside": outside, "any": ("",)}[table]
    place = rng.choice(wish)
    message = sentence.format(
        who=name,
        people=say_people(rng, people),
        other_people=NUMBERS[other_people],
        day=DAYS[day],
        other_day=DAYS[other_day],
        time=say_time(rng, hour, minute),
        table=f" {place}" if place else "",
    )
    booking = {
        "name": name,
        "people": people,
        "day": day,
        "time": f"{hour}:{minute:02d}",
        "table": table,
    }
    # Without spaces: a quarter fewer tokens to train and to sample; scoring compares values.
    return {
        "input": message[0].upper() + message[1:],
        "output": json.dumps(booking, separators=(",", ":")),
    }


def make_rows(seed: int) -> dict[str, list[dict[str, str]]]:
    """Return the rows of each split; no message stands in both, or twice in one."""
    rng = random.Random(seed)
    splits = {}
    seen: set[str] = set()
    for split, count, sentences, names, outside, inside in (
        ("train", TRAIN_ROWS, TRAIN_SENTENCES, TRAIN_NAMES, TRAIN_OUTSIDE, TRAIN_INSIDE),
        ("eval", EVAL_ROWS, EVAL_SENTENCES, EVAL_NAMES, EVAL_OUTSIDE, EVAL_INSIDE),
    ):
        rows: list[dict[str, str]] = []
        while len(rows) < count:
            # Round robin, so that every sentence has its share.
            row = make_row(
                rng,
                sentences[len(rows) % len(sentences)],
                rng.choice(names.split()),
                outside,
                inside,
            )
            if row["input"] not in seen:
                seen.add(row["input"])
                rows.append(row)
        rng.shuffle(rows)
        splits[split] = rows
    return splits


def main() -> None:
    """Write one file a split."""
    parser = argparse.ArgumentParser(description="write the dataset of the bookings example")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "dataset")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for split, rows in make_rows(options.seed).items():
        path = options.out / f"{split}.jsonl"
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        path.write_text("".join(lines), encoding="utf-8", newline="\n")
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
