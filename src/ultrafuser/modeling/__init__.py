"""Hugging Face citizens: the fused model, its configuration, its banks of specialists, its templates, its checkpoints.

Importing this package registers model type "ultrafuser" with the Auto classes.
"""
