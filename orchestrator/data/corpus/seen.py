"""Which contents came before, in a few bytes each."""

from __future__ import annotations

from array import array
from bisect import bisect_left

BITS = 12  # of a digest choose its bucket


class Seen:
    """A set of SHA-256 digests that keeps 76 of their 256 bits: 12 choose a bucket, 64 lie in it, sorted.

    It takes about 11 MB for each million digests. That any two of 40 million different contents agree in all 76 bits,
    so that one is taken for a duplicate, has a probability of 1e-8.
    """

    def __init__(self) -> None:
        self._buckets = [array("Q") for _ in range(1 << BITS)]
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, digest: bytes) -> bool:
        """Whether the digest [32 bytes] is new; it is in the set afterwards."""
        bucket = self._buckets[int.from_bytes(digest[:2], "big") >> (16 - BITS)]
        value = int.from_bytes(digest[2:10], "big")
        place = bisect_left(bucket, value)
        if place < len(bucket) and bucket[place] == value:
            return False
        bucket.insert(place, value)
        self._count += 1
        return True
