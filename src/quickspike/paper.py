"""Where something was published."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """A publication."""

    authors: str
    title: str
    year: int
    arxiv: str = ""
    venue: str = ""
    """Where it appeared, for a paper that is not on arXiv."""
    page: str = ""
    """Address of such a paper."""

    def __str__(self) -> str:
        return f"{self.authors} ({self.year}), {self.title}, {self.where}"

    @property
    def where(self) -> str:
        """Number on arXiv, or the venue."""
        return f"arXiv {self.arxiv}" if self.arxiv else self.venue

    @property
    def address(self) -> str:
        """Of the paper's page."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else self.page
