"""Every measurement that the documents quote, to be repeated by anyone: ``ratchet bench NAME``. command.py lists them.

Beside them: finding.py, what each gives back; worlds.py and peers.py, where and beside whom ``policy`` is simulated;
known.py, runs that are looked up instead of trained twice; chaos_night.py and blows.py, the night that is killed and
what kills it; llm_faults.py, the ways in which a model breaks.
"""
