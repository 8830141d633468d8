"""What the environment asks of this machine, checked before a recipe loads or writes anything."""

from gptoss_ft.errors import UserError
from gptoss_ft.kernels import cpu_library


def check_instruction_set() -> None:
    """Refuse a GPTOSS_FT_CPU_ISA that names no instruction set of this processor.

    Raises:
        UserError: naming those it has.
    """
    if cpu_library.library() is None:
        return  # there is nothing that the variable could choose among
    try:
        cpu_library.selected_isa()
    except ValueError as error:
        raise UserError(str(error)) from None
