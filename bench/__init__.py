"""Benchmarks of fastpeft, side by side with PEFT: `python -m bench --help`."""
