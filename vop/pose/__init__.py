"""Poses of two cameras relative to each other: robust estimators behind one type, and the protocols that judge them."""
