"""The values that all rooms speak: requests, plans, layouts, outcomes. No torch."""
