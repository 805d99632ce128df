"""What the papers measure of a model, as functions: norms, magnitude and direction, removal, bytes.

>>> norms = WeightNorms(model); norms.attach(optimizer)    # LISA, figure 2
>>> changes = changes_of(model, names=["q_proj"])          # DoRA, figure 2
>>> curve = greedy_removal(model, loss, batches)           # IST, figure 2
>>> print(account(model, optimizer))                       # what trains, and what it holds

Figures of them are in :mod:`fastpeft.instruments.plots`.
"""

from fastpeft.instruments.accounting import Account, account
from fastpeft.instruments.directions import Change, changes_between, changes_of, correlation
from fastpeft.instruments.folders import changes_between_folders
from fastpeft.instruments.removal import Removal, greedy_removal, random_removal
from fastpeft.instruments.weight_norms import WeightNorms

__all__ = [
    "Account",
    "Change",
    "Removal",
    "WeightNorms",
    "account",
    "changes_between",
    "changes_between_folders",
    "changes_of",
    "correlation",
    "greedy_removal",
    "random_removal",
]
