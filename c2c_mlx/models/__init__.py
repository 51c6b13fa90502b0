"""A name, a folder or a hub id -> a loaded model, and what will fit."""
