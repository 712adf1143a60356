"""The laws that every stage obeys, as tests that the author of a stage inherits. Wants `pip install kfactk[testing]`."""

from kfactk.testing.laws import Law as Law, Laws as Laws, close as close, effort as effort, law as law
