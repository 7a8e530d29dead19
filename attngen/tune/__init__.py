"""Measuring the cost model's best few on the card itself, in processes that may crash, hang or run out of memory."""
