"""The paper's questions about why C2C works, one file each, on any pair and any task.

A study is a module with `run` (what is measured), `report` (in words) and `draw` (as a picture).
"""
