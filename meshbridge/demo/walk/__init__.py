"""The walk: one module per step, what each expects, what it saw, and how that was measured."""
