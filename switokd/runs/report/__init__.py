"""Reports of runs: what a run did, as one HTML page or as a picture for a paper.

    record.py      what the report shows of a run, read from its folder
    differences.py settings that differ from their defaults, and between runs
    figures.py     the pictures
    events.py      what happened, and where the time went
    page.py        the HTML page
    files.py       one file, in the format of its name

Not covered: what is written during training (`runs/recorder.py`, `runs/run_folder.py`).
"""
