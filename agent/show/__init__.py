"""What a person sees of a campaign. All of it is made from the ledger and can be made again.

    view.py        every line of text                      screen.py      the live screen, or plain lines
    plot.py        the picture of a campaign               audit_view.py  the closing audit
    phases.py      where the slots' time went              trace.py       the night for a trace viewer
    nightlog.py    the log in the run's folder             prompt_view.py what would be sent to a model
"""
