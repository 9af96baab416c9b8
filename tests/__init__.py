"""A package, so that `tests.helpers` is this one's and not that of another distribution."""
