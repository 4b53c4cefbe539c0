"""The model: from a briefing to edits, and from an endpoint that fails to a night that goes on.

    proposer.py   a proposer that asks a model             relay.py     several of them and what stands in, as one
    messages.py   briefing to messages                     breaker.py   when a failing one rests
    endpoint.py   one bounded call                         minds.py     the bandit among them
    answers.py    what came back: a reply or a typed error news.py      what their threads have to say
    parse_reply.py  reply to edits, with loose_json.py, reply_files.py and homes.py (which file an edit means)
    edit_modes.py   which form of edits to ask for         review.py    a second model's look
    explore.py    look-ups before a proposal               prices.py    what tokens cost
    quote.py      untrusted text made safe to show         scripted.py  a model that answers from a list, over HTTP
"""
