"""Learning from streams that drift."""

try:
    import river  # noqa: F401
except ModuleNotFoundError:
    raise ModuleNotFoundError("streams need river; install it with: pip install 'coterie[stream]'") from None

from coterie.stream.driftmoe import DriftMoEClassifier
from coterie.stream.hoeffding import HoeffdingTrees
from coterie.stream.prequential import PrequentialScore, prequential
from coterie.stream.router import OnlineRouter

__all__ = ["DriftMoEClassifier", "HoeffdingTrees", "OnlineRouter", "PrequentialScore", "prequential"]
