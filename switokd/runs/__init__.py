"""Everything around a run's results: writing, reading, showing and comparing them.

    run_folder.py    files of a run folder, and writing them
    recorder.py      what rank 0 records during training
    progress.py      the progress bar
    savings.py       time that pauses saved
    summary.py       the closing table
    curves.py        the picture of gap, threshold and accuracy
    run.py           a run folder as a Python object
    folder_status.py what a run folder says without a coordinator
    compare/         several strategies over several seeds
    observers.py     trackers and the user's own observers, behind guards
    trackers/        TensorBoard, MLflow, Weights & Biases
    report/          one HTML page or picture on one or several runs

Not covered: exporting a network (`export/`).
"""
