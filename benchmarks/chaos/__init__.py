"""Scripted disasters, many times over: what a run survives, who is blamed, how soon it goes on, and whether a bit is lost.

    python -m benchmarks.chaos --short           every fault a few times, at least 20 SIGKILLs and 100 damaged checkpoints
    python -m benchmarks.chaos                   200 SIGKILLs, 1,000 damaged checkpoints
    python -m benchmarks.chaos --only kill --trials 50 --out kills.json
    python -m benchmarks.chaos --only kill --trials 50 --out kills.json --resume          goes on where that was cut off

`runs.py` starts runs and reads what they left, `local_faults.py` has the faults of one host, `saving_faults.py` kills in the middle of a
save, `node_faults.py` has the faults of emulated hosts, `ray_faults.py` those of nodes of a Ray cluster; `journal.py` keeps every trial as
soon as it is over, `page.py` makes the table of all. `make chaos` is the long form with its page.
A trial that does not keep its promise stays in the table with the reason, and the command ends with code 1; one that takes longer than
promised is counted in a column of its own, and does not change the code.
"""
