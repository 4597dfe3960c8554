"""Measuring speed and memory: what `python -m mlx_rgemma.benchmark` runs.

Every engine that is measured lives in a process of its own (`worker`), which the benchmark starts
(`processes`) and asks for one measurement at a time (`runs`), so that engines never share a machine
at the same moment, nor memory.
"""
