"""Compare strategies over seeds: run the trials, then write a table, a CSV file and a picture.

    trials.py       what to run: a trial is one strategy with one seed
    runner.py       run the trials as processes
    statistics.py   results of the trials; means and standard deviations over seeds
    table.py        the table, for terminals and Markdown
    plot.py         the picture (the only module that imports matplotlib, when it draws)
    files.py        write table.md, compare.csv and compare.png

No module here imports PyTorch.

Not covered: the command line (`cli/compare.py`).
"""
