"""Formulas only: HiPPO matrices, discretisations, initial values. All of them keep float64."""
