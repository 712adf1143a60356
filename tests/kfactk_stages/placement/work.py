"""A workload with partitions that the tests of placements write out.

Operations of its pieces: small A 8, G 27; large A 1000, G 512; joined, A and G together,
64 + 216 = 280; flat 12.
"""

from kfactk import Work, Workload

SMALL = Work("small", {"A": (2, 2), "G": (3, 3)}, (3, 2))
LARGE = Work("large", {"A": (10, 10), "G": (8, 8)}, (8, 10))
JOINED = Work("joined", {"A": (4, 4), "G": (6, 6)}, (6, 4), indivisible=True)
FLAT = Work("flat", {"square": (3, 4)}, (3, 4))
WORKLOAD = Workload((SMALL, LARGE, JOINED, FLAT))
