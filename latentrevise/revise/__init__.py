"""The method (arXiv 2606.29938): hull, objective, solver and the batched reviser. Read it next to the paper."""
