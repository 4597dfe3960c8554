"""The measuring harness of `benchmarks.compare`.

Every engine runs in a process of its own (`worker`), which the harness starts (`processes`) and
requests one measurement at a time from (`runs`): engines never compute at the same time.
"""
