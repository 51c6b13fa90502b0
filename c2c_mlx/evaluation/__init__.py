"""The same items through every mode: tasks, their scores, and what the scores are worth."""
