"""Fixtures that several files share."""

from tests.unit.device.test_architectures import tiny

__all__ = ["tiny"]
