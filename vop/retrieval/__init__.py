"""The method: shortlist, votes, ranking."""
