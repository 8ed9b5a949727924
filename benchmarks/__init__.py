"""Measurements that need a quiet machine: run by hand, never asserted on by the tests."""
