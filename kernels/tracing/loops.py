"""The parts of a loop's equation, by the names of every version of JAX."""


def scan_parts(eqn, values):
    """Splits what belongs to the operands of a `scan` equation: -> (constants, carry, slices).

    Args:
      eqn: the equation.
      values: a sequence, one for each operand.
    """
    if "num_consts" in eqn.params:  # before JAX 0.11
        consts, carry = eqn.params["num_consts"], eqn.params["num_carry"]
    else:
        consts, carry, _ = map(len, eqn.params["ft_in"].unpack())
    return values[:consts], values[consts : consts + carry], values[consts + carry :]
