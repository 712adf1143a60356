"""Mutation testing of the mathematics: `nox -s mutants`. Mistakes are put into copies of the checkout, and the tests have to notice."""
