"""``attngen bench``: attention problems timed beside every peer that is installed, each checked before its time counts.

In order: ``problems`` (what is computed), ``features`` and ``spelling`` (how a user writes it, and its float64 reference),
``peers`` and ``flash`` (how each library writes it), ``phases`` (what is timed of it, and what that has to give), ``measure``
(clocks and ceilings), ``worker`` (one process that measures, and is replaced when it dies), ``records``, ``report`` and
``plot`` (what came of it), ``command``.
"""
