"""Faults at the N-th file operation of real runs, and power cuts. See README in __main__."""
