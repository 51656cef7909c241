"""What a paper is about, on one card."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A paper, as `coterie papers` lists it and its page opens.

    Args:
        slug: its name on the command line, its file's name with hyphens: "alf-lb" is `alf_lb.py`.
        title: as published.
        authors: short: "Han, Zhong" or "Jin et al.".
        year: of the version that is re-run.
        venue: "ICLR 2025", "arXiv 2512.03915".
        area: "language", "vision", …: the room its method lives in.
        methods: the field's words for what it does, for searching.
        problem: in a sentence.
        headline: the main result as published, figures included; not what is measured here.
        code: address of the authors' code; "" where there is none.
    """

    slug: str
    title: str
    authors: str
    year: int
    venue: str
    area: str
    methods: tuple[str, ...]
    problem: str
    headline: str
    code: str = ""

    def matches(self, query: str) -> bool:
        """Whether every word of the query is somewhere on the card, in any case.

        >>> card = Card("a", "On Gates", "X", 2025, "arXiv", "language", ("top-k",), "Which gate?", "This.")
        >>> card.matches("GATE 2025"), card.matches("gate vision")
        (True, False)
        """
        words = [self.slug, self.title, self.authors, str(self.year), self.venue, self.area, *self.methods]
        text = " ".join([*words, self.problem]).casefold()
        return all(word in text for word in query.casefold().split())
