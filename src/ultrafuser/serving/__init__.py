"""Serving: `worker.py` decodes for many callers at once, `protocol.py` is what they say, `app.py` listens to them."""
