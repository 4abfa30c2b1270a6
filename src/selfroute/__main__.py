"""`python -m selfroute`, and with it `accelerate launch -m selfroute train CONFIG`."""

from selfroute.cli import main

if __name__ == "__main__":
    main()
