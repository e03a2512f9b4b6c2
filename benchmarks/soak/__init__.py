"""A random load of every kind of request for minutes: is everything right, and is nothing left behind?"""
