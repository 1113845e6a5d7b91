"""Tests of the muscle."""
