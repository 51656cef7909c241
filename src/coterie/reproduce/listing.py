"""`coterie papers`: the cards, searched and shown. Imports no paper, so that it is quick."""

import textwrap

from coterie.reproduce.card import Card
from coterie.reproduce.experiment import check_slug, find_papers, read_card, search


def print_papers(query: str = "") -> None:
    """Prints the cards that match the query; the whole card if the query is its slug.

    Raises:
        ValueError: nothing matches; names the closest slug.
    """
    files = find_papers()
    if query in files:
        print(format_card(read_card(files[query])))
        return
    found = search(query)
    if not found:
        check_slug(query)
    print_cards(found)


def print_cards(cards: list[Card]) -> None:
    """One line per card: slug, area, year, title."""
    widths = [max(len(getattr(card, name)) for card in cards) for name in ("slug", "area")]
    for card in cards:
        print(f"{card.slug:{widths[0]}}  {card.area:{widths[1]}}  {card.year}  {card.title}")


def format_card(card: Card) -> str:
    """A card in full, as text."""
    fields = {
        "paper": f"{card.authors}, {card.year}, {card.venue}",
        "area": card.area,
        "methods": ", ".join(card.methods),
        "problem": card.problem,
        "published": card.headline,
        **({"code": card.code} if card.code else {}),
        "re-run it": f"coterie reproduce {card.slug}",
    }
    lines = [
        textwrap.fill(value, 96, initial_indent=f"{name:11}", subsequent_indent=" " * 11)
        for name, value in fields.items()
    ]
    return "\n".join([card.title, *lines])
