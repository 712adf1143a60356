"""Mutation testing of the mathematics: `nox -s mutants`.

Each mutant is one mistake in a copy of the checkout. The tests must notice it.
"""
