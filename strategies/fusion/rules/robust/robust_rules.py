"""The catalogue of robust rules by their names in the configuration."""

from typing import TypeAlias

from fedbasin.strategies.fusion.rules.robust.bulyan import Bulyan
from fedbasin.strategies.fusion.rules.robust.centred_clipping import CentredClipping
from fedbasin.strategies.fusion.rules.robust.geometric_median import GeometricMedian
from fedbasin.strategies.fusion.rules.robust.krum import Krum, MultiKrum
from fedbasin.strategies.fusion.rules.robust.median import Median
from fedbasin.strategies.fusion.rules.robust.norm_clipping import NormClipping
from fedbasin.strategies.fusion.rules.robust.trimmed_mean import TrimmedMean

# Rules that decide entry by entry, and rules whose result is a combination of whole updates.
CoordinateRule: TypeAlias = Median | TrimmedMean | Bulyan
CombinationRule: TypeAlias = Krum | MultiKrum | GeometricMedian | NormClipping | CentredClipping
RobustRule: TypeAlias = CoordinateRule | CombinationRule

# Rules without and with a number of hostile clients.
UNCOUNTED: dict[str, RobustRule] = {
    rule.name: rule for rule in (Median(), GeometricMedian(), NormClipping(), CentredClipping())
}
COUNTED: dict[str, type[TrimmedMean | Krum | MultiKrum | Bulyan]] = {
    rule.name: rule for rule in (TrimmedMean, Krum, MultiKrum, Bulyan)
}
ROBUST_RULES = (*UNCOUNTED, *COUNTED)


def robust_rule(name: str, hostile: int) -> RobustRule:
    """Return the rule of a name.

    Args:
        name: name in the configuration.
        hostile: number of hostile clients that the rule withstands; 0 for a rule that is told none.

    Raises:
        ValueError: there is no such rule, or its number of hostile clients is missing or would be ignored.
    """
    if name in UNCOUNTED and not hostile:
        return UNCOUNTED[name]
    if name in COUNTED and hostile:
        return COUNTED[name](hostile)
    if name in COUNTED:
        raise ValueError(
            f"robust = {name!r} needs the number of hostile clients that it withstands; set hostile-clients = 1 or "
            f"more, or choose one of {', '.join(UNCOUNTED)}"
        )
    if name in UNCOUNTED:
        raise ValueError(
            f"hostile-clients = {hostile} with robust = {name!r}: the rule is told no number; set hostile-clients = 0, "
            f"or choose one of {', '.join(COUNTED)}"
        )
    raise ValueError(f"robust = {name!r}: choose one of {', '.join(ROBUST_RULES)}, or leave it empty")
