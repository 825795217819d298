"""Where checkpoints come from: one file for each kind of source, and what they share.

A new kind is a file with a class like those in hub.py, package.py and folder.py, and a row in
`resolve.SOURCES`.
"""
