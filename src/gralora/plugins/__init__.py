"""Entry points for other training programs; each module is for the program that it is named after."""
