"""The coordinator: adds the ranks' distances, decides every step, sends the decision to all ranks.

    run.py          one run: joins, reports, end; made of
      plan.py         the run's networks, ranks and strategy
      ranks.py        ranks that have joined, are connected, have finished
      rounds.py       reports of the open steps, and their decisions
      received.py    up to which step each rank has received decisions
      report_checks.py    whether a report is possible
      steps.py        a set of steps, as ranges
      hangs.py        ranks that the run has waited for too long
    registry.py     all runs of this process
    journal.py      decisions on the disk, for the next coordinator; finished.py: runs that ended
    views.py        what is said of the runs when someone asks; status.py describes one run
    session.py      one rank's stream; its responses wait in outbox.py
    servicer.py     the gRPC methods; messages.py converts their messages
    limits.py       all limits; held by admission.py (plans), bucket.py (messages of a stream),
                    pace.py (calls), unattached.py (idle streams), resources.py (connections)
    text.py         cuts and cleans names and sentences of others; logs.py does so for the log
    metrics.py      Prometheus metrics, served by http_server.py; made of
      metric_families.py  names, types and labels of all metrics
      run_metrics.py      what is counted of a run; histogram.py counts durations
      measurements.py     what ranks send for the metrics, checked
      run_series.py       the series of a run; service_series.py: of the coordinator
    server.py       starts both ports and runs until a signal

run.py and its parts know neither gRPC nor a clock. The coordinator imports no torch: it starts in
well under a second and needs no GPU.
"""
