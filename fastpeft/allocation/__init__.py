"""AdaLoRA's allocation of ranks: scores, the budget, and who keeps which triplets."""
