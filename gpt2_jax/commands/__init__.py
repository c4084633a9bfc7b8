"""The commands: arguments and printing around the library. `main.py` says what there is."""
