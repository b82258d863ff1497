"""Derive the decisions of a run again from its record, and those that another rule would make.

    record.py        the record of a run folder or of a coordinator's journal, row by row
    sequence.py      which row belongs where: steps that are missing, doubled, out of order
    derive.py        compares every recorded number with the derived one
    alternatives.py  other rules on the same numbers, and how often they would switch
    replay.py        all of these together: `replay`
    picture.py       the picture (the only module that imports matplotlib, when it draws)

No module here imports PyTorch.

Not covered: the command line (`cli/replay.py`).
"""
