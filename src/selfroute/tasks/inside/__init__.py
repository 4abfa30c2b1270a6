"""What runs inside the sandbox. `box.py` hands these files' text to the sandbox's own Python, which finds nothing else
of selfroute, so that they import each other and the standard library only: as little of it as they can, as each sandbox
starts anew.

They run as the same user as the program that they judge, which may kill them or lie in their name. That gains nothing:
what a program should print or return is not in its sandbox, and the limits that protect the machine are held from
outside or were given away for good before the program began.
"""
