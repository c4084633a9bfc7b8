"""The commands: arguments and printing, nothing that computes."""
