"""Which cells stay: the ledger of what lies where, compression inside a budget, and what the scores are computed from."""
