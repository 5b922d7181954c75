"""Looking inside a fused model: losses of every row, gate weights, and the pictures that show both.

`traces` holds what was measured, `figures` and `token_view` draw it, `palette` gives every picture (and the
terminal) the same colours. Plotting libraries are imported where they are used.
"""
