"""Shared basics: exceptions, options, durable files, signals, the dask client, text tables. Imports no other room."""
