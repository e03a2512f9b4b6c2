"""Values that all rooms use: requests, plans, layouts, outcomes. No torch."""
