class DelayedScaling:
    """FP8 recipe; the base of a class of the core."""
