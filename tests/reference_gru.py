"""A GRU in NumPy, one step at a time."""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def naive_gru(p, x):
    """Returns the states of one direction, `(L, C)`, for inputs `x` and parameters `p` as `GRU` has them."""
    h, states = np.zeros(p["hn"]["kernel"].shape[0]), []
    for step in x:
        dense = {n: step @ p[f"i{n}"]["kernel"] + p[f"i{n}"]["bias"] for n in "rzn"}
        r, z = (sigmoid(dense[n] + h @ p[f"h{n}"]["kernel"]) for n in "rz")
        n = np.tanh(dense["n"] + r * (h @ p["hn"]["kernel"] + p["hn"]["bias"]))
        h = (1 - z) * n + z * h
        states.append(h)
    return np.array(states)
