"""Keys and values between decoding steps."""

from foveate.cache.cache import VisualTextCache
from foveate.cache.growing import GROWTH, Growing
from foveate.cache.heavy_recent import HeavyRecentCache

__all__ = ["GROWTH", "Growing", "HeavyRecentCache", "VisualTextCache"]
