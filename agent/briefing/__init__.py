"""What a briefing is made of beside the source itself (``read.py`` puts it together).

    incumbent.py   curve, profile, and what can be seen    codemap.py      the source under a budget of tokens
    notebook.py    what was learnt                         directions.py   where to look, by gain a run
    plateau.py     when to ask another question            predictions.py  what a model said beforehand, and its worth
"""
