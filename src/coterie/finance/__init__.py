"""Stock panels: cross-sectional scores by mixtures of style experts, and what they are worth."""
