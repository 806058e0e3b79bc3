"""One process of many, run by itself: a stage built and two steps taken over a process group that only pretends.

Nothing of a run is touched: weights are random or have no numbers at all, rows are made.
"""
