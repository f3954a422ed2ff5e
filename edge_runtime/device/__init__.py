"""The resident device: enrol, fetch, verify, train in a child process, seal, upload, repeat.

It never loads an engine: training and the checking of artifacts are child processes, so that what stays in memory
between rounds is small. Nothing is imported here for the same reason.
"""
