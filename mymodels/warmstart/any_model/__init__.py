"""Weights of any model into any other, where no table of `key_mapping` names both.

Each side is described (`sides`), its tensors get roles (`roles`) and layouts (`layouts`), the named matchers of `matching`
and `structure` place them, and `planning` makes the plan that `warm_start` carries out.
"""
