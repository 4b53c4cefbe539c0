"""The attack suite: hostile patches against the real path, each proven to bite where nothing defends.

    record.py     what an attack is            target.py    the trainer that they patch
    catalogue.py  all of them                  patches.py   where their code goes into it
    careless.py   a tool without any defence   world.py     bait, canaries, and the eyes that look for harm
    trial.py      both runs of one attack      suite.py     `ratchet bench attacks`
    table.py      the table of docs/SECURITY.md

One module a family: metric, theft, processes, limits, network, damage, form, foreign, handover, persistence, causality,
server, charge, speech, luck.
"""
