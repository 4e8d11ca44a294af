"""Generated from protos/ by ``make protos``; a test regenerates and compares."""
