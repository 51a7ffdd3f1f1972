"""stub"""

DESCRIPTION = ""


def add_arguments(p): ...
def main(o): ...
