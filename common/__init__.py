"""Shared basics: exceptions, options, durable files, signals, the terminal, the dask client, text tables.

Imports no other room.
"""
