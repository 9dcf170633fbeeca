"""The fault suite's harness: what tests in tests/faults share."""
