"""`python -m poweropd.integrations.verl`: the losses that verl has from us, and why it does not have the others."""

import sys

from poweropd.errors import UserError
from poweropd.integrations.verl.check import TESTED, check


def main() -> None:
    try:
        names = check()
    except UserError as error:
        sys.exit(f"error: {error}")
    from poweropd.integrations.verl.losses import NOT_SERVED

    print(f"verl {TESTED} has these loss modes:")
    print("\n".join(f"  {name}" for name in names))
    print("It does not hand to a loss what these objectives need; `poweropd train` has them:")
    print("\n".join(f"  {name:<15} {what}" for name, what in NOT_SERVED.items()))


main()
