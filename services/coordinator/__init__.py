"""The coordinator: adds up the ranks' distances, decides, broadcasts, and is scraped.

    rounds.py    one run's state: who is there, which step is open, what was decided (no wire)
    servicer.py  the gRPC service: messages in, `rounds` calls, decisions out
    metrics.py   the Prometheus registry and the HTTP port
    server.py    puts them together and runs until told to stop

It imports no torch, so it starts in well under a second and needs no GPU.
"""
