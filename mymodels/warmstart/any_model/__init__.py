"""Warm starts between any two models, without tables in `key_mapping`.

Source and target are described alike (`sides`). Their tensors get roles (`roles`) and layouts (`layouts`), the matchers in
`matching` and `structure` assign source tensors to target tensors, and `planning` makes the plan for `warm_start`.
"""
