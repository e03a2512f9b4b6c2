"""Run one step on the device, in the order that the streams need."""
