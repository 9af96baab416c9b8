"""One change that breaks a claim of the library."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One changed line.

    Attributes:
        name: short and unique.
        file: what is changed, below the repository.
        killer: the tests that are likely to notice, below `tests`: a file, or one test of it.
        claim: what is no longer true.
        old: a fragment that occurs once in the file.
        new: what stands there instead.
    """

    name: str
    file: str
    killer: str
    claim: str
    old: str
    new: str

    @property
    def folder(self) -> str:
        """The tests that must notice, below `tests`."""
        return self.killer.partition('/')[0]

    def applied(self, text: str) -> str:
        """Return the file's text with the change.

        Raises:
            ValueError: if the fragment does not occur exactly once.
        """
        if (count := text.count(self.old)) != 1:
            raise ValueError(f'{self.old!r} occurs {count} times in {self.file}, not once: mend the mutant {self.name}')
        return text.replace(self.old, self.new)
