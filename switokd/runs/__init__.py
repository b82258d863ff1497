"""Everything around a run's results: writing, reading, showing and comparing them.

    run_folder.py    files of a run folder, and writing them
    recorder.py      what rank 0 records during training
    progress.py      the progress bar
    savings.py       time that pauses saved
    summary.py       the closing table
    curves.py        the picture of gap, threshold and accuracy
    run.py           a run folder as a Python object
    compare/         several strategies over several seeds

Not covered: exporting a network (`export/`).
"""
