"""Placement, remote calls with names and deadlines, phases."""

CPU_DEVICE = "miles_device"  # custom Ray resource: one unit is one CPU "device"
