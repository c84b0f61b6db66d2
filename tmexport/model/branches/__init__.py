"""A file a branch: its dimensions, the table of its tensors and the table of its states."""
