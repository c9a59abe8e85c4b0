from contextlib import nullcontext

fp8_autocast = nullcontext


class FP8GlobalStateManager:
    """State of FP8 training, which is off."""

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        """Return False."""
        return False
