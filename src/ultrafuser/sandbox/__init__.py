"""Runs Python that nobody has read, such as code that a model wrote, so that it can do no harm.

`Sandbox.run` gives a program a process of its own without network, without files but a temporary folder, and with
limits on everything it could use up. `runner.py` is outside, `warden.py` is the first process inside.
"""

from ultrafuser.sandbox.runner import Limits, Outcome, Result, Sandbox

__all__ = ["Limits", "Outcome", "Result", "Sandbox"]
