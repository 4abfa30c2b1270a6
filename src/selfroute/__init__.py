"""selfroute: small models that know when to ask.

    from selfroute import api

    with api.load("runs/demo", budget=0.3) as pair:
        print(pair.answer("numbers 3, 7, 25; target 46"))

`import selfroute` alone is free.
"""

__version__ = "0.1.0"
