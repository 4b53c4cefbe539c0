"""``ratchet doctor``: what is wrong, and how to mend it.

    checks.py   this machine and a target                  run_folder.py  the folder of a run
    engine.py   other machines, by a real job              model.py       a model's endpoint
"""
