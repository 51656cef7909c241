"""Learning from streams that drift."""

try:
    import river  # noqa: F401
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "streams need river; install it with: pip install 'coterie[stream]'"
    ) from None

from coterie.stream.driftmoe import DriftMoEClassifier

__all__ = ["DriftMoEClassifier"]
