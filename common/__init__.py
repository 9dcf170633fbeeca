"""Lowest room: exceptions, option checks, durable files, signals, the dask client, tables of text. Imports nothing of
ours."""
