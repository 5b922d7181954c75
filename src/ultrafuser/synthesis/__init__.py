"""UltraChat 2: makes conversations of any number and field with any chat endpoint (paper, section 3.2 and appendix F).

`recipe.py` says how much of what is wanted, `stages.py` what is asked and made of the answers, `endpoint.py` asks,
`refusals.py` tells what will never be answered, `book.py` keeps every answer, `sieve.py` and `verification.py` keep
what is good, `pipeline.py` runs it all, and `export.py` writes what `ultrafuser train` reads.
"""
