"""What a program costs: FLOPs, bytes and a roofline forecast, read off its graphs."""

from foveate.ir.cost.forecast import Cost, Forecast, Part, breakdown, cost_of, default_device, prefill_cost

__all__ = ["Cost", "Forecast", "Part", "breakdown", "cost_of", "default_device", "prefill_cost"]
